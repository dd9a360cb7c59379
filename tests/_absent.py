"""A process in which some modules are not installed."""

_WITHOUT = '''
import sys


class Without:
    """A finder to which some modules are unknown: an import raises and ``importlib.util.find_spec`` answers None, as
    where nothing is installed. A finder in front that raises is not the same: torch asks whether triton is there."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name in ABSENT else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)
'''


def without(*names: str) -> str:
    """What such a program begins with."""
    return f"ABSENT = {names!r}\n{_WITHOUT}"
