"""``python -m nbdelta check``: every function against the float64 reference on this machine."""

import functools
import importlib.util
from dataclasses import dataclass

import numpy as np

import nbdelta
from nbdelta import console as out
from nbdelta import naive
from nbdelta.dispatch import rejection_reason, stage
from nbdelta.testing import MIXED_GATES, allowed_error, as_dtype, make_inputs, rel_l2

_RULES = (
    "gated_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_kda",
)
_DTYPES, _PARTS = ("float32", "float64", "float16", "bfloat16"), ("gda", "kda", "blocks")
_SIZES = {"B": 2, "T": 130, "H": 2, "HV": 4, "K": 96, "V": 60}
_LENGTHS = np.array([0, 1, 65, 0, 64])
_OPTIONS = (
    *("plain", "no gate, no beta", "l2norm, states", "packed", "tiled, state v first"),
    *("raw gate, raw beta", "bounded raw gate", "checkpoints"),
)
_POOLED = ("pool, in place", "speculative")
_HARD = (*(f"gate {gate:g}" for gate in (0.0, *MIXED_GATES[-4:])), "gates mixed")


_TRAINED = ("plain", "l2norm, states", "packed", "raw gate, raw beta")
# of gradients, the second of those of g and beta: sums over products of a row
_GRADIENT_BOUNDS = {"float64": (1e-13, 1e-13), "float32": (5e-6, 5e-6)}
_HALF_GRADIENT_BOUNDS = (0.008, 0.02)


@dataclass
class _Row:
    """The worst of some calls: error and bound of the call with the largest ratio of the two."""

    function: str
    gate: str
    dtype: str
    cases: str
    count: int = 0
    error: float = 0.0
    bound: float = 1.0
    worst: str = ""
    good: bool = True

    def add(self, case, error, bound):
        self.count += 1
        good = error <= bound  # False for NaN
        # the first miss stays, before it the largest part of the bound that is used up
        if self.good and not error / bound < self.error / self.bound:
            self.error, self.bound, self.worst = error, bound, case
        self.good = self.good and good


def check(device="cpu", seed=0):
    """Print the table of errors.

    Parameters
    ----------
    device : str
        Where the kernels run.
    seed : int
        Seed of the inputs.

    Returns
    -------
    int
        0, or 1 when an error is above its bound, or 2 when the device cannot be served.
    """
    console = out.console("check")
    reason = rejection_reason("cuda:0" if device == "cuda" else device)
    if reason is not None:
        console.print(out.plain(f"check: {device} cannot be checked: {reason}"))
        return 2
    dtypes = _DTYPES
    if importlib.util.find_spec("ml_dtypes") is None:
        dtypes = [dtype for dtype in dtypes if dtype != "bfloat16"]
        console.print("bfloat16 is left out: it needs ml_dtypes")
    rows = []
    jobs = [(part, dtype) for dtype in dtypes for part in _PARTS]
    with out.progress(console, len(jobs)) as step:
        for part, dtype in jobs:
            step(f"{part.upper() if part != 'blocks' else 'building blocks'}, {dtype}", 0)
            check = _check_blocks if part == "blocks" else functools.partial(_check_rules, part)
            rows.extend(check(dtype, seed, device))
            step("")
    table = out.table(
        "relative L2 error against float64, the worst head",
        *("function", "gate", "dtype", "calls", ">n", ">error", ">bound", "", "worst call"),
    )
    for row in rows:
        table.add_row(
            *(row.function, row.gate, row.dtype, row.cases, str(row.count)),
            *(f"{row.error:.1e}", f"{row.bound:.1e}", out.verdict(row.good)),
            out.plain(row.worst),
        )
    console.print(table)
    missed = sum(not row.good for row in rows)
    calls = sum(row.count for row in rows)
    console.print(
        f"[bold red]{missed} of {len(rows)} rows miss their bound[/]"
        if missed
        else f"[green]all {calls} calls within their bounds[/]"
    )
    return 1 if missed else 0


def caller_on(device):
    """Return ``call(name, *args, **kwargs)``, a public function of NumPy arrays on a device."""
    if device == "cpu":
        return lambda name, *args, **kwargs: getattr(nbdelta, name)(*args, **kwargs)
    from nbdelta.cuda._arrays import fetch, send

    def sent(x):
        # small arrays of integers may stay: they are checked then
        numbers = isinstance(x, np.ndarray) and x.dtype.kind not in "iu"
        return send(x) if numbers else x

    def fetched(x):
        return x if x is None else fetch(x)

    def call(name, *args, **kwargs):
        there = {key: sent(x) for key, x in kwargs.items()}
        result = getattr(nbdelta, name)(*map(sent, args), **there)
        return tuple(map(fetched, result)) if isinstance(result, tuple) else fetched(result)

    return call


