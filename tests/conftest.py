import contextlib
import os

import pytest
import torch

# Triton kernels are tested through its interpreter where there is no GPU; it must be asked for before the first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes goes first, so that one process does not end with it while the other waits."""
    items.sort(key=lambda item: "test_compile_gate" not in item.nodeid)
