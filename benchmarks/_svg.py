"""Bars of speed-ups, one panel a family, as SVG: in the page each by itself, in one picture for a README."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from accel.benchmarks import models
from accel.benchmarks._tables import NAMES, Match, number

WIDTH, LEFT, RIGHT = 430, 14, 58  # of a panel; beside the bars is room for their figures
HEAD, BAR = 36, 10
GAP = 28  # between panels of the picture

STYLE = """
.sv { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.sv text { fill: #1c2430; font-size: 12px; } .sv .title { font-size: 14px; font-weight: 600; }
.sv .soft { fill: #667085; font-size: 11px; } .sv .line { stroke: #d5dae2; } .sv .one { stroke: #667085; }
.sv .fp32 { fill: #2f6fde; } .sv .bf16 { fill: #15a37f; } .sv .fp16 { fill: #8b5cf6; } .sv .page { fill: #ffffff; }
@media (prefers-color-scheme: dark) { .sv text { fill: #e6eaf0; } .sv .soft { fill: #98a3b3; }
  .sv .line { stroke: #2b3440; } .sv .one { stroke: #98a3b3; } .sv .page { fill: #11161d; }
  .sv .fp32 { fill: #5b93f5; } .sv .bf16 { fill: #2cc79d; } }
"""


def families(found: Iterable[Match]) -> dict[str, list[Match]]:
    out: dict[str, list[Match]] = {}
    for match in found:
        out.setdefault(match.family, []).append(match)
    return out


def _ticks(found: Sequence[Match]) -> list[float]:
    """Powers of two around all speed-ups, 1 among them."""
    values = [match.speedup for match in found]
    low = math.floor(min(0.0, math.log2(min(values)) - 0.05)) if values else 0
    high = math.ceil(max(1.0, math.log2(max(values)))) if values else 1
    return [2.0**n for n in range(low, high + 1)]


def _at(speedup: float, ticks: Sequence[float]) -> float:
    low, high = math.log2(ticks[0]), math.log2(ticks[-1])
    return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(speedup) - low) / (high - low)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' class='{kind}' text-anchor='{anchor}'>{html.escape(text)}</text>"


def against(match: Match) -> str:
    if match.ours.op == models.NAME:
        return "unpatched"
    return NAMES.get(match.rival.provider, match.rival.provider)


def _bars(found: Sequence[Match], y: float, ticks: Sequence[float]) -> str:
    """One bar under another from 1× on, with their figures, over lines at the powers of two."""
    end, parts = y + len(found) * (BAR + 2), []
    for tick in ticks:
        kind, x = "one" if tick == 1 else "line", _at(tick, ticks)
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{y - 2}' y2='{end}' class='{kind}'/>")
    for i, match in enumerate(found):
        top, one, x = y + i * (BAR + 2), _at(1.0, ticks), _at(match.speedup, ticks)
        parts.append(
            f"<rect x='{min(one, x):.1f}' y='{top}' width='{max(1.0, abs(x - one)):.1f}' height='{BAR}' rx='2' "
            f"class='{match.ours.dtype}'/>"
        )
        parts.append(_text(max(one, x) + 5, top + BAR - 0.5, f"{number(match.speedup)}×"))
    return "".join(parts)


def panel(name: str, found: Sequence[Match], ticks: Sequence[float]) -> tuple[str, int]:
    """A family's bars, those of one case and mode under one line of text, and the height they take."""
    cases: dict[tuple[str, str], list[Match]] = {}
    for match in found:
        mode = "with backward" if match.ours.mode == "forward+backward" else match.ours.mode
        said = f"{mode}, against {against(match)}"
        cases.setdefault((match.title, said), []).append(match)
    parts, y = [_text(LEFT, 16, name, "title")], HEAD
    for (title, said), mine in cases.items():
        soft = f"<tspan class='soft' dx='7'>{html.escape(said)}</tspan>"
        parts.append(f"<text x='{LEFT}' y='{y + 6}'>{html.escape(title)}{soft}</text>")
        parts.append(_bars(mine, y + 12, ticks))
        y += 26 + len(mine) * (BAR + 2)
    parts += [_text(_at(tick, ticks), y + 2, f"{tick:g}×", "soft", "middle") for tick in ticks]
    return "\n".join(parts), y + 10


def legend(found: Sequence[Match], x: float, y: float) -> str:
    parts = []
    for dtype in dict.fromkeys(match.ours.dtype for match in found):
        parts.append(f"<rect x='{x:.1f}' y='{y - 9:.1f}' width='10' height='10' rx='2' class='{dtype}'/>")
        parts.append(_text(x + 15, y, dtype, "soft"))
        x += 60
    return "".join(parts) + _text(x, y, "times as fast, on a logarithmic scale", "soft")


def panels(found: Sequence[Match]) -> list[str]:
    """Each family's panel as a drawing of its own, all on one scale."""
    ticks, out = _ticks(found), []
    for name, mine in families(found).items():
        body, height = panel(name, mine, ticks)
        out.append(
            f"<svg class='sv' viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{html.escape(name)}'>{body}</svg>"
        )
    return out


def picture(found: Sequence[Match]) -> str:
    """All panels in one drawing that stands alone, in two columns of about the same height."""
    ticks, ends = _ticks(found), [16, 16]
    placed = []
    for name, mine in families(found).items():
        body, height = panel(name, mine, ticks)
        column = ends.index(min(ends))
        placed.append(f"<g transform='translate({16 + column * (WIDTH + GAP)} {ends[column]})'>{body}</g>")
        ends[column] += height + GAP
    width, height = 2 * WIDTH + GAP + 32, max(ends) + 16
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' class='sv' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}'><style>{STYLE}</style><rect class='page' width='{width}' height='{height}' rx='8'/>"
        f"{''.join(placed)}{legend(found, 24, height - 14)}</svg>\n"
    )
