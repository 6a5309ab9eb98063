import ctypes

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from nbdelta import arrays
from nbdelta.cpu import _team

settings.register_profile(
    "default",
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "nightly", settings.get_profile("default"), max_examples=2000, derandomize=False
)
settings.load_profile("default")


# "cuda" joins here when its kernels do; tests take arrays to the device by `device`
@pytest.fixture(params=["cpu"])
def device(request):
    """Name of the device that a test runs on."""
    return request.param


class _NanFilling:
    """Stand in for NumPy inside `nbdelta.arrays`: new arrays are NaN until a kernel writes."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(shape, dtype=float):
        x = np.empty(shape, dtype)
        x.fill(np.nan)
        return x


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch):
    """Fill every output with NaN before the kernels see it: what they leave out is then seen."""
    monkeypatch.setattr(arrays, "np", _NanFilling())


@pytest.fixture(autouse=True)
def nan_filled_scratch(monkeypatch):
    """Fill the kernels' scratch memory with NaN, too: what an earlier call left must not matter."""
    scratch = _team._scratch

    def nan_filled(size):
        address = scratch(size)
        ctypes.memset(address, 0xFF, size)  # NaN in every floating type
        return address

    monkeypatch.setattr(_team, "_scratch", nan_filled)
