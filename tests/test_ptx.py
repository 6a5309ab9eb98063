"""What the compiler makes of every kernel that ships, for each kind of GPU, without one at hand."""

import importlib
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
from devices import leave_ptx
from ptx_budget import BUDGETS, SHARED, occupancy

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numba.cuda import compiler, dispatcher, types
from numba.cuda.core import config

if config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

STAGES = ("chunk_cumsum", "solve_tril", "gate", "recurrent", "chunk", "chunk_backward")
ARCHES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
OLDEST = ARCHES["sm_80"]
KERNELS = [
    pytest.param(*specialisation, id=specialisation[0])
    for stage in STAGES
    for specialisation in importlib.import_module(f"nbdelta.cuda.{stage}").specialisations()
]
NAMES = [param.id for param in KERNELS]
every_kernel = pytest.mark.parametrize(("name", "kernel", "length", "shared"), KERNELS)


def budget_of(name):
    return next((row for row in BUDGETS if fnmatchcase(name, row.pattern)), None)


def bounds_of(kernel):
    return kernel.dispatcher.targetoptions["launch_bounds"]


def compile_ptx(kernel, length, monkeypatch):
    """The PTX of a kernel for every kind of GPU.

    It is what `cuda.compile_ptx` returns for each of them. But only the last step asks for the
    kind; those before it, which take most of the time, are done once.
    """
    # device functions are compiled for the current device, and there is none
    device = SimpleNamespace(compute_capability=OLDEST)
    for module in (compiler, dispatcher):
        monkeypatch.setattr(module, "get_current_device", lambda: device)
    arguments = (types.UniTuple(types.int64, length),)
    library, _ = compiler._compile_pyfunc_with_fixup(
        kernel.dispatcher.py_func,
        arguments,
        device=False,
        abi="numba",
        cc=OLDEST,
        launch_bounds=bounds_of(kernel),
    )
    texts = {arch: library.get_asm_str(cc=cc) for arch, cc in ARCHES.items()}
    for arch, cc in ARCHES.items():
        leave_ptx(kernel, arguments, cc, texts[arch])
    return texts


def find_ptxas():
    """The one of the compiler's own version is in a wheel, nvidia-cuda-nvcc."""
    for folder in sys.path:
        yield from Path(folder).glob("nvidia/*/bin/ptxas")
    if found := shutil.which("ptxas"):
        yield Path(found)


PTXAS = next(find_ptxas(), None)


def assemble(ptx, arch, folder):
    """What ptxas reports: registers, bytes of shared memory, stack and spills."""
    source = folder / "kernel.ptx"
    command = [PTXAS, f"-arch={arch}", "-v", source, "-o", folder / "kernel.cubin"]
    source.write_text(ptx)
    report = subprocess.run(command, capture_output=True, text=True).stderr
    older = re.search(r"Unsupported .version .*; current version is '([\d.]+)'", report)
    if older:
        # nothing in the kernels is as new as the compiler's version of the language
        source.write_text(re.sub(r"\.version [\d.]+", f".version {older[1]}", ptx))
        report = subprocess.run(command, capture_output=True, text=True).stderr
    assert "Used " in report, report

    def number(pattern):
        return int((re.findall(pattern, report) or [0])[-1])

    return SimpleNamespace(
        registers=number(r"Used (\d+) registers"),
        shared=number(r"(\d+) bytes smem"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
    )


def test_every_kernel_has_a_name_and_a_budget():
    assert len(set(NAMES)) == len(NAMES)
    assert [name for name in NAMES if budget_of(name) is None] == []
    used = {budget_of(name) for name in NAMES}
    assert [row.pattern for row in BUDGETS if row not in used] == []


@every_kernel
def test_kernel(name, kernel, length, shared, monkeypatch, tmp_path):
    budget = budget_of(name)
    for arch, ptx in compile_ptx(kernel, length, monkeypatch).items():
        if shared > SHARED[arch][1]:
            continue  # not for this kind, whose blocks have less shared memory
        assert f".target {arch}" in ptx
        assert (f".maxntid {kernel.threads}" in ptx) == (bounds_of(kernel) is not None)
        # a launch hands over the descriptor as one piece of memory
        assert ptx.count(".param .u64") == length
        assert ".local" not in ptx
        assert "float64" in name or ".f64" not in ptx
        assert [text for text in budget.contains if text not in ptx] == []
        if PTXAS is None:
            pytest.skip("no ptxas: pip install nvidia-cuda-nvcc, or put that of CUDA on the PATH")
        used = assemble(ptx, arch, tmp_path)
        assert used.spills == 0 and used.stack == 0, arch
        assert used.registers <= budget.registers, arch
        # tiles in dynamic shared memory count on its address: nothing comes before it
        assert not shared or not used.shared, arch
        assert used.shared + shared <= min(budget.shared, SHARED[arch][1]), arch
        if arch == "sm_90":
            blocks = occupancy(arch, kernel.threads, used.registers, used.shared + shared)
            assert blocks >= budget.blocks