def _check_rules(gate, dtype, seed, device):
    rows, call = {}, caller_on(device)
    for cases in (_OPTIONS, _POOLED, _HARD):
        hard = cases is _HARD
        for case in cases:
            arguments = _arguments(case, gate, dtype, seed)
            reference = None
            for name in _RULES:
                kda = name.endswith("kda")
                if (kda and (gate == "gda" or arguments["g"] is None)) or (
                    cases is _POOLED and "recurrent" not in name
                ):
                    continue
                # all forms have one result, so one reference, token by token, serves them all
                if reference is None:
                    reference = naive.fused_recurrent_gated_delta_rule(**arguments)
                key = name, hard
                if key not in rows:
                    kind = "gates 0 to -inf" if hard else "options"
                    rows[key] = _Row(name, gate.upper(), dtype, kind)
                try:
                    result = call(name, **_own_pool(arguments))
                except Exception as error:  # a function that fails is a row, not the end of it
                    rows[key].add(f"{case}: {type(error).__name__}: {error}", np.inf, 1.0)
                else:
                    halves = stage("chunk", device).multiplies_halves(dtype)
                    products = dtype if halves and "recurrent" not in name else None
                    _compare(rows[key], case, result, reference, dtype, hard, products)
    in_order = sorted(rows.values(), key=lambda row: (_RULES.index(row.function), row.cases))
    return [*in_order, _check_gradients(gate, dtype, seed, device)]


def _check_gradients(gate, dtype, seed, device):
    name, call = "chunk_gated_delta_rule_bwd", caller_on(device)
    row = _Row(name, gate.upper(), dtype, "options")
    rng = np.random.default_rng(seed + 2)
    # more channels of float64 do not fit into the shared memory of smaller GPUs
    most = {"K": min(_SIZES["K"], 64)} if dtype == "float64" else {}
    for case in _TRAINED:
        arguments = _arguments(case, gate, dtype, seed, **most)
        o, state = naive.gated_delta_rule(**arguments)
        del arguments["output_final_state"]
        state_dtype = "float64" if dtype == "float64" else "float32"
        arguments["do"] = as_dtype(rng.standard_normal(o.shape), dtype)
        arguments["dht"] = as_dtype(rng.standard_normal(state.shape), state_dtype)
        references = getattr(naive, name)(**arguments)
        try:
            gradients = call(name, **arguments)
        except Exception as error:
            row.add(f"{case}: {type(error).__name__}: {error}", np.inf, 1.0)
            continue
        for i, (x, reference) in enumerate(zip(gradients, references, strict=True)):
            if reference is not None:
                # q, k, v, g, beta, state, A_log, dt_bias
                # with float64 inputs, gates in float32 get float32 gradients
                kind = x.dtype.name if dtype == "float64" else dtype
                bounds = _GRADIENT_BOUNDS.get(kind, _HALF_GRADIENT_BOUNDS)
                error = np.linalg.norm(np.asarray(x, np.float64) - reference)
                row.add(case, error / np.linalg.norm(reference), bounds[i in (3, 4, 6, 7)])
    return row


def _own_pool(arguments):
    """Copy what a call changes in place."""
    if "state_indices" not in arguments:
        return arguments
    return {**arguments, "initial_state": arguments["initial_state"].copy()}


def _compare(row, case, result, reference, dtype, hard, products):
    state_dtype = "float64" if dtype == "float64" else "float32"
    for i, (x, ref) in enumerate(zip(result, reference, strict=True)):
        kind, axis = (dtype, 2) if i == 0 else (state_dtype, 1)
        bound = allowed_error(ref, kind, axis, hard_gates=hard, products=products)
        row.add(case, rel_l2(x, ref, axis), bound)


