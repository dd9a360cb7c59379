"""Every architecture of transformers with accel's kernels: equal to eager attention, or refused in a sentence."""

import pytest

pytest.importorskip("transformers")

from _sweep_families import QUICK
from _transformers import NotBuiltError, families, sweep

# a family of each kind of attention and mask; `make sweep` runs all of them
REST = [name for name in families() if name not in QUICK]


def check(family, **how):
    rows = sweep(family, **how)
    assert rows
    wrong = [row for row in rows if not row.right]
    assert not wrong, "\n".join(f"{row.family}, {row}" for row in wrong)


@pytest.mark.parametrize("family", QUICK)
def test_quick_family(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_family(family):
    try:
        check(family)
    except NotBuiltError as error:
        pytest.skip(f"no tiny {family}: {error}")
