"""One self-contained HTML page: goals on top, then pictures, the machine, and every row."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from accel.benchmarks.harness import OURS, Row, concerns, geometric_mean

if TYPE_CHECKING:
    from accel.benchmarks.report import Results

INK = "#123456"  # stands for the page's text colour in a picture; replaced by currentColor
COLORS = {OURS: "#2f6fde", "compile": "#e08a1e", "sdpa": "#1f9d6b", "eager": "#8a94a3", "core stubbed out": "#b9a3e3"}
GOAL = "#d6336c"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e3e7ed; --page: #ffffff; --panel: #f7f9fb;
  --good: #177245; --bad: #c0262d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a3b3; --line: #2b3440; --page: #11161d;
  --panel: #181f28; --good: #4cc38a; --bad: #ff7b7f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p { margin: .3rem 0; max-width: 50rem; } .soft { color: var(--soft); }
.verdict { font-size: 1.05rem; margin: .8rem 0 0; font-weight: 600; }
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
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(results: Results) -> str:
    facts = results.environment
    where = " · ".join(str(facts[k]) for k in ("device name", "date") if facts.get(k))
    if facts.get("commit"):
        where += f" · commit {facts['commit']}"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>accel benchmark</title><style>{STYLE}</style></head><body>",
        f"<h1>accel benchmark</h1><p class='soft'>{_text(where)}</p>",
        _head(results),
        _goals(results),
        *_pictures(results),
        _environment(results),
        _rows(results),
        "</body></html>",
    ]
    return "\n".join(p for p in parts if p)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _head(results: Results) -> str:
    from accel.benchmarks.report import disturbed, remarks, summary

    parts = [f"<p class='verdict'>{_text(summary(results))}</p>"]
    if disturbed(results):
        parts.append(
            f"<p class='bad'>{disturbed(results)} of {len(results.rows)} rows were disturbed by other load on the "
            "machine; their times are marked below.</p>"
        )
    parts += [f"<p class='soft'>{_text(note)}</p>" for note in remarks(results)]
    return "\n".join(parts)


def _table(header: Sequence[str], body: Iterable[str], numbers: Sequence[int], kind: str = "") -> str:
    cells = "".join(f"<th{' class=n' if i in numbers else ''}>{_text(name)}</th>" for i, name in enumerate(header))
    rows = "\n".join(body)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _goals(results: Results) -> str:
    from accel.benchmarks.report import GOAL_HEADER, goal_cells

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
    text = "Speed-ups are ratios of medians of interleaved runs, as geometric means over the shifts."
    return f"<h2>Goals</h2><p class='soft'>{text}</p>" + _table(GOAL_HEADER, body, (1, 2, 3))


def _environment(results: Results) -> str:
    facts = {k: v for k, v in results.environment.items() if v is not None and k != "command"}
    ceilings = results.ceilings
    facts["copy bandwidth"] = ", ".join(f"{_size(size)}: {rate / 1e9:.1f} GB/s" for size, rate in ceilings.copy)
    facts["matrix product"] = ", ".join(f"{n}: {rate / 1e12:.3g} TFLOP/s" for n, rate in ceilings.matmul.items())
    items = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    command = f"<p><code>{_text(results.environment['command'])}</code></p>"
    return f"<h2>Environment</h2>{command}<dl>{items}</dl>"


def _size(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def _rows(results: Results) -> str:
    from accel.benchmarks.report import ROW_HEADER, row_cells, speedups

    factor, parts = speedups(results.rows), []
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
        parts.append(f"<h2>Rows: {_text(op)}</h2>" + _table(ROW_HEADER, body, numbers, "rows"))
        lines = "\n".join(
            f"<p><code>{_text(c)}</code></p>" for c in dict.fromkeys(r.command for r in mine if r.command)
        )
        parts.append(f"<details><summary>Commands that measure one of these rows again</summary>{lines}</details>")
    return "\n".join(parts)


# --- pictures ---


def _pictures(results: Results) -> list[str]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return ["<p class='soft'>matplotlib is not installed: no pictures.</p>"]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "accel",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    parts = []
    with plt.rc_context(settings):
        for op in dict.fromkeys(row.op for row in results.rows):
            figure = _bars(plt, results, op)
            if figure is not None:
                caption = "Times as fast as eager PyTorch. Bars are geometric means, dots single rows, red lines goals."
                parts.append(f"<h2>Speed-up: {_text(op)}</h2>" + _figure(plt, figure, caption))
        roofline = _roofline(plt, results)
        if roofline is not None:
            caption = (
                "FLOP/s over FLOPs per byte that must move. Lines are this machine's measured copy bandwidth (large "
                "copies; small maps stay in cache and may lie above) and matrix product rate."
            )
            parts.append("<h2>Roofline</h2>" + _figure(plt, roofline, caption))
        if results.curves is not None:
            caption = (
                "A small Swin trained on scikit-learn’s digits. Below, how far each run lies from the unpatched one; "
                "the grey runs are unpatched too, but began with every weight one unit in the last place away."
            )
            parts.append("<h2>Training</h2>" + _figure(plt, _curves(plt, results), caption))
    return parts


def _figure(plt: Any, figure: Any, caption: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight")
    plt.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _bars(plt: Any, results: Results, op: str) -> Any | None:
    """A panel per mode; in it a cluster per group and dtype, a bar per provider that is not eager."""
    from accel.benchmarks.report import speedups

    rows = [row for row in results.rows if row.op == op]
    factor = speedups(rows)
    rows = [row for row in rows if id(row) in factor and row.provider != "eager"]
    if not rows:
        return None
    modes = list(dict.fromkeys(row.mode for row in rows))
    clusters = {m: list(dict.fromkeys((r.group, r.dtype) for r in rows if r.mode == m)) for m in modes}
    tallest = max(len(c) for c in clusters.values())
    shape = (11, 0.9 + 0.62 * tallest)
    figure, panels = plt.subplots(1, len(modes), figsize=shape, squeeze=False, layout="constrained")
    providers = [p for p in COLORS if any(row.provider == p for row in rows)]
    thick = 0.8 / max(1, len(providers))
    for panel, mode in zip(panels[0], modes, strict=True):
        for at, (group, dtype) in enumerate(clusters[mode]):
            for i, provider in enumerate(providers):
                found = [
                    factor[id(r)]
                    for r in rows
                    if (r.group, r.dtype, r.mode, r.provider) == (group, dtype, mode, provider)
                ]
                if not found:
                    continue
                y, mean = at + (i - (len(providers) - 1) / 2) * thick, geometric_mean(found)
                panel.barh(y, mean, thick * 0.88, color=COLORS[provider], label=provider if at == 0 else None)
                if len(found) > 1:
                    panel.plot(found, [y] * len(found), ".", color=INK, markersize=3.5, zorder=3)
                panel.annotate(
                    f"{mean:.2f}×",
                    (max(found), y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                )
            row = next(r for r in rows if (r.group, r.dtype, r.mode) == (group, dtype, mode))
            for goal in results.goals:
                if (goal.figure, goal.rival) == ("speedup", "eager") and concerns(goal, row):
                    panel.plot([goal.at_least] * 2, [at - 0.45, at + 0.45], color=GOAL, linewidth=1.6, zorder=4)
        panel.axvline(1, color=INK, linewidth=0.8, alpha=0.6)
        panel.set_yticks(range(len(clusters[mode])), [f"{group}, {dtype}" for group, dtype in clusters[mode]])
        panel.set_ylim(len(clusters[mode]) - 0.5, -0.5)
        panel.set_xlim(0, panel.get_xlim()[1] * 1.1)
        panel.set_title(mode)
        panel.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[p]) for p in providers]
    figure.legend(handles, providers, loc="outside lower left", ncols=len(providers))
    return figure


def _roofline(plt: Any, results: Results) -> Any | None:
    rows = [row for row in results.rows if row.tflops and row.gbs]
    if not rows:
        return None
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(11, 4.2), squeeze=False, sharey=True, layout="constrained")
    bandwidth = results.ceilings.copy[-1][1]
    markers = {"forward": "o", "backward": "s", "forward+backward": "^"}
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        mine = [row for row in rows if row.dtype == dtype]
        work: Callable[[Row], float] = lambda row: 1e3 * (row.tflops or 0) / (row.gbs or 1)  # noqa: E731
        peak = results.ceilings.matmul[dtype]
        ridge = peak / bandwidth
        low, high = min(*map(work, mine), ridge) / 3, max(*map(work, mine), ridge) * 3
        panel.plot([low, ridge, high], [low * bandwidth / 1e9, peak / 1e9, peak / 1e9], color=INK, linewidth=1.2)
        for provider in [p for p in ("eager", "compile", "sdpa", OURS) if any(r.provider == p for r in mine)]:
            for mode, marker in markers.items():
                dots = [(work(r), 1e3 * (r.tflops or 0)) for r in mine if (r.provider, r.mode) == (provider, mode)]
                if dots:
                    panel.plot(*zip(*dots, strict=True), marker, color=COLORS[provider], alpha=0.8, markersize=5)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(dtype)
        panel.set_xlabel("FLOP per byte")
    panels[0][0].set_ylabel("GFLOP/s")
    seen = [p for p in COLORS if any(r.provider == p for r in rows)]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLORS[p]) for p in seen]
    used = [m for m in markers if any(r.mode == m for r in rows)]
    handles += [plt.Line2D([], [], marker=markers[m], linestyle="", color=INK, fillstyle="none") for m in used]
    figure.legend(handles, [*seen, *used], loc="outside lower left", ncols=len(handles))
    return figure


def _curves(plt: Any, results: Results) -> Any:
    curves = results.curves
    assert curves is not None
    steps = range(1, len(curves.eager) + 1)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(11, 5), sharex=True, height_ratios=(2, 1.2), layout="constrained"
    )
    above.plot(steps, curves.eager, color=COLORS["eager"], linewidth=3, label="unpatched")
    above.plot(steps, curves.patched, color=COLORS[OURS], linewidth=1.2, label="patched")
    above.set_ylabel("loss")
    above.legend()
    tiny = 1e-9  # a logarithmic axis has no zero
    for i, other in enumerate(curves.perturbed):
        apart = [max(abs(a - b), tiny) for a, b in zip(curves.eager, other, strict=True)]
        below.plot(steps, apart, color=COLORS["eager"], linewidth=1, label="one ulp away" if i == 0 else None)
    apart = [max(abs(a - b), tiny) for a, b in zip(curves.eager, curves.patched, strict=True)]
    below.plot(steps, apart, color=COLORS[OURS], linewidth=1.2, label="patched")
    below.set_yscale("log")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.legend()
    return figure
