"""Custom kernels for PyTorch: attention over windows, with the biases, masks and gradients that models really have.

Everything here runs on GPU and CPU, has gradients, and refuses in a sentence what it cannot do.
"""

from accel._version import __version__
from accel.dispatch import explain, use
from accel.ops.window_attention import window_attention

__all__ = ["__version__", "explain", "nn", "patch", "unpatch", "use", "window_attention"]

from accel import nn
from accel.patch import patch, unpatch
