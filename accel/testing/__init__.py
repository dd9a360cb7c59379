"""What every op's test asks of every backend: the checks, the one tolerance table, poisoned memory.

An op's test file gives its cases as data (:class:`Case`); :func:`check_op` turns them into named checks. Nothing here
needs pytest: a check that cannot run on this machine raises ``unittest.SkipTest`` with the backend's own reason.
"""

from accel.testing.checks import (
    check_autocast,
    check_batch,
    check_checkpoint,
    check_compile,
    check_guard_pages,
    check_op,
    check_opcheck,
    check_poison,
    check_repeat,
    check_strides,
    check_subsets,
)
from accel.testing.running import (
    Case,
    double,
    random_like,
    require,
    run,
    threads,
    watch,
)
from accel.testing.tolerance import (
    HALVES,
    KERNEL_DTYPES,
    TOLERANCES,
    Tolerance,
    assert_close,
    assert_same,
)
from accel.testing.values import LEVELS, at_level, check_flops, check_gradcheck, check_levels, check_values

__all__ = [
    "HALVES",
    "KERNEL_DTYPES",
    "LEVELS",
    "TOLERANCES",
    "Case",
    "Tolerance",
    "assert_close",
    "assert_same",
    "at_level",
    "check_autocast",
    "check_batch",
    "check_checkpoint",
    "check_compile",
    "check_flops",
    "check_gradcheck",
    "check_guard_pages",
    "check_levels",
    "check_op",
    "check_opcheck",
    "check_poison",
    "check_repeat",
    "check_strides",
    "check_subsets",
    "check_values",
    "double",
    "random_like",
    "require",
    "run",
    "threads",
    "watch",
]
