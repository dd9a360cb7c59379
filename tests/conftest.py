import contextlib
import os

import _settled
import pytest
import torch

# Triton kernels are tested through its interpreter where there is no GPU; it must be asked for before the first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Scratch of the C++ kernels begins as NaN, so that a place that is read before it was written fails every time.
os.environ.setdefault("ACCEL_NAN_SCRATCH", "1")

from accel.benchmarks._torchvision import allow_import

with contextlib.suppress(ModuleNotFoundError):  # tests of torchvision's models say themselves that it is missing
    allow_import()

# Test tensors are tiny; waking a second thread for each costs more than the work, ten times so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def one_thread():
    """One thread to begin with, and those of before afterwards, whatever the test sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--settled", action="store_true", help=f"of what {_settled.KEPT.name} holds, run one test in eight"
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.getoption("--settled"):
        return None
    still, files = _settled.settled(), _settled.files()
    changed = ", ".join(sorted(set(files) - still)) or "none"
    return f"emulated kernels: one test in {_settled.EVERY} of {len(still)} unchanged files; changed since: {changed}"


@pytest.hookimpl(trylast=True)  # behind -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--settled"):
        out = _settled.left_out([item.nodeid for item in items])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
        items[:] = [item for item in items if item.nodeid not in out]
    # What takes minutes goes first, so that one process does not end with it while the other waits.
    items.sort(key=lambda item: "test_compile_gate" not in item.nodeid)
