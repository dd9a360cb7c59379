"""The rows of a sweep as a page."""

import transformers

HEAD = """# Every family of transformers, swept

Tiny models of transformers {version}, made from their configurations, with random weights and a batch padded on the
right and on the left, in eval mode: outputs and every parameter's gradient, and the scores of a few tokens generated
with the cache, against eager attention. `python tests/sweep --table tests/sweep/RESULTS.md` makes this page.

- **by name** is `attn_implementation="accel"`, **patch** is `accel.patch(model)`, **unpad** is
  `accel.patch(model, unpad=True)`, **generate** is `model.generate` of either.
- A cell gives the calls that a kernel served and the largest difference of an output or gradient, as a part of the
  largest value. A number in brackets is the reason for a refusal, below the table.

{counts}

| family | replaced | by name | patch | unpad | generate by name | generate |
|---|---|---|---|---|---|---|
"""
_WAYS = ("by name", "patch", "unpad", "generate by name", "generate")


def table(found, missing):
    """``found`` holds a family's rows by its name, ``missing`` why a family could not be made small."""
    reasons, lines = {}, []
    for family, rows in found.items():
        replaced = max(row.replaced for row in rows)
        cells = [_cell([row for row in rows if row.way.rpartition(", ")[0] == way], reasons) for way in _WAYS]
        lines.append(f"| {family} | {replaced or ''} | {' | '.join(cells)} |")
    every = [row for rows in found.values() for row in rows]
    equal = sum(row.status == "equal" for row in every)
    refused = sum(row.status == "refused" for row in every)
    wrong = sum(not row.right for row in every)
    counts = (
        f"{len(found)} families, {len(every)} runs: {equal} equal, {refused} refused, {wrong} wrong. "
        f"{len(missing)} families could not be made small."
    )
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    absent = [f"- {family}: {reason}" for family, reason in missing.items()]
    head = HEAD.format(version=transformers.__version__, counts=counts) + "\n".join(lines)
    return "\n".join([head, "", "## Refused because", "", *notes, "", "## Not made small", "", *absent, ""])


def _cell(rows, reasons):
    if not rows:
        return ""
    worst = next((row for row in rows if not row.right), None)
    if worst is not None:
        return f"**{worst.status}** {worst.difference:.0e} {worst.note}".replace("|", "\\|")
    if any(row.status == "refused" for row in rows):
        note = next(row.note for row in rows if row.status == "refused").replace("|", "\\|")
        return f"[{reasons.setdefault(note, len(reasons) + 1)}]"
    if all(row.status == "no attention" for row in rows):
        return "none"
    return f"{sum(row.calls for row in rows)}, {max(row.difference for row in rows):.0e}"
