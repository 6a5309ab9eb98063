import ctypes
import gc
import math

import devices
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# nothing here imports numba before `pytest_configure` has set the device up

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

# what compilers and imports make stays, and all of it was looked through again and again
gc.set_threshold(50_000, 20, 20)

# parameters of a test that run on a device that is not really there
FEW = {"sim": 4, "emu": 6}


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=devices.NAMES,
        help="where the kernels run: cpu; gpu (also by -m gpu); sim, Numba's CUDA simulator; emu, "
        "the PTX emulator. All but cpu run the tests that have a device, and no other ones; sim "
        "and emu run a few of each test's parameters, at small sizes.",
    )
    parser.addoption(
        "--all-parameters", action="store_true", help="with --device sim or emu: all parameters"
    )


def pytest_configure(config):
    by_marker = "gpu" if config.getoption("markexpr") == "gpu" else "cpu"
    config.device = config.getoption("device") or by_marker
    config.unusable_device = devices.prepare(config.device)


def pytest_collection_modifyitems(config, items):
    name = config.device
    if name == "cpu":
        # which leaves what it compiles to the emulator
        items.sort(key=lambda item: item.path.name != "test_ptx.py")
        return
    chosen = [item for item in items if "device" in item.fixturenames]
    if name != "gpu" and not config.getoption("all_parameters"):
        chosen = list(few_of_each(chosen, FEW[name]))
    for item in chosen:
        item.add_marker(pytest.mark.gpu)
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def few_of_each(items, count):
    """Keep so many of the parameters of every test, spread over all of them."""
    groups = {}
    for item in items:
        groups.setdefault((item.path, item.originalname), []).append(item)
    for group in groups.values():
        step = -(-len(group) // count)
        # with a divisor of their number, one of two parameters would stay the same
        while math.gcd(step, len(group)) > 1 and step < len(group):
            step += 1
        yield from group[::step]


@pytest.fixture
def device(request, monkeypatch):
    """Name of the device that a test runs on; the public functions work there."""
    name = request.config.device
    if request.config.unusable_device:
        pytest.skip(request.config.unusable_device)
    if name != "cpu":
        devices.serve(name, monkeypatch)
    if "recurrent" not in request.node.nodeid:
        import cases

        from nbdelta.dispatch import stage

        multiplies_halves = stage("chunk", "cpu" if name == "cpu" else "cuda").multiplies_halves
        monkeypatch.setattr(cases, "multiplies_halves", multiplies_halves)
    return name


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
    from nbdelta import arrays

    monkeypatch.setattr(arrays, "np", _NanFilling())


@pytest.fixture(autouse=True)
def nan_filled_scratch(monkeypatch):
    """Fill the kernels' scratch memory with NaN, too: what an earlier call left must not matter."""
    from nbdelta.cpu import _team

    scratch = _team._scratch

    def nan_filled(size):
        address = scratch(size)
        ctypes.memset(address, 0xFF, size)  # NaN in every floating type
        return address

    monkeypatch.setattr(_team, "_scratch", nan_filled)
