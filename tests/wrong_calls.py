"""Wrong calls, made one by one from right ones; run as a program it tries them all on a device.

python tests/wrong_calls.py cpu
python tests/wrong_calls.py sim     # Numba's simulator of a GPU
"""

import inspect
import itertools
import random
import re
import sys

import devices
import numpy as np

# before anything imports numba
DEVICE = sys.argv[1] if __name__ == "__main__" else "cpu"
if reason := devices.prepare(DEVICE):
    sys.exit(reason)

import torch  # noqa: E402

import nbdelta  # noqa: E402

B, T, H, HV, K, V = 2, 5, 2, 4, 6, 3
SLOTS = 7
KDA = ("chunk_kda", "fused_recurrent_kda")
CHUNKED = ("gated_delta_rule", "chunk_gated_delta_rule", "chunk_kda")
RECURRENT = ("fused_recurrent_gated_delta_rule", "fused_recurrent_kda")
RULES = CHUNKED + RECURRENT
BACKWARD = "chunk_gated_delta_rule_bwd"
BLOCKS = ("chunk_local_cumsum", "solve_tril", "solve_triangular", "fused_gate")


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def inputs(name="gated_delta_rule", kind="plain"):
    """Arguments of a call that is right; those of a kind can be made wrong in its own ways."""
    if kind == "bare":  # `out` does not say what the others must be
        return {n: x for n, x in inputs(name).items() if n not in ("out", "A_log", "dt_bias")}
    if name == "chunk_local_cumsum":
        return dict(x=ones(B, T, H), chunk_size=2, out=ones(B, T, H))
    if name == "solve_tril":
        return dict(A=ones(1, T, H, 16), cu_seqlens=np.array([0, 2, T]), out=ones(1, T, H, 16))
    if name == "solve_triangular":
        return dict(L=ones(B, 1, 5, 5), b=ones(3, 5, 2), out=ones(B, 3, 5, 2))
    if name == "fused_gate":
        return dict(x=ones(B, T, HV, K), A_log=ones(HV), dt_bias=ones(HV * K), lower_bound=-5.0)
    b, t = (1, B * T) if kind == "packed" else (B, T)
    a = dict(q=ones(b, t, H, K), k=ones(b, t, H, K), v=ones(b, t, HV, V))
    a.update(g=ones(b, t, HV, K) if name in KDA else ones(b, t, HV), beta=ones(b, t, HV))
    a.update(initial_state=ones(B, HV, K, V), output_final_state=True, out=ones(b, t, HV, V))
    if name == BACKWARD:
        del a["output_final_state"], a["out"]
        a.update(do=ones(b, t, HV, V), dht=ones(B, HV, K, V))
    if kind == "packed":
        a.update(cu_seqlens=np.array([0, 3, b * t]))
    if kind == "gate":
        a.update(use_gate_in_kernel=True, A_log=ones(HV), dt_bias=ones(HV), lower_bound=-5.0)
        a.update(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    if kind in ("pool", "draft"):
        a.update(initial_state=ones(SLOTS, HV, K, V), state_indices=np.array([4, 2]))
    if kind == "draft":
        a.update(state_indices=np.arange(2 * 3).reshape(2, 3), num_accepted_tokens=np.array([1, 3]))
        a.update({n: a[n][:, :3] for n in ("q", "k", "v", "g", "beta")}, out=ones(B, 3, HV, V))
    return a


PER_ROW = ("plain", "packed", "gate")  # a state for each sequence


def kinds(name):
    if name in BLOCKS:
        return ("plain", "bare")
    return (*PER_ROW, *(("pool", "draft") if name in RECURRENT else ()))


# what may be put in the place of an argument, by what it is; every one of them is wrong
NO_ARRAYS = (3, 1.5, "x", b"x", [], {}, object(), (1.0, 2.0), np.float32(1), range(3))
NO_FLAGS = (None, 0, 1, 1.0, "True", [], np.int64(1), np.ones(1, bool))
NO_NUMBERS = ("1", 1j, [1.0], True, np.ones(1), np.inf, float("nan"), np.bool_(True))
NO_COUNTS = (0, -1, 1.0, "16", True, [16], np.ones(1), np.float32(16), 3 + 2j)
WRONG_OPTIONS = {
    "scale": NO_NUMBERS,
    "lower_bound": (*NO_NUMBERS, 0, 0.0, 1.5),
    "head_order": (None, 0, "", "TILED", "interleaved ", b"tiled", ["tiled"], True),
    "precision": (0, "", "HIGHEST", "medium", b"highest", True, ["highest"]),
    "checkpoint_interval": NO_COUNTS,
    "chunk_size": NO_COUNTS,
    "axis": (3, -4, 1.0, None, "1", True, (1,), 2**70),
}
FLAGS = (
    *("output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "allow_neg_eigval"),
    *("use_beta_sigmoid_in_kernel", "state_v_first", "inplace_final_state", "reverse"),
    "unit_diagonal",
)
INDICES = ("cu_seqlens", "state_indices", "num_accepted_tokens")


def wrong_indices(x):
    """Wrong forms of a right index array."""
    first, last = (0,) * x.ndim, (-1,) * x.ndim
    for value in (-2, 99, 2**62, -(2**62)):
        for place in (first, last):
            bad = x.copy()
            bad[place] = value
            yield f"{value} at {place}", bad
    for dtype in (np.float32, bool, complex, object, "U3", ">i8"):
        yield f"in {dtype}", x.astype(dtype)
    for form, bad in (
        ("one less", x[:-1]),
        ("one more", np.concatenate([x, x[-1:] + 1])),
        ("another axis", x[..., None]),
        ("no axis", x[first]),
        ("an int", 3),
        ("a string", "abc"),
        ("floats", x.astype(float).tolist()),
        ("nothing in rows", [[]]),
        ("masked", np.ma.array(x)),
        ("ragged", [[1, 2], [3]]),
        ("huge", [2**80] * len(x)),
    ):
        yield form, bad


def wrong_arrays(name, argument, x):
    """Wrong forms of a right array."""
    for i, bad in enumerate(NO_ARRAYS):
        yield f"no array {i}", bad
    for dtype in (np.int32, np.uint8, bool, complex, object, ">f4", "U3", np.longdouble):
        yield f"in {np.dtype(dtype)}", x.astype(dtype)
    # a dtype that is right by itself, but not here
    if argument in ("k", "v", "out", "b") or (argument == "initial_state" and name not in BLOCKS):
        yield "in float64", x.astype(np.float64)
    yield "masked", np.ma.array(x)
    yield "no axes", x[(0,) * x.ndim].reshape(())[()]
    yield "0-d", np.ones((), np.float32)
    yield "one axis more", x[..., None]
    if x.ndim > 1:
        yield "one axis less", x[0]
        yield "flat", x.reshape(-1)
    for axis in range(x.ndim):
        if not may_vary(name, argument, axis):
            yield f"axis {axis} longer", np.concatenate([x, x], axis)
            yield f"axis {axis} empty", x.take([], axis)
    if argument == "out":
        closed = x.copy()
        closed.flags.writeable = False
        yield "read-only", closed
        yield "one element", np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0,) * x.ndim)
        yield "of torch", torch.from_numpy(x.copy())


