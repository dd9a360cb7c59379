"""One self-contained HTML page: whole models first, then speed and memory by family; all the rest is folded below."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from accel.benchmarks import _svg, models
from accel.benchmarks._plots import pictures
from accel.benchmarks._results import Results
from accel.benchmarks._tables import (
    GOAL_HEADER,
    ROW_HEADER,
    Match,
    ceilings,
    disturbed,
    goal_cells,
    matches,
    number,
    remarks,
    row_cells,
    speedups,
    summary,
)
from accel.benchmarks.harness import OURS

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e3e7ed; --page: #ffffff; --panel: #f7f9fb;
  --good: #177245; --bad: #c0262d; --blue: #2f6fde; --grey: #b3bbc7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a3b3; --line: #2b3440; --page: #11161d;
  --panel: #181f28; --good: #4cc38a; --bad: #ff7b7f; --blue: #5b93f5; --grey: #566173; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem; } h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p { margin: .3rem 0; max-width: 50rem; } .soft { color: var(--soft); }
.verdict { font-size: 1.05rem; margin: .8rem 0 0; font-weight: 600; }
.cards, .bars { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .9rem; }
.bars { grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); align-items: start; }
.card, .bars > svg { border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1.1rem; }
.bars > svg { padding: .7rem .6rem; width: 100%; height: auto; display: block; }
.card h3 { margin: 0; } .card .big { font-size: 2rem; font-weight: 650; line-height: 1.25; letter-spacing: -.02em; }
.card p { margin: .1rem 0; } .card b { font-weight: 600; }
.meter { display: grid; grid-template-columns: 1fr auto; gap: 0 .7rem; align-items: center; }
.meter i { display: block; height: .55rem; border-radius: .2rem; background: var(--grey); }
.meter i.ours { background: var(--blue); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: .85em; background: var(--panel); white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
.rows { font-size: 13px; } .rows td:first-child, .rows td:nth-child(2), .rows td:nth-child(3) { white-space: nowrap; }
.rows tr.first td { border-top: 2px solid var(--line); } tr.ours td { font-weight: 600; }
td.note { color: var(--soft); font-weight: 400; min-width: 14rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
code { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; background: var(--panel); padding: .1em .3em;
  border-radius: .25rem; word-break: break-word; }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem; color: var(--ink); }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9em; padding: .4rem .3rem 0; }
details { margin: .7rem 0; border: 1px solid var(--line); border-radius: .6rem; padding: .2rem 1.1rem; }
details[open] { padding-bottom: 1rem; } details details { padding: .1rem .8rem; }
summary { cursor: pointer; font-weight: 600; padding: .5rem 0; } details details summary { font-weight: 400; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(results: Results) -> str:
    facts, found = results.environment, matches(results)
    where = [str(facts.get("device name", "")), f"{facts.get('threads')} threads", f"torch {facts.get('torch')}"]
    where += [str(facts.get("date", "")), *([f"commit {facts['commit']}"] if facts.get("commit") else [])]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>accel benchmark</title><style>{STYLE}{_svg.STYLE}</style></head><body>",
        f"<h1>accel benchmark</h1><p class='soft'>{_text(' · '.join(where))}</p>",
        f"<p class='verdict'>{_text(summary(results))}</p>",
        _warning(results),
        _models([match for match in found if match.ours.op == models.NAME]),
        _speed([match for match in found if match.ours.op != models.NAME]),
        _memory(found),
        "<h2>Everything</h2>",
        _goals(results),
        _folded("Pictures: speed-ups with goals, time by length, roofline, training", "\n".join(pictures(results))),
        *_rows(results),
        _environment(results),
        "</body></html>",
    ]
    return "\n".join(p for p in parts if p)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{body}</details>" if body else ""


def _warning(results: Results) -> str:
    parts = []
    if disturbed(results):
        parts.append(
            f"<p class='bad'>{disturbed(results)} of {len(results.rows)} rows were disturbed by other load on the "
            "machine; their times are marked below.</p>"
        )
    if results.not_run:
        parts.append(f"<p class='bad'>Not run for want of time: {_text('; '.join(results.not_run))}.</p>")
    return "\n".join(parts)


# --- what a visitor wants ---


def _models(found: Sequence[Match]) -> str:
    if not found:
        return ""
    cards = []
    for match in found:
        row = match.ours
        equal = "equal outputs"
        if row.error is not None and match.rival.error is not None:
            equal += f" (off from float64 by {row.error:.0e}, unpatched {match.rival.error:.0e})"
        memory = ""
        if match.memory is not None:
            memory = f"<p>memory {number(match.rival.peak_mib)} → <b>{number(row.peak_mib)}</b> MiB</p>"
        cards.append(
            f"<div class='card'><h3>{_text(row.group)}</h3><p class='soft'>{_text(row.mode)}, {_text(row.dtype)}, "
            f"{_text(row.shape)}</p><div class='big'>{match.speedup:.2f}×</div>"
            f"<p>{number(match.rival.p50_ms)} → <b>{number(row.p50_ms)}</b> ms</p>{memory}"
            f"<p class='soft'>{_text(equal)}</p></div>"
        )
    text = "The same model before and after <code>accel.patch(model)</code>, median times of interleaved runs."
    return f"<h2>Whole models</h2><p class='soft'>{text}</p><div class='cards'>{''.join(cards)}</div>"


def _speed(found: Sequence[Match]) -> str:
    if not found:
        return ""
    dtypes = dict.fromkeys(match.ours.dtype for match in found)
    box = "<svg class='sv' width='10' height='10'><rect width='10' height='10' rx='2' class='{0}'/></svg> {0}"
    keys = " ".join(box.format(dtype) for dtype in dtypes)
    text = f"Times as fast as what people use today, on a logarithmic scale. {keys}"
    return f"<h2>Speed by family</h2><p class='soft'>{text}</p><div class='bars'>{''.join(_svg.panels(found))}</div>"


def _memory(found: Sequence[Match]) -> str:
    """The case of each op whose rival needs most: what that is, and what ours needs."""
    most: dict[str, Match] = {}
    for match in found:
        if match.memory is None or match.ours.op == models.NAME:
            continue
        known = most.get(match.ours.op)
        if known is None or (match.rival.peak_mib or 0.0) > (known.rival.peak_mib or 0.0):
            most[match.ours.op] = match
    cards = []
    for match in most.values():
        theirs, ours = match.rival.peak_mib or 0.0, match.ours.peak_mib or 0.0
        lines = []
        for name, value, kind in ((_svg.against(match), theirs, ""), (OURS, ours, "ours")):
            width = max(1.0, 100 * value / max(theirs, ours))
            lines.append(f"<i class='{kind}' style='width:{width:.1f}%'></i>")
            lines.append(f"<span>{number(value)} MiB, {_text(name)}</span>")
        cards.append(
            f"<div class='card'><p><b>{_text(match.title)}</b> <span class='soft'>{_text(match.ours.mode)}, "
            f"{_text(match.ours.dtype)}</span></p><div class='meter'>{''.join(lines)}</div></div>"
        )
    if not cards:
        return ""
    text = "What a call needs at its worst moment beyond what is held before it."
    return f"<h2>Memory</h2><p class='soft'>{text}</p><div class='cards'>{''.join(cards)}</div>"


# --- what is folded ---


def _table(header: Sequence[str], body: Iterable[str], numbers: Sequence[int], kind: str = "") -> str:
    cells = "".join(f"<th{' class=n' if i in numbers else ''}>{_text(name)}</th>" for i, name in enumerate(header))
    rows = "\n".join(body)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _goals(results: Results) -> str:
    verdicts = results.verdicts()
    if not verdicts:
        return ""
    body = []
    for verdict in verdicts:
        state = {True: "good", False: "bad", None: "soft"}[verdict.met]
        cells = goal_cells(verdict)
        classes = ["", "n", f"n {state}", "n", state, "note"]
        pairs_ = zip(classes, cells, strict=True)
        body.append("<tr>" + "".join(f"<td class='{c}'>{_text(v)}</td>" for c, v in pairs_) + "</tr>")
    met = sum(verdict.met is True for verdict in verdicts)
    text = (
        "Speed-ups are ratios of medians of interleaved runs, as geometric means over what varies inside a row's group."
    )
    table = f"<p class='soft'>{text}</p>" + _table(GOAL_HEADER, body, (1, 2, 3))
    return _folded(f"Goals: {met} of {sum(verdict.met is not None for verdict in verdicts)} met", table)


def _environment(results: Results) -> str:
    facts = {k: v for k, v in results.environment.items() if v is not None and k != "command"}
    facts["copy bandwidth"] = ", ".join(f"{_size(size)}: {rate / 1e9:.1f} GB/s" for size, rate in results.ceilings.copy)
    facts["ceilings"] = "; ".join(ceilings(results)[1:])
    items = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    command = f"<p><code>{_text(results.environment['command'])}</code></p>"
    notes = "".join(f"<p class='soft'>{_text(note)}</p>" for note in remarks(results))
    return _folded("The machine, and how it was measured", f"{command}{notes}<dl>{items}</dl>")


def _size(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def _rows(results: Results) -> Iterable[str]:
    factor = speedups(results.rows)
    numbers = range(3, len(ROW_HEADER) - 1)
    for op in dict.fromkeys(row.op for row in results.rows):
        body, before = [], None
        mine = [row for row in results.rows if row.op == op]
        for row in mine:
            cells = row_cells(row, factor.get(id(row)))
            marks = "ours " * (row.provider == OURS) + "first" * ((row.label, row.mode) != before)
            before = (row.label, row.mode)
            bad = " bad" if row.status == "FAIL" else ""
            tds = "".join(
                f"<td class='{'n' if i in numbers else 'note' + bad if i == len(cells) - 1 else ''}'>{_text(c)}</td>"
                for i, c in enumerate(cells)
            )
            body.append(f"<tr class='{marks}' title='{_text(row.shape)}'>{tds}</tr>")
        commands = dict.fromkeys(row.command for row in mine if row.command)
        lines = "\n".join(f"<p><code>{_text(command)}</code></p>" for command in commands)
        again = _folded("Commands that measure one of these rows again", lines)
        yield _folded(f"{len(mine)} rows of {op}", _table(ROW_HEADER, body, numbers, "rows") + again)
