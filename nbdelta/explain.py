"""``python -m nbdelta explain``: what a layer has to do, what it takes, and where the time goes."""

import functools

import nbdelta
from nbdelta import bench_clock as clock
from nbdelta import console as out
from nbdelta.cpu._team import thread_count
from nbdelta.cpu._vector_unit import W
from nbdelta.shapes import LAYERS
from nbdelta.testing import make_inputs

SECONDS = 2.0


def explain(name, B, T):
    """Print work, limits, times and stages of a layer.

    Parameters
    ----------
    name : str
        A layer of `nbdelta.shapes.LAYERS`.
    B, T : int
        Sequences and their tokens; one token is a decode step.

    Returns
    -------
    int
        0.
    """
    console = out.console("explain")
    out.need("threadpoolctl", "explain")
    # compiled and imported here: the other commands do not need it
    from nbdelta.explain_clock import STAGES, clocked_call

    shape = LAYERS[name].shape(B, T)
    inputs = make_inputs(0, *shape[1:], gate=shape.gate, states=B)
    call = _public_call(inputs, prefill=T > 1)
    limit = clock.MatrixProduct() if T > 1 else clock.Multiply(shape.state_size)
    clocked = clocked_call(inputs, prefill=T > 1)
    clocks = []
    # the real kernel beside the one with clocks, on one thread; on all threads the real one
    alone = {"call": call, "limit": limit, "clocked": lambda: clocks.append(clocked())}
    times = {}
    counts = sorted({1, thread_count()})
    with out.progress(console, len(counts)) as step:
        for count in counts:
            step(f"{count} thread{'s' if count > 1 else ''}", 0)
            calls = alone if count == 1 else {"call": call, "limit": limit}
            with clock.limited_to(count, "explain"):
                times[count] = clock.race(calls, SECONDS)
            step("")
    console.print(out.plain(_title(name, shape)))
    console.print(_limits(shape, limit, times))
    whole = 1e3 * times[1]["call"].min
    stages = dict(zip(STAGES, _quickest(clocks), strict=True))
    peak = limit.flops / times[1]["limit"].min if T > 1 else None
    console.print(_stages(shape, stages, whole, peak))
    slower = times[1]["clocked"].min / times[1]["call"].min - 1
    console.print(
        "Stages: the kernel with two readings of the processor's clock around each, on one "
        f"thread, {100 * slower:+.1f} % slower for it; the quickest of {len(clocks)} calls, as "
        "parts of the least time without clocks. The rest lies between the stages, and in Python."
    )
    return 0


def _quickest(clocks):
    """Return the parts of the quickest call.

    One whose thread went from a core to another one, whose clock was behind, may have parts below
    zero or beyond the whole: it counts only if there is no other.
    """
    usable = [(ticks, parts) for ticks, parts in clocks if min(parts) >= 0 and sum(parts) <= 1]
    return min(usable or clocks)[1]


def _public_call(inputs, prefill):
    if prefill:
        return functools.partial(
            nbdelta.chunk_gated_delta_rule,
            **inputs,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    inputs = {**inputs, "initial_state": inputs["initial_state"].copy()}
    return functools.partial(
        nbdelta.fused_recurrent_gated_delta_rule,
        **inputs,
        inplace_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def _title(name, shape):
    moved = shape.token_bytes() + 2 * 4 * shape.state_size
    return (
        f"{name}, {shape.gate.upper()}, {shape.H} key heads of {shape.K}, {shape.HV} value heads "
        f"of {shape.V}, B = {shape.B}, T = {shape.T}, float32\n"
        f"products with the state {shape.flops / 1e9:.3g} GFLOP; inputs, output and states "
        f"{moved / 2**20:.4g} MB, of which states {2 * 4 * shape.state_size / 2**20:.4g} MB"
    )


def _limits(shape, limit, times):
    """Return the table of floors and times by number of threads."""
    prefill = shape.T > 1
    title = "NumPy's matrix product" if prefill else "a multiply in place of the states"
    speed = ">GFLOP/s" if prefill else ">GB/s of states"
    table = out.table(
        f"floor: {title}",
        *(">threads", f"{speed}, limit", ">floor ms", ">measured ms", ">time / floor", speed),
    )
    work = shape.flops if prefill else 2 * 4 * shape.state_size
    for count, found in times.items():
        of_limit = limit.flops if prefill else limit.bytes
        floor, best = work / of_limit * found["limit"].min, found["call"].min
        table.add_row(
            *(str(count), f"{of_limit / found['limit'].min / 1e9:.1f}", f"{1e3 * floor:.3f}"),
            *(f"{1e3 * best:.3f}", f"{best / floor:.2f}", f"{work / best / 1e9:.1f}"),
        )
    return table


def _stages(shape, stages, whole, peak):
    """Return the table of stages; what one takes beyond its own flops is what could be won."""
    columns = ["stage", ">ms", ">%"]
    if peak:
        columns += [">GFLOP", ">GFLOP/s", ">ms over peak"]
    table = out.table("where the time goes, one thread", *columns)
    flops = _flops(shape)
    for name, share in stages.items():
        ms = share * whole
        if not ms:  # of the other kernel
            continue
        row = [name, f"{ms:.3f}", f"{100 * share:.1f}"]
        if peak:
            work = flops.get(name, 0)
            row += [f"{work / 1e9:.3g}", f"{work / ms / 1e6:.1f}"] if work else ["", ""]
            row.append(f"{ms - 1e3 * work / peak:.3f}")
        table.add_row(*map(out.plain, row))
    rest = 1 - sum(stages.values())
    table.add_row("the rest", f"{rest * whole:.3f}", f"{100 * rest:.1f}", *[""] * (3 * bool(peak)))
    table.add_row("all", f"{whole:.3f}", "100", *[""] * (3 * bool(peak)))
    return table


def _flops(shape):
    """Flops that a stage of the prefill cannot do without, blocks of W tokens, triangles halved."""
    tokens, K, V = shape.B * shape.T, shape.K, shape.V
    product, triangle = 2 * K * V * shape.HV * tokens, (W + 1) * V * shape.HV * tokens
    # with a gate per channel every pair of tokens and channel has a decay of its own
    heads, each = (shape.HV, 5) if shape.gate == "kda" else (shape.H, 4)
    return {
        "U = (I + A)^-1 (beta V - beta e^G K S)": product + triangle,
        "O = scale (e^G Q S + P U)": product + triangle,
        "S = e^G_last S + (K e^(G_last - G))^T U": product,
        "Gram matrices k.k and q.k": each * K * (W + 1) // 2 * heads * tokens,
    }