def may_vary(name, argument, axis):
    """Whether the axis of this argument alone may have another length."""
    return (argument, axis) in {("v", 3), ("b", 2)} or (
        name == "fused_gate" and argument == "x" and axis < 2
    )


def single_faults():
    """Every way to make one argument of a right call wrong."""
    for name in (*RULES, BACKWARD, *BLOCKS):
        accepted = inspect.signature(getattr(nbdelta, name)).parameters
        for kind in kinds(name):
            right = inputs(name, kind)
            for argument, x in right.items():
                if argument in INDICES:
                    forms = wrong_indices(x)
                elif isinstance(x, np.ndarray):
                    forms = wrong_arrays(name, argument, x)
                    if kind == "bare":
                        forms = (f for f in forms if f[0].startswith(("no", "in", "masked")))
                else:
                    continue
                for form, bad in forms:
                    # a pool may have any number of slots
                    if (argument, form) != ("initial_state", "axis 0 longer") or kind in PER_ROW:
                        yield name, kind, argument, form, bad
            for argument in accepted:
                values = NO_FLAGS if argument in FLAGS else WRONG_OPTIONS.get(argument, ())
                for i, bad in enumerate(values):
                    yield name, kind, argument, f"option {i}", bad


def wrong_calls():
    """Calls with one wrong argument, and as many with two."""
    rng, made = random.Random(0), list(single_faults())
    for name, kind, argument, form, bad in made:
        yield name, kind, f"{argument} {form}", {argument: bad}
    of_a_kind = itertools.groupby(made, key=lambda fault: fault[:2])
    for (name, kind), faults in of_a_kind:
        faults = list(faults)
        for first in faults:
            second = rng.choice(faults)
            where = f"{second[2]} {second[3]}, {first[2]} {first[3]}"
            yield name, kind, where, {second[2]: second[4], first[2]: first[4]}


def place(x):
    """An array where the device reads it; those of indices stay on the host, which checks them."""
    if DEVICE == "cpu" or not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        return x
    return devices.send(x) if x.dtype.kind in "fcV" and x.dtype.isnative else x


def contents(x):
    """The bytes of an array, wherever it is."""
    if isinstance(x, devices.OnDevice):
        return x.memory.copy.copy_to_host().tobytes()
    return x.tobytes() if isinstance(x, np.ndarray) and x.dtype != object else None


def fault_of(name, arguments):
    """Make a wrong call; return what is wrong with how it was refused, or None."""
    before = {n: contents(x) for n, x in arguments.items()}
    function = getattr(nbdelta, name)
    known = inspect.signature(function).parameters
    try:
        function(**arguments)
        return "returned"
    except (ValueError, TypeError) as error:
        named = re.match(r"(\w+): ", str(error))
        devices_differ = DEVICE != "cpu" and str(error).startswith("all arrays must be on one")
        if not devices_differ and (not named or named[1] not in known):
            return f"names no argument: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    changed = [n for n, x in arguments.items() if contents(x) != before[n]]
    return f"wrote to {', '.join(changed)}" if changed else None


def main():
    """Try all of them; print how many there were, or what is wrong with some."""
    count, faults = 0, []
    for name, kind, where, changes in wrong_calls():
        arguments = {n: place(x) for n, x in (inputs(name, kind) | changes).items()}
        fault = fault_of(name, arguments)
        count += 1
        if fault:
            faults.append(f"{name} ({kind}), {where}: {fault}")
    print("\n".join(faults[:30]) if faults else count)
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