def _arguments(case, gate, dtype, seed, **sizes):
    """Return the keyword arguments of one call, with `_SIZES` but for those that are given."""
    sizes = {**_SIZES, **sizes}
    states, log_decay = None, None
    if case in ("packed", "speculative"):
        sizes.update(B=1, T=int(_LENGTHS.sum()) if case == "packed" else 6)
    if case == "pool, in place":
        sizes.update(T=1)
    if case == "gates mixed":
        log_decay = "mixed"
    elif case.startswith("gate "):
        log_decay = float(case.removeprefix("gate "))
    if "state" in case or case == "packed" or case in _HARD:
        states = len(_LENGTHS) if case == "packed" else sizes["B"]
    if case in _POOLED:
        states = 9
    call = make_inputs(seed, **sizes, gate=gate, dtype=dtype, log_decay=log_decay, states=states)
    call["output_final_state"] = True
    rng = np.random.default_rng(seed + 1)
    HV, K = sizes["HV"], sizes["K"]
    if case == "no gate, no beta":
        # without decay and with full strength the rule forgets nothing: short keeps it readable
        call["g"] = call["beta"] = None
    elif case == "l2norm, states":
        call["use_qk_l2norm_in_kernel"] = True
        call["k"] = as_dtype(3 * rng.standard_normal(call["k"].shape), dtype)
    elif case == "packed":
        call["cu_seqlens"] = np.concatenate([[0], np.cumsum(_LENGTHS)])
    elif case == "tiled, state v first":
        call.update(head_order="tiled", state_v_first=True, scale=0.3)
        call["initial_state"] = call["initial_state"].swapaxes(-1, -2)
    elif "raw gate" in case:
        call["g"] = rng.standard_normal(call["g"].shape).astype(np.float32) - np.float32(2)
        call["use_gate_in_kernel"] = True
        call["A_log"] = rng.standard_normal(HV).astype(np.float32)
        call["dt_bias"] = rng.standard_normal(HV if gate == "gda" else HV * K).astype(np.float32)
        if case == "bounded raw gate":
            call["lower_bound"] = -5.0
        else:
            call["beta"] = rng.standard_normal(call["beta"].shape).astype(np.float32)
            call.update(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    elif case == "checkpoints":
        call["checkpoint_interval"] = 13
    elif case == "pool, in place":
        call["state_indices"] = np.array([5, -1])
    elif case == "speculative":
        call["cu_seqlens"] = np.array([0, 3, 6])
        call["state_indices"] = np.array([[5, 1, 3], [0, 7, -1]])
        call["num_accepted_tokens"] = np.array([2, 1])
    return call


def _check_blocks(dtype, seed, device):
    call = caller_on(device)
    rng = np.random.default_rng(seed)
    real = "float64" if dtype == "float64" else "float32"
    rows = []

    def add(name, case, out_dtype, x, reference):
        if not rows or rows[-1].function != name:
            rows.append(_Row(name, "", dtype, "options"))
        bound = allowed_error(reference, out_dtype, 0)
        rows[-1].add(case, rel_l2(x, reference, 0), bound)

    # heads first: `rel_l2` looks at each of them apart
    x = as_dtype(rng.standard_normal((3, 130, 4, 20)), dtype)
    for reverse in (False, True):
        for axis in (1, -1):
            arguments = {"chunk_size": 48, "axis": axis, "reverse": reverse, "scale": 0.5}
            got = call("chunk_local_cumsum", x, **arguments)
            case = f"axis {axis}{', reverse' if reverse else ''}"
            add(
                "chunk_local_cumsum", case, "float32", got, naive.chunk_local_cumsum(x, **arguments)
            )
    for BT in (16, 32, 64):
        A = as_dtype(rng.standard_normal((1, 130, 4, BT)) / BT, dtype)
        got, reference = call("solve_tril", A), naive.solve_tril(A)
        add("solve_tril", f"BT {BT}", dtype, got.swapaxes(0, 2), reference.swapaxes(0, 2))
    for n, m in ((64, 64), (33, 7), (1, 1)):
        L = as_dtype(rng.standard_normal((3, n, n)) / n + 2 * np.eye(n), dtype)
        b = as_dtype(rng.standard_normal((3, n, m)), dtype)
        for unit in (False, True):
            got = call("solve_triangular", L, b, unit_diagonal=unit)
            reference = naive.solve_triangular(L, b, unit_diagonal=unit)
            case = f"{n} x {n}, {m} columns{', unit diagonal' if unit else ''}"
            add("solve_triangular", case, dtype, got, reference)
    A_log, dt_bias = (rng.standard_normal(4).astype(np.float32) for _ in range(2))
    for bound in (None, -5.0):
        for raw, case in ((x[..., 0], "per head"), (x, "per channel")):
            got = call("fused_gate", raw, A_log, dt_bias, lower_bound=bound)
            reference = naive.fused_gate(raw, A_log, dt_bias, lower_bound=bound)
            add("fused_gate", case + (", bounded" if bound else ""), real, got, reference)
    return rows
