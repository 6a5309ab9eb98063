"""The tests that have a device, on what stands in for a GPU: an emulator of its code, a simulator.

Both have to be there before numba is imported, so they are run by a pytest of their own.
"""

import re
import subprocess
import sys
from pathlib import Path

import devices
import pytest

FOLDER = Path(__file__).parent
# what one process runs, since most of its time goes into compilation: files, which of their tests
EMULATED = {
    "backward": {
        "test_cuda_backward.py": "not (shapes and float64)",
        "test_cuda_cut_off.py": "backward",
    },
    "chunk": {"test_cuda_chunk.py": "", "test_cuda_cut_off.py": "forward or sums"},
    "chunk by any device": {
        "test_chunk_gated_delta_rule.py": "options or dtypes or layouts or interval",
        "test_gated_delta_rule.py": "agree or single_tokens",
        # the same bits for the past whatever comes, alone and in a batch; strong gates and resets
        "test_numerics.py": "earlier_outputs or alone_and or split or infinity or any_gate",
    },
    "recurrent": {
        "test_cuda_recurrent.py": "",
        "test_fused_recurrent.py": "",
        "test_cuda_arrays.py": "",
        "test_cuda_host.py": "",
    },
    "blocks": {
        "test_cuda_blocks.py": "",
        "test_fused_gate.py": "naive or tails or layouts",
        "test_chunk_local_cumsum.py": "lengths or axis or layouts or packed",
        "test_solve.py": "dtypes or packed or layouts or bad_numbers",
    },
    "profile": {"test_cuda_profile.py": "not (backward and float32)"},
    "far": {"test_cuda_far.py": ""},
    "torch": {
        "test_cuda_cli.py": "float32-gda or float64-blocks or bench",
        "test_torch_cuda.py": "",
    },
}
# a Python thread for every thread of a GPU: what is small, of every kernel
SIMULATED = {
    "test_cuda_chunk.py": "test_errors and T16",
    "test_cuda_tiles.py": "",
    "test_fused_recurrent.py": "test_final_state_in_place",
    "test_fused_gate.py": "test_dtypes",
    "test_chunk_local_cumsum.py": "test_any_axis",
    "test_solve.py": "packed or triangular_dtypes",
}


def run_on(device, files):
    reason = devices.rejection_reason(device)
    if reason:
        pytest.skip(reason)
    chosen = [f"{file} and ({tests})" if tests else file for file, tests in files.items()]
    command = [sys.executable, "-m", "pytest", "-q", "-rap", "-p", "no:cacheprovider"]
    command += ["--device", device, *files, "-k", " or ".join(chosen)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # (a run that skipped all of a file proves nothing)
    for file in files:
        assert re.search(rf"^PASSED \S*{re.escape(file)}::", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("files", EMULATED.values(), ids=EMULATED)
def test_emulator(files):
    """The PTX of the kernels, with memory and race checks."""
    run_on("emu", files)


def test_simulator():
    """The Python of the kernels."""
    run_on("sim", SIMULATED)
