"""Inputs and error measures that the tests and ``python -m nbdelta check`` share; NumPy only."""

from typing import NamedTuple

import numpy as np

MIXED_GATES = (0.0, -1e-3, -0.1, -1.0, -20.0, -316.0, -1000.0, -np.inf)


class Shape(NamedTuple):
    """The sizes of one call; its text is a readable test id."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int

    def __str__(self):
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


def as_dtype(x, dtype):
    """Convert to a dtype given by name; ``"bfloat16"`` is that of ml_dtypes."""
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(dtype)


def make_inputs(
    seed,
    B,
    T,
    H,
    HV,
    K,
    V,
    gate="gda",
    *,
    dtype="float32",
    gate_dtype=None,
    log_decay=None,
    beta_max=1.0,
    states=None,
    state_dtype=None,
):
    """Make well-conditioned inputs: unit keys, bounded gates, the same numbers on every machine.

    Parameters
    ----------
    seed : int
        Seed of the generator. The same seed and sizes give the same inputs.
    B, T, H, HV, K, V : int
        Sizes, as in the public functions.
    gate : {"gda", "kda", None}
        One gate per value head, one per key channel, or none.
    dtype, gate_dtype : str
        Of q, k and v, and of g and beta (float32, or float64 with float64 inputs, when ``None``).
    log_decay : float or "mixed", optional
        ``None`` draws log-sigmoid gates; a number is every gate; ``"mixed"`` draws from
        `MIXED_GATES`, from no decay to a reset.
    beta_max : float
        beta is uniform in ``(0, beta_max)``.
    states : int, optional
        Number of initial states to make; none when ``None``.
    state_dtype : str, optional
        Of the initial states; as `gate_dtype` when ``None``.

    Returns
    -------
    dict
        ``q, k, v, g, beta`` and, with `states`, ``initial_state``.
    """
    rng = np.random.default_rng(seed)
    wide = "float64" if dtype == "float64" else "float32"
    gate_dtype = gate_dtype or wide
    q = rng.standard_normal((B, T, H, K))
    k = rng.standard_normal((B, T, H, K))
    v = rng.standard_normal((B, T, HV, V))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0.0, beta_max, (B, T, HV))
    g = None
    if gate is not None:
        gate_shape = (B, T, HV) if gate == "gda" else (B, T, HV, K)
        if log_decay is None:
            # mostly slow decay, as trained models have it
            g = -np.logaddexp(0.0, -rng.normal(2.0, 1.5, gate_shape))
        elif log_decay == "mixed":
            g = rng.choice(MIXED_GATES, gate_shape, p=[0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
        else:
            g = np.full(gate_shape, log_decay)
        g = as_dtype(g, gate_dtype)
    inputs = {
        "q": as_dtype(q, dtype),
        "k": as_dtype(k, dtype),
        "v": as_dtype(v, dtype),
        "g": g,
        "beta": as_dtype(beta, gate_dtype),
    }
    if states is not None:
        inputs["initial_state"] = as_dtype(
            rng.standard_normal((states, HV, K, V)), state_dtype or wide
        )
    return inputs


def rel_l2(x, ref, head_axis=2, least=0.0):
    """Return the largest over heads of ``||x - ref|| / ||ref||``; NaN where `x` has one.

    `head_axis` is 2 for outputs ``[B, T, HV, V]`` and 1 for states ``[N, HV, K, V]``. A head whose
    reference is zero counts as 0 if `x` is zero there, else as infinity. `least`, a number or one
    for each head, takes the place of a norm of `ref` below it: sizes of what a result is a sum of.
    """
    x = np.moveaxis(np.asarray(x).astype(np.float64), head_axis, 0)
    ref = np.moveaxis(np.asarray(ref).astype(np.float64), head_axis, 0)
    if x.shape != ref.shape:
        raise ValueError(f"x has shape {x.shape}, ref {ref.shape} (head axis first)")
    if x.size == 0:
        return 0.0
    heads = x.shape[0]
    error = np.linalg.norm((x - ref).reshape(heads, -1), axis=1)
    size = np.maximum(np.linalg.norm(ref.reshape(heads, -1), axis=1), least)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where((error == 0) & (size == 0), 0.0, error / size)
    return float(relative.max())


def allowed_error(ref, dtype, head_axis=2, *, hard_gates=False, products=None):
    """Return the bound on `rel_l2` of a result in `dtype`.

    float32: 2e-6, or 1e-5 with gates of any size; float64: 1e-12. For bfloat16 and float16 the
    result can be no better than the rounded reference: twice its error and 1e-5. Where matrices of
    16 bits were multiplied (`products` is their dtype) the bound is 5e-3, or 1e-3 in float16.
    """
    if products in ("bfloat16", "float16"):
        return 5e-3 if products == "bfloat16" else 1e-3
    if dtype == "float64":
        return 1e-12
    if dtype == "float32":
        return 1e-5 if hard_gates else 2e-6
    return 2.0 * rel_l2(as_dtype(ref, dtype), ref, head_axis) + 1e-5
