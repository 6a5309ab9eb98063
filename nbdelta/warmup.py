"""``python -m nbdelta warmup``: fill the compile cache."""

import itertools
import time

import numpy as np

import nbdelta
from nbdelta import console as out
from nbdelta.testing import as_dtype, make_inputs

GATES = "gda", "kda"


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


def _dtypes():
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return ["float32", "float64", "float16"]
    return ["float32", "bfloat16", "float64", "float16"]


def _rule(name, dtype, gate, tokens, *, state_dtype=None, **options):
    """Make a call of one of the two algorithms; two sequences, so that threads are started."""
    inputs = make_inputs(
        0, 2, tokens, 1, 1, 16, 16, gate, dtype=dtype, states=2, state_dtype=state_dtype
    )
    options.update(output_final_state=True, use_qk_l2norm_in_kernel=True)
    return lambda: getattr(nbdelta, name)(**inputs, **options)


def _calls():
    """Yield ``(text, function without arguments)``, one for each kernel or more."""
    dtypes = _dtypes()
    for dtype, gate in itertools.product(dtypes, GATES):
        text = f"{gate.upper()}, {dtype}"
        yield f"prefill, {text}", _rule("chunk_gated_delta_rule", dtype, gate, 2)
        yield f"decode, {text}", _rule("fused_recurrent_gated_delta_rule", dtype, gate, 1)
    # states that a decode step works on where they are
    for dtype, v_first, gate in itertools.product(dtypes, (False, True), GATES):
        if dtype != "float64":
            call = _rule(
                "fused_recurrent_gated_delta_rule", "float32", gate, 1, state_dtype=dtype,
                state_v_first=v_first,
            )  # fmt: skip
            order = "keys" if v_first else "values"
            yield f"decode, {gate.upper()}, {dtype} state, {order} contiguous", call
    for dtype in dtypes:
        x = as_dtype(np.zeros((1, 2, 1, 16)), dtype)
        L = as_dtype(np.eye(16)[None], dtype)
        yield f"cumsum, {dtype}", lambda x=x: nbdelta.chunk_local_cumsum(x, 64)
        yield f"gate, {dtype}", lambda x=x: nbdelta.fused_gate(x)
        yield f"solve_tril, {dtype}", lambda x=x: nbdelta.solve_tril(x)
        yield f"solve_triangular, {dtype}", lambda L=L: nbdelta.solve_triangular(L, L)
    # a result in float64 is summed in it
    x, result = np.zeros((1, 2, 1, 16)), np.zeros((1, 2, 1, 16))
    yield "cumsum, float64 result", lambda: nbdelta.chunk_local_cumsum(x, 64, out=result)
