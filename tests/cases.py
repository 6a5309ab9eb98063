"""Calls that several test files make: shapes, one call per option, memory layouts, comparisons."""

import numpy as np
import pytest

from nbdelta import naive
from nbdelta.testing import Shape, allowed_error, as_dtype, make_inputs, rel_l2

DTYPES = ["float32", "float64", "bfloat16", "float16"]
GATES = ["gda", "kda"]
FORWARD = ["gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]

# every length around a chunk edge, and head sizes that models use or that fit no vector
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1),
    Shape(1, 2, 1, 1, 128, 128),
    Shape(2, 15, 1, 2, 7, 16),
    Shape(1, 16, 2, 2, 16, 7),
    Shape(2, 17, 2, 6, 16, 1),
    Shape(1, 63, 1, 2, 64, 96),
    Shape(1, 64, 2, 4, 96, 192),
    Shape(1, 65, 2, 2, 60, 100),
    Shape(2, 100, 1, 3, 100, 60),
    Shape(1, 257, 2, 4, 128, 128),
    Shape(1, 70, 1, 1, 192, 256),
    Shape(1, 33, 1, 2, 256, 128),
]

# a length-0 sequence first, inside and last, two length-1 sequences, and some over a chunk
PACKED_LENGTHS = [0, 1, 64, 0, 17, 1, 65, 3, 0]

# one call per option; those with "raw" in their name hand over gates or betas before activation
OPTIONS = [
    "plain",
    "no-gate",
    "no-beta",
    "scale",
    "l2norm",
    "raw-gate",
    "raw-gate-A_log",
    "raw-gate-dt_bias",
    "raw-gate-dt_bias-per-channel",
    "raw-gate-lower_bound",
    "raw-beta",
    "raw-beta-doubled",
    "initial-state",
    "initial-state-v-first",
    "tiled-heads",
    "packed",
    "packed-initial-state",
    "checkpoints",
    "checkpoints-v-first",
    "packed-checkpoints",
    "everything",
]


