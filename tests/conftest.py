import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=2000)
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
    arrays = sys.modules.get("nbdelta.arrays")
    if arrays is not None:
        monkeypatch.setattr(arrays, "np", _NanFilling())
