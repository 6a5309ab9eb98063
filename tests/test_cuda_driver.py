"""Numba's own host code and ours against a driver of two devices that computes nothing.

It is compiled here from fake_driver.c, in a process of its own found before any real one, and
writes down what it was asked. So what the emulator and the simulator replace runs as on a card:
device arrays, contexts, machine code and launches.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("ml_dtypes")

SOURCE = Path(__file__).with_name("fake_driver.c")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
MAX_DYNAMIC_SHARED_SIZE_BYTES, DISABLE_TIMING = 8, 2
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the driver is found as on Linux"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler for the driver"),
]
BEGIN = """
import os, sys, threading
import ml_dtypes
import numpy as np
from numba import cuda
import nbdelta
from nbdelta.cuda._arrays import fetch, send
from nbdelta.testing import make_inputs

def mark(text):
    with open(os.environ["FAKE_CUDA_LOG"], "a") as log:
        print(text, file=log)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The folder of the driver."""
    folder = tmp_path_factory.mktemp("driver")
    command = [COMPILER, "-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1", SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder


@pytest.fixture
def run(library, tmp_path):
    """A function that runs code on the driver, and returns its output and the calls."""
    log = tmp_path / "log"

    def run(code, **environment):
        log.unlink(missing_ok=True)
        env = {name: x for name, x in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
        env.update(LD_LIBRARY_PATH=str(library), FAKE_CUDA_LOG=str(log), **environment)
        env["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
        command = [sys.executable, "-c", BEGIN + code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = log.read_text().splitlines() if log.exists() else []
        return SimpleNamespace(output=done.stdout, calls=[line.split() for line in lines])

    return run


def launches(calls):
    """Of every launch, the kernel's name and the numbers: blocks, threads, ..., device."""
    return [(name, *map(int, numbers)) for what, name, *numbers in named(calls, "launch")]


def named(calls, what):
    return [call for call in calls if call[0] == what]


def after(calls, text):
    return calls[calls.index([text]) + 1 :]


PREFILL = """
call = make_inputs(0, 1, 70, 1, 2, 64, 64, "gda", dtype="bfloat16", states=1)
call = {name: send(x, 1) for name, x in call.items()}
with cuda.gpus[0]:
    mark("begin")
    o, state = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    mark("end")
    cuda.to_device(np.zeros(1))
assert (o.shape, o.dtype) == ((1, 70, 2, 64), ml_dtypes.bfloat16), (o.shape, o.dtype)
assert (state.shape, state.dtype) == ((1, 2, 64, 64), np.float32), (state.shape, state.dtype)
"""


def test_kernels_start_where_the_arrays_are(run):
    """On device 1, though another one is current, compiled or from the disk."""
    from nbdelta.cuda._call import LENGTH

    first, again = run(PREFILL).calls, run(PREFILL).calls
    for calls, found in ((first, "compiled"), (again, "loaded")):
        during = after(calls, "begin")[: after(calls, "begin").index(["end"])]
        assert {call[0] for call in during} == {"allocate", found, "allow", "launch"}
        assert len(named(during, found)) == 2
        assert {call[-1] for call in named(during, "allocate")} == {"1"}
        intra, scan = launches(during)
        assert "chunk_intra" in intra[0] and "chunk_scan" in scan[0]
        # blocks, threads, shared memory, stream, bytes of the descriptor, device
        assert intra[1:5] == (4, 1, 1, 128) and scan[1:5] == (4, 1, 1, 128)
        assert intra[6:] == scan[6:] == (0, 8 * LENGTH, 1)
        # more than 48 KB have to be allowed, before the launch
        assert intra[5] < 48 * 1024 < scan[5]
        ((*_, attribute, size, device),) = named(during, "allow")
        assert (attribute, device) == (str(MAX_DYNAMIC_SHARED_SIZE_BYTES), "1")
        assert int(size) == scan[5]
        assert during.index(named(during, "allow")[0]) < during.index(named(during, "launch")[1])
        # the device that was current is so again
        assert after(calls, "end")[0] == ["allocate", "8", "0"]


def test_bfloat16_there_and_back(run):
    """Numba copies arrays that have a buffer; those of bfloat16 have none."""
    run("""
x = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
for sent in (send(x), send(x, 1), send(x[:, ::2])):
    assert sent.dtype == x.dtype
    expected = x if sent.shape == x.shape else x[:, ::2]
    assert fetch(sent).dtype == x.dtype and (fetch(sent) == expected).all()
assert fetch(send(np.zeros((0, 2), ml_dtypes.bfloat16))).shape == (0, 2)
""")


def test_a_thread_without_a_context(run):
    calls = run("""
x = send(np.zeros((1, 5, 3), np.float32), 1)
nbdelta.fused_gate(x)
mark("begin")
results = []
thread = threading.Thread(target=lambda: results.append(nbdelta.fused_gate(x)))
thread.start(), thread.join()
assert results[0].shape == x.shape
""").calls
    (launch,) = launches(after(calls, "begin"))
    assert "gate_kernel" in launch[0] and launch[-1] == 1


def test_arrays_of_another_stream_are_waited_for(run):
    """By the device, not by the host: what a CUDA array interface or Numba's array says of it."""
    calls = run("""
class Interface:
    def __init__(self, x, stream):
        self.owner = x
        self.__cuda_array_interface__ = {**x.__cuda_array_interface__, "stream": stream}

x = send(np.zeros((1, 5, 3), np.float32), 1)
nbdelta.fused_gate(x)
for stream in (None, 1, 77):
    mark(f"stream {stream}")
    nbdelta.fused_gate(Interface(x, stream))
mark("bound")
nbdelta.fused_gate(x.bind(cuda.stream()))
""").calls
    for first, stream in ((["stream", "77"], "77"), (["bound"], str(0x5EA))):
        seen = [call for call in calls[calls.index(first) + 1 :] if call[0] != "allocate"]
        assert seen[0] == ["event", str(DISABLE_TIMING)]
        assert seen[1:3] == [["record", stream, "1"], ["wait", "0", "1"]]
        assert seen[3] == ["destroy"] and seen[4][0] == "launch"
    before = calls[: calls.index(["stream", "77"])]
    assert named(before, "event") == []


def test_old_devices_are_refused(run):
    text = run(
        """
x = send(np.zeros((1, 5, 3), np.float32))
try:
    nbdelta.fused_gate(x)
except RuntimeError as error:
    print(error)
from nbdelta import cli
sys.exit(cli.main(["info"]) or 0)
""",
        FAKE_CUDA_CAPABILITY="75",
        COLUMNS="400",
    ).output
    assert "x: is on cuda:0: needs compute capability 8.0 or later, the device has 7.5" in text
    assert "cuda:1 fake GPU (sm_75, 132 multiprocessors, 227 KB" in text
