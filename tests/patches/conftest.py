import pytest

import accel


@pytest.fixture
def on_reference():
    with accel.use(backend="reference"):
        yield