def cu_seqlens(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def arguments(option, shape, gate, dtype="float32", seed=0, **kwargs):
    """Return the keyword arguments of one call that uses an option of `OPTIONS`."""
    everything = option == "everything"
    packed = option.startswith("packed") or everything
    shape = Shape(*shape)
    if packed:
        shape = shape._replace(B=1, T=sum(PACKED_LENGTHS))
    n = len(PACKED_LENGTHS) if packed else shape.B
    states = n if "initial-state" in option or everything else None
    call = make_inputs(seed, *shape, gate, dtype=dtype, states=states, **kwargs)
    call["output_final_state"] = True
    rng = np.random.default_rng(seed + 1)

    def normal(*size):
        return rng.standard_normal(size).astype(np.float32)

    if option == "no-gate":
        call["g"] = None
    if option == "no-beta":
        call["beta"] = None
    if option == "scale" or everything:
        call["scale"] = 0.3
    if option == "l2norm" or everything:
        call["use_qk_l2norm_in_kernel"] = True
        for name in "qk":
            call[name] = as_dtype(3.0 * rng.standard_normal(call[name].shape), dtype)
    if option.startswith("raw-gate") or everything:
        call["use_gate_in_kernel"] = True
        call["g"] = normal(*call["g"].shape) - np.float32(2.0)
        if option != "raw-gate":
            call["A_log"] = normal(shape.HV)
        if "dt_bias" in option or everything:
            per_channel = "per-channel" in option and gate == "kda"
            call["dt_bias"] = normal(shape.HV * shape.K if per_channel else shape.HV)
        if "lower_bound" in option:
            call["lower_bound"] = -5.0
    if option.startswith("raw-beta") or everything:
        call["use_beta_sigmoid_in_kernel"] = True
        call["beta"] = normal(*call["beta"].shape)
        call["allow_neg_eigval"] = option != "raw-beta"
    if "v-first" in option or everything:
        call["state_v_first"] = True
        if "initial_state" in call:
            call["initial_state"] = np.ascontiguousarray(call["initial_state"].swapaxes(-1, -2))
    if option == "tiled-heads" or everything:
        call["head_order"] = "tiled"
    if packed:
        call["cu_seqlens"] = cu_seqlens(PACKED_LENGTHS)
    if "checkpoints" in option or everything:
        # neither a divisor nor a multiple of a chunk
        call["checkpoint_interval"] = 13
    return call


def alike(k):
    """Keys in the place of random ones that have cosines of about .8."""
    k = 0.5 * k + k[:, :1]
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


LAYOUTS = ["transposed", "reversed", "padded", "fortran", "unaligned", "readonly"]


def relayout(x, layout):
    """Return the same numbers in another memory layout, with NaN between them if there are gaps."""
    if x is None or layout is None:
        return x
    if layout == "transposed":
        return np.ascontiguousarray(x.swapaxes(1, -1)).swapaxes(1, -1)
    if layout == "reversed":
        return np.flip(np.ascontiguousarray(np.flip(x)))
    if layout == "padded":
        wide = np.full([2 * n + 3 for n in x.shape], np.nan).astype(x.dtype)
        view = wide[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
        view[...] = x
        return view
    if layout == "fortran":
        return np.asfortranarray(x)
    if layout == "unaligned":
        memory = np.zeros(x.nbytes + 1, np.uint8)
        view = memory[1:].view(x.dtype).reshape(x.shape)
        view[...] = x
        return view
    if layout == "readonly":
        x = x.copy()
        x.flags.writeable = False
        return x
    raise ValueError(layout)


class Exporter:
    """An array that is known by DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def repeat(x, axis):
    """Return an array with the first number along an axis in the place of all: its stride is 0."""
    if x is None:
        return x
    first = x[tuple(slice(0, 1) if i == axis else slice(None) for i in range(x.ndim))]
    return np.broadcast_to(first, x.shape)


def multiplies_halves(dtype):
    """Whether a test's products are made in 16 bits; replaced by the fixture `device`."""
    return False


def _roots_of_squares(q, k, v, g, beta, S, chunk_size, keep):
    """The reference's loop; in the place of every result it says how large its terms are."""
    decay = np.exp(g)[..., None]
    o, lately, before = np.zeros(v.shape), np.zeros(S.shape), np.zeros(S.shape)
    for t in range(len(v)):
        if t % 16 == 0:
            lately, before = np.zeros(S.shape), lately
        lately, before = lately * decay[t] ** 2, before * decay[t] ** 2
        S = S * decay[t]
        u = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        update = k[t][:, :, None] * u[:, None, :]
        S, lately = S + update, lately + update**2
        squares = S**2 + lately + before
        # both factors are rounded: the state, and q with a gate per channel
        o[t] = np.sqrt(2 * np.einsum("hkv,hk->hv", squares, q[t] ** 2))
        keep(t + 1, np.sqrt(squares))
    return o, np.sqrt(S**2 + lately + before)


def sizes_of_terms(call):
    """The results of the reference, with the sizes of their terms in the place of the sums.

    A product in 16 bits rounds every token's update by itself, and a block of 16 tokens is summed
    up before the next one sees what became of the state. Where keys are alike (of one channel they
    all are), a later update takes away what an earlier one has brought, but not its error: that is
    of the size of the updates of the last 16 to 31 tokens, not of what they leave. Where q is
    orthogonal to k in all tokens, o is that much smaller than the rounded products it is a sum of.
    """
    return naive._rule(_roots_of_squares)(**call)


def assert_matches(
    result, reference, dtype, *, state_dtype=None, hard_gates=False, halves=None, sizes=None
):
    """Compare ``(o, final_state[, checkpoints])`` with the reference, head by head.

    `halves` says whether products were made in 16 bits, if not the test's fixture does; `sizes`, as
    `sizes_of_terms` gives them, are those that errors are then relative to.
    """
    if halves is None:
        halves = multiplies_halves(dtype)
    if state_dtype is None:
        state_dtype = "float64" if dtype == "float64" else "float32"
    assert len(result) == len(reference)
    names = ["o", "final_state", "checkpoints"]
    expected = [dtype, state_dtype, state_dtype]
    for i, (x, ref) in enumerate(zip(result, reference, strict=True)):
        if ref is None:
            assert x is None, names[i]
            continue
        assert x.dtype.name == expected[i], names[i]
        assert x.shape == ref.shape, names[i]
        head_axis = 2 if i == 0 else 1
        least = 0.0
        if sizes is not None:
            heads = np.moveaxis(sizes[i], head_axis, 0)
            least = np.linalg.norm(heads.reshape(len(heads), -1), axis=1)
        error = rel_l2(x, ref, head_axis, least)
        products = dtype if halves else None
        allowed = allowed_error(
            ref, expected[i], head_axis, hard_gates=hard_gates, products=products
        )
        assert error <= allowed, f"{names[i]}: relative error {error:.2e} > {allowed:.2e}"


def assert_same_bits(x, y, message=""):
    """Compare two arrays bit by bit."""
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    assert x.shape == y.shape and x.dtype == y.dtype
    different = np.atleast_1d(x.view(np.uint8) != y.view(np.uint8))
    assert not different.any(), f"{message} {different.sum()} bytes differ"


def use_unit(monkeypatch, unit):
    """Multiply bfloat16 by `FLOATS`, `DOTS` or `SQUARES` until the test ends."""
    from nbdelta import repeat
    from nbdelta.cpu import _matrix_unit, chunk

    if unit == _matrix_unit.SQUARES and _matrix_unit.HAS_TILES:
        if _matrix_unit.unit_of_halves() != unit:
            pytest.skip("the system does not give its matrix unit to this process")
    monkeypatch.setattr(chunk, "unit_of_halves", lambda: unit)
    monkeypatch.setattr(repeat, "_chunk_plans", [])  # calls made for another unit
