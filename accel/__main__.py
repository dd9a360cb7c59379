"""``python -m accel doctor | bench``. A command is imported when asked for: the doctor runs where all else fails."""

from __future__ import annotations

import sys

USAGE = """usage: python -m accel <command> [options]

commands:
  doctor   what this installation can run, what it cannot and why, and what mends it
  bench    measure whole models and ops against what people use today, in less than five minutes; --goals, --full

Each command has its own --help."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "doctor":
        from accel.doctor import main as doctor

        return doctor(rest)
    if command == "bench":
        from accel.benchmarks.run import main as bench

        return bench(rest)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(USAGE, file=sys.stderr)
    print(f"\nunknown command {command!r}" if command else "\na command is missing", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
