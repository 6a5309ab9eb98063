"""Seconds until a new process has its first result."""

import os
import subprocess
import sys
import tempfile

PREFILL = """
import numpy as np, nbdelta
q = np.ones((1, 64, 2, 128), np.float32)
nbdelta.chunk_gated_delta_rule(q, q, q, -q[..., 0], q[..., 0])
"""
DECODE = """
import numpy as np, nbdelta
q = np.ones((1, 1, 2, 128), np.float32)
nbdelta.fused_recurrent_gated_delta_rule(q, q, q, -q[..., 0], q[..., 0])
"""
TIMED = "import time; begin = time.perf_counter()\n{}\nprint(time.perf_counter() - begin)"


def _seconds(code, cache):
    """Seconds of some code in a process of its own, without the interpreter's start."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", TIMED.format(code)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(output.stdout.split()[-1])


class Start:
    """Import, and first calls with an empty and with a full cache."""

    params = (["import", "prefill", "decode"],)
    param_names = ("what",)
    version, timeout = "1", 600

    def setup(self, what):
        """Choose the code."""
        self.code = {"import": "import nbdelta", "prefill": PREFILL, "decode": DECODE}[what]

    def track_cold(self, what):
        """Empty cache."""
        with tempfile.TemporaryDirectory() as cache:
            return _seconds(self.code, cache)

    def track_warm(self, what):
        """Cache filled by a process before; best of three."""
        with tempfile.TemporaryDirectory() as cache:
            _seconds(self.code, cache)
            return min(_seconds(self.code, cache) for _ in range(3))

    track_cold.unit = track_warm.unit = "s"
