import pytest
import torch

import accel
from accel import dispatch
from accel.patches import stand


@pytest.fixture
def on_reference():
    with accel.use(backend="reference"):
        yield


@pytest.fixture(autouse=True)
def float64_is_served(monkeypatch):
    """Whole models are compared in float64, where a user gets the class's own code: there is only the reference."""
    verdicts = {(op, device, torch.float64): None for op in dispatch.OPS for device in ("cpu", "cuda:0")}
    monkeypatch.setattr(stand, "_verdicts", verdicts)


@pytest.fixture
def as_a_user_has_it(float64_is_served, monkeypatch):
    """Nothing is known of dtypes and devices yet."""
    monkeypatch.setattr(stand, "_verdicts", {})
