"""Kernels that several processes left in one cache folder."""

import os
import subprocess
import sys

ERRORS = """
import sys
import numpy as np
import nbdelta
from nbdelta import naive
from nbdelta.cpu import chunk
from nbdelta.testing import as_dtype, make_inputs, rel_l2

call = make_inputs(0, 1, 40, 1, 2, 32, 32, "gda", dtype="bfloat16")
exact = {name: x.astype(np.float64) for name, x in call.items() if isinstance(x, np.ndarray)}
expected, _ = naive.gated_delta_rule(**exact)
for dots in sys.argv[1:]:
    chunk.unit_of_halves = lambda: int(dots == "dots")
    o, _ = nbdelta.chunk_gated_delta_rule(**call)
    assert rel_l2(o, expected) <= 5e-3, (dots, rel_l2(o, expected))
"""


def test_kernels_of_different_processes_are_not_taken_for_one_another(tmp_path):
    # two forms of one function, each compiled in a process where it came first
    for forms in (["plain"], ["dots"], ["plain", "dots"], ["dots", "plain"]):
        run = subprocess.run(
            [sys.executable, "-c", ERRORS, *forms],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, (forms, run.stderr[-2000:])
