import os

import torch

# Triton kernels are tested through its interpreter where there is no GPU; it must be asked for before the first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from accel.benchmarks._torchvision import allow_import

try:
    allow_import()
except ModuleNotFoundError:
    pass  # tests of torchvision's models say themselves that it is missing
