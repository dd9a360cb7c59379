"""``python tests/sweep [family ...]``: what became of each family of transformers, one line each.

``--table FILE`` also writes the table of ``tests/sweep/RESULTS.md``; the exit status is 1 where anything is wrong.
"""

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(prog="python tests/sweep", description=__doc__)
    parser.add_argument("family", nargs="*", help="model types of transformers; all if none")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    chosen = parser.parse_args()
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # the checkout first, whatever else is installed
    import torch

    from accel.benchmarks._torchvision import allow_import

    allow_import()
    from _table import table
    from _transformers import NotBuiltError, families, sweep

    torch.set_num_threads(1)
    found, missing = {}, {}
    for family in chosen.family or families():
        start = time.perf_counter()
        try:
            rows = found[family] = sweep(family)
        except NotBuiltError as error:
            missing[family] = str(error)
            print(f"-- {family}: not built: {error}", flush=True)
            continue
        mark = "ok" if all(row.right for row in rows) else "!!"
        print(f"{mark} {family} [{time.perf_counter() - start:.1f} s]: {'; '.join(map(str, rows))}", flush=True)
    wrong = [row for rows in found.values() for row in rows if not row.right]
    if chosen.table:
        chosen.table.write_text(table(found, missing))
    print(f"{len(found)} families swept, {len(missing)} not built, {len(wrong)} rows wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
