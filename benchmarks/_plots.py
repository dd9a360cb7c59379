"""Pictures that need matplotlib: every op's speed-ups with the goals, the time a token by the length of the text, the
roofline, and training curves."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from accel.benchmarks._choice import RIVALS
from accel.benchmarks._results import Results
from accel.benchmarks._tables import speedups
from accel.benchmarks.fp8_training import Course as EightBits
from accel.benchmarks.goals import concerns, geometric_mean
from accel.benchmarks.harness import OURS, Row
from accel.benchmarks.moe_training import Course

INK = "#123456"  # stands for the page's text colour in a picture; replaced by currentColor
COLORS = {
    OURS: "#2f6fde",
    "compile": "#e08a1e",
    "sdpa": "#1f9d6b",
    "torchvision": "#c2477f",
    "conv2d": "#7a6ff0",
    "eager": "#8a94a3",
    "loop": "#5f9ea0",
    "strips": "#c9a227",
    "softmax": "#c2477f",
    "transformers": "#b5651d",
    "core stubbed out": "#b9a3e3",
}
BALANCE = ("#8a94a3", "#2f6fde", "#1f9d6b", "#e08a1e", "#c2477f")
"""Of trainings, in their order."""
GOAL = "#d6336c"


def pictures(results: Results) -> list[str]:
    """Sections of the page, each a heading and a figure."""
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
                caption = "Times as fast as the rival. Bars are geometric means, dots single rows, red lines goals."
                parts.append(f"<h3>Speed-up: {html.escape(op)}</h3>" + _figure(plt, figure, caption))
        for op in dict.fromkeys(row.op for row in results.rows if row.tokens):
            figure = _by_length(plt, [row for row in results.rows if row.op == op])
            if figure is not None:
                caption = "Time over tokens, by the number of tokens: flat where a token costs the same in any text."
                parts.append(f"<h3>Time a token: {html.escape(op)}</h3>" + _figure(plt, figure, caption))
        roofline = _roofline(plt, results)
        if roofline is not None:
            caption = (
                "FLOP/s over FLOPs per byte that must move. Lines are this machine's measured copy bandwidth (large "
                "copies; small maps stay in cache and may lie above) and its rate of multiply-adds on registers; the "
                "broken line is what torch.mm gives of that."
            )
            parts.append("<h3>Roofline</h3>" + _figure(plt, roofline, caption))
        if results.language:
            caption = (
                "Small models of the bytes of Python’s standard library with as many parameters each, one of FLASH and "
                "one of softmax attention, on the same windows of text. Thin: each step; thick: a running mean."
            )
            parts.append("<h3>Language models</h3>" + _figure(plt, _language(plt, results.language), caption))
        if results.balance:
            caption = (
                "One small model of experts on the same windows of the same text, with each way to keep its experts "
                "busy alike; what is written beside the names is the end. The loads of the experts are those of the "
                "first layer over the last tenth of the steps. Running means."
            )
            parts.append("<h3>Experts kept busy alike</h3>" + _figure(plt, _balance(plt, results.balance), caption))
        if results.eight_bits:
            caption = (
                "A small Llama of the bytes of Python’s help texts, its linear layers in bf16 and in eight bits, from "
                "the same weights on the same windows. What is written beside a seed is by how much the mean loss of "
                "the last 50 steps differs. Running means."
            )
            figure = _eight_bits(plt, results.eight_bits)
            parts.append("<h3>Training in eight bits</h3>" + _figure(plt, figure, caption))
        if results.curves is not None:
            caption = (
                "A small Swin trained on scikit-learn’s digits. Below, how far each run lies from the unpatched one; "
                "the grey runs are unpatched too, but began with every weight one unit in the last place away."
            )
            parts.append("<h3>Training</h3>" + _figure(plt, _curves(plt, results), caption))
    return parts


def _figure(plt: Any, figure: Any, caption: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight")
    plt.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _bars(plt: Any, results: Results, op: str) -> Any | None:
    """A panel per mode; in it a cluster per group and dtype, a bar per provider that is not the rival."""
    rows = [row for row in results.rows if row.op == op]
    factor = speedups(rows)
    rows = [row for row in rows if id(row) in factor and row.provider in COLORS and factor[id(row)] != 1.0]
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
                if goal.figure == "speedup" and goal.per == 1 and goal.rival == RIVALS[op][0] and concerns(goal, row):
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


def _by_length(plt: Any, rows: list[Row]) -> Any | None:
    """A panel per group, dtype and mode that has several lengths; in it a line per provider."""
    panels_of: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.tokens and row.p50_ms:
            lines = panels_of.setdefault(f"{row.group}, {row.dtype}, {row.mode}", {})
            lines.setdefault(row.provider, []).append((row.tokens, 1e6 * row.p50_ms / row.tokens))
    shown = {title: lines for title, lines in panels_of.items() if max(map(len, lines.values())) > 1}
    if not shown:
        return None
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure, panels = plt.subplots(down, across, figsize=(11, 0.8 + 2.9 * down), squeeze=False, layout="constrained")
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    names = [p for p in COLORS if any(p in lines for lines in shown.values())]
    for panel, (title, lines) in zip(panels.flat, shown.items(), strict=False):
        for name in names:
            if name in lines:
                panel.plot(*zip(*sorted(lines[name]), strict=True), "o-", color=COLORS[name], markersize=4)
        counts = sorted({tokens for line in lines.values() for tokens, _ in line})
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [f"{n / 1024:g}K" for n in counts])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_title(title)
        panel.set_xlabel("tokens")
    for line in panels:
        line[0].set_ylabel("ns a token")
    handles = [plt.Line2D([], [], marker="o", color=COLORS[name]) for name in names]
    figure.legend(handles, names, loc="outside lower left", ncols=len(names))
    return figure


def _smooth(line: Sequence[float]) -> list[float]:
    """A running mean over a twentieth of it."""
    near = max(1, len(line) // 20)
    return [sum(line[max(0, i - near) : i]) / min(i, near) for i in range(1, len(line) + 1)]


def _language(plt: Any, losses: dict[str, list[float]]) -> Any:
    figure, panel = plt.subplots(figsize=(11, 4), layout="constrained")
    for (name, line), provider in zip(losses.items(), (OURS, "softmax"), strict=False):
        steps, means = range(1, len(line) + 1), _smooth(line)
        panel.plot(steps, line, color=COLORS[provider], linewidth=0.6, alpha=0.45)
        panel.plot(steps, means, color=COLORS[provider], linewidth=1.8, label=f"{name}: {means[-1]:.2f} at the end")
    panel.set_xlabel("step")
    panel.set_ylabel("loss, nats a byte")
    panel.legend()
    return figure


def _balance(plt: Any, courses: dict[str, Course]) -> Any:
    figure, (losses, load, shares) = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(2, 2, 1.2), layout="constrained")
    for (name, course), color in zip(courses.items(), BALANCE, strict=False):
        loss, uneven = _smooth(course.losses), _smooth(course.imbalance)
        steps = range(1, len(loss) + 1)
        losses.plot(steps, loss, color=color, linewidth=1.4, label=f"{name}: {loss[-1]:.2f}")
        load.plot(steps, uneven, color=color, linewidth=1.4, label=f"{name}: {uneven[-1]:.2f}")
        shares.plot(range(1, len(course.load) + 1), [100 * x for x in course.load], "o-", color=color, markersize=3.5)
    losses.set_title("loss, nats a byte")
    load.set_title("largest load over the mean")
    shares.set_title("load of the experts, %")
    for panel, label in ((losses, "step"), (load, "step"), (shares, "experts, the busiest first")):
        panel.set_xlabel(label)
    load.set_ylim(1, 1.35 * load.get_ylim()[1])  # room for the names
    shares.set_ylim(bottom=0)
    losses.legend()
    load.legend()
    return figure


def _eight_bits(plt: Any, courses: dict[str, EightBits]) -> Any:
    figure, panels = plt.subplots(1, len(courses), figsize=(11, 3.6), squeeze=False, sharey=True, layout="constrained")
    for panel, (name, course) in zip(panels[0], courses.items(), strict=True):
        for label, line, provider in (("bf16", course.plain, "eager"), ("FP8", course.eight, OURS)):
            panel.plot(range(1, len(line) + 1), _smooth(line), color=COLORS[provider], linewidth=1.5, label=label)
        panel.set_title(f"{name}: {course.difference():+.2f} %")
        panel.set_xlabel("step")
        panel.legend()
    panels[0][0].set_ylabel("loss, nats a byte")
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
        peak = results.ceilings.multiply[dtype]
        ridge = peak / bandwidth
        low, high = min(*map(work, mine), ridge) / 3, max(*map(work, mine), ridge) * 3
        panel.plot([low, ridge, high], [low * bandwidth / 1e9, peak / 1e9, peak / 1e9], color=INK, linewidth=1.2)
        mm = results.ceilings.mm.get(dtype, peak)
        if mm != peak:
            panel.plot([mm / bandwidth, high], [mm / 1e9] * 2, color=INK, linewidth=1, linestyle="--")
        for provider in [p for p in reversed(COLORS) if any(r.provider == p for r in mine)]:
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
