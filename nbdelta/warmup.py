"""``python -m nbdelta warmup``: fill the compile cache."""

import time

import numpy as np

import nbdelta
from nbdelta import console as out
from nbdelta.testing import as_dtype, make_inputs


def warmup():
    """Compile the kernels of all functions, dtypes and gates; returns 0."""
    console = out.console("warmup")
    todo = list(_calls())
    begin = time.perf_counter()
    with out.progress(console, len(todo)) as step:
        for text, call in todo:
            step(text, 0)
            call()
            step(text)
    console.print(f"{len(todo)} calls ready after {time.perf_counter() - begin:.1f} s")
    return 0


def _calls():
    """Yield ``(text, function without arguments)``, one for each kernel."""
    dtypes = ["float32", "float64", "float16"]
    try:
        import ml_dtypes  # noqa: F401

        dtypes.insert(1, "bfloat16")
    except ImportError:
        pass
    for dtype in dtypes:
        for gate in ("gda", "kda"):
            # two tokens are chunked, and one is a decode step
            for tokens in (2, 1):
                inputs = make_inputs(0, 1, tokens, 1, 1, 16, 16, gate, dtype=dtype, states=1)
                inputs["output_final_state"] = inputs["use_qk_l2norm_in_kernel"] = True
                kind = "decode" if tokens == 1 else "prefill"
                yield (
                    f"{kind}, {gate.upper()}, {dtype}",
                    lambda inputs=inputs: nbdelta.gated_delta_rule(**inputs),
                )
        x = as_dtype(np.zeros((1, 2, 1, 16)), dtype)
        L = as_dtype(np.eye(16)[None], dtype)
        yield f"cumsum, {dtype}", lambda x=x: nbdelta.chunk_local_cumsum(x, 64)
        yield f"gate, {dtype}", lambda x=x: nbdelta.fused_gate(x)
        yield f"solve_tril, {dtype}", lambda x=x: nbdelta.solve_tril(x)
        yield f"solve_triangular, {dtype}", lambda L=L: nbdelta.solve_triangular(L, L)
