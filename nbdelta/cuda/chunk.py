"""Chunked gated delta rule on tensor cores: a kernel over all chunks, then one over the sequences.

Both multiply numbers of 16 bits and add in float32. What is float32, or is to be treated as such
(``precision="highest"``), is multiplied as the sum of two or three such numbers ("planes").
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

from nbdelta.arrays import empty
from nbdelta.cuda._call import KEY, LENGTH, VALUE, Q, describe, put_array
from nbdelta.cuda._chunk_form import (
    KEY_PLANE,
    PER_SEGMENT,
    RECORDS,
    SEGMENT,
    TILES,
    VALUE_PLANE,
    Form,
    count_chunks,
)
from nbdelta.cuda._chunk_intra import intra_kernel
from nbdelta.cuda._chunk_intra import layout as intra_layout
from nbdelta.cuda._chunk_pack import LENGTH as PACK_LENGTH
from nbdelta.cuda._chunk_pack import pack, pack_kernel, turn_kernel
from nbdelta.cuda._chunk_scan import Layout, scan_kernel
from nbdelta.cuda._jit import SIMULATOR, device_limits, place_of
from nbdelta.cuda.recurrent import token_by_token

# planes of the inputs and of everything computed
PLANES = {
    ("bfloat16", None): ("bf16", 1, 1),
    ("float16", None): ("f16", 1, 1),
    ("bfloat16", "highest"): ("bf16", 1, 2),
    # bfloat16 has the wider range: what is computed may be larger than any float16
    ("float16", "highest"): ("bf16", 2, 2),
    ("float32", None): ("bf16", 3, 3),
    ("float32", "highest"): ("bf16", 3, 3),
}
MAX_K = 256


class Variant(NamedTuple):
    """How the kernels are cut for a problem and a device."""

    form: Form
    columns: int  # of V in a block of the scan: 16, 32 or 64
    stages: int  # of tiles in shared memory: 2 or 3


@lru_cache(1024)
def pick_variant(dtype, precision, K, V, per_channel, chunk_size, heads, shared, processors):
    """Choose by what fits into shared memory and how many blocks there are.

    Parameters
    ----------
    dtype, precision, K, V, per_channel, chunk_size
        Of the problem.
    heads : int
        Value heads of all sequences.
    shared, processors : int
        Bytes of shared memory for a block, and multiprocessors, of the device.

    Returns
    -------
    Variant or None
        None: the problem is for the token-by-token kernel.
    """
    if (dtype, precision) not in PLANES or K > MAX_K:
        return None
    kind, inputs, planes = PLANES[dtype, precision]
    padded = 64 if K <= 64 else 128 if K <= 128 else 256
    # by registers
    longest = min(chunk_size or 64, 32 if padded == 256 and planes > 1 else 64)
    narrowest = 32 if padded == 256 and planes == 3 else 16

    def variant(tokens, columns):
        form = Form(kind, inputs, planes, padded, tokens, per_channel)
        if tokens <= longest and intra_layout(form)[-1] <= shared:
            for stages in (3, 2):
                if Layout(form, columns, stages).end <= shared:
                    return Variant(form, columns, stages)
        return None

    # The length of a chunk shows in the last bits of the results, the width of a slice does not:
    # the length must not depend on how many heads or sequences there are.
    usual = 32 if V > 16 else narrowest
    found = [variant(*pair[::-1]) for pair in product((usual, narrowest), (64, 32, 16))]
    chosen = next((x for x in found if x is not None), None)
    if chosen is None or chosen.columns < 32 or V <= 32:
        return chosen
    # wide slices read K and Q less often, narrow ones spread over more multiprocessors
    wider = variant(chosen.form.tokens, 64)
    enough = 8 * heads * -(-V // 64) >= 7 * processors
    return wider if wider is not None and enough else chosen


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of what is launched.

    All kinds of products, gates, head sizes and devices, and the widest slices; not every
    combination with the dtype of a gate, a state or o, which change a few loads and stores.
    """
    usual = [("bfloat16", None, 128), ("float32", None, 128)]
    rules = [(*rule, 1, kilobytes) for kilobytes in (227, 163, 99) for rule in usual]
    rules += [(*rule, 9999, 227) for rule in usual]
    rules += [(*rule, K, 1, 227) for rule in PLANES for K in (64, 128, 256)]
    seen = set()
    for (dtype, precision, K, heads, kilobytes), per_channel in product(rules, (False, True)):
        shared = kilobytes * 1024
        variant = pick_variant(dtype, precision, K, 128, per_channel, None, heads, shared, 132)
        if variant is None:
            continue
        form, columns, stages = variant
        words = (dtype, precision, "K", str(K), "kda" if per_channel else "gda")
        name = f"{' '.join(filter(None, words))}, {kilobytes} KB"
        intra = intra_kernel(form, "float32", False)
        scan = scan_kernel(form, columns, stages, "float32", dtype, dtype != "float32")
        for found in (
            (f"chunk intra {name}", intra, LENGTH, intra_layout(form)[-1]),
            (f"chunk scan {name}, V {columns}", scan, LENGTH, Layout(form, columns, stages).end),
        ):
            if found[1] not in seen:
                seen.add(found[1])
                yield found
    for dtype, kind, planes in (
        *(("float32", "bf16", 3), ("float16", "f16", 1), ("bfloat16", "bf16", 1)),
    ):
        for wide, name in ((False, ""), (True, ", wide")):
            kernel = pack_kernel(dtype, kind, planes, wide)
            yield f"chunk pack {dtype}{name}", kernel, PACK_LENGTH, 0
        yield f"chunk pack {dtype}, turned", turn_kernel(dtype, kind, planes), PACK_LENGTH, 0


DTYPES = {"bf16": "bfloat16", "f16": "float16"}


def _direct(x, kind):
    """Whether rows of an array can be fetched as they lie: 16 aligned bytes at a time."""
    return (
        x.dtype == DTYPES[kind]
        and x.strides[3] == 2
        and x.shape[3] % 8 == 0
        and all(n % 16 == 0 for n in (x.address, *x.strides[:3]))
    )


def multiplies_halves(dtype):
    """Whether q, k and v of a dtype are multiplied in 16 bits unless `precision` forbids it."""
    return dtype in ("bfloat16", "float16")


def chunk_gated_delta_rule(problem, min_length=0):
    """Fill the outputs of a problem by the chunked algorithm.

    Parameters
    ----------
    problem : Problem
        A checked call with its outputs.
    min_length : int
        Sequences with fewer tokens are left alone.
    """
    p = problem
    place = place_of(p.q)
    limits = device_limits(place[0])
    # the simulator's threads are slow, and a short chunk has few
    chunk_size = 16 if SIMULATOR else p.chunk_size
    variant = pick_variant(
        p.q.dtype, p.precision, p.K, p.V, p.per_channel, chunk_size, p.N * p.HV,
        limits.shared, limits.processors,
    )  # fmt: skip
    if variant is None:
        # float64, heads wider than MAX_K, or planes that do not fit
        token_by_token(p, min_length, None)
        return
    form, columns, stages = variant
    desc = describe(p, min_length=min_length)
    held = []  # what the kernels work on, until they are launched
    for field, plane, x, padded in (
        (Q, KEY_PLANE, p.q, form.K),
        (KEY, KEY_PLANE, p.k, form.K),
        (VALUE, VALUE_PLANE, p.v, -(-p.V // 8) * 8),
    ):
        if form.inputs > 1 or not _direct(x, form.kind):
            x, desc[plane] = pack(x, form.kind, form.inputs, padded, place, limits.processors)
            put_array(desc, field, x)
            held.append(x)
    segment, per_segment = form.tokens, 1
    if p.checkpoint_interval % form.tokens:
        segment, per_segment = p.checkpoint_interval, -(-p.checkpoint_interval // form.tokens)
    chunks = count_chunks(p.T, p.N, segment, per_segment, p.cu_seqlens is not None)
    desc[SEGMENT], desc[PER_SEGMENT] = segment, per_segment
    records = empty(p.q, (chunks * p.HV, form.record), "uint8")
    tiles = empty(p.q, (chunks * p.HV, 3 * form.tile * form.per_channel), "uint8")
    desc[RECORDS], desc[TILES] = records.address, tiles.address

    views = (p.beta, p.A_log, p.dt_bias)
    wide = any(x is not None and x.dtype == "float64" for x in views)
    intra = intra_kernel(form, None if p.g is None else p.g.dtype, wide)
    intra.launch((chunks * p.HV, 1, 1), desc, place, shared=intra_layout(form)[-1])

    state = next(
        (x for x in (p.initial_state, p.final_state, p.checkpoints) if x is not None), None
    )
    out = p.o
    out_rows = out.dtype == DTYPES[form.kind] and out.strides[3] == 2 and p.V % 16 == 0
    out_rows = out_rows and all(n % 8 == 0 for n in (out.address, *out.strides[:3]))
    scan = scan_kernel(
        form, columns, stages, "float32" if state is None else state.dtype, out.dtype,
        out_rows,
    )  # fmt: skip
    blocks = p.N * p.HV * -(-p.V // columns)
    scan.launch((blocks, 1, 1), desc, place, shared=Layout(form, columns, stages).end)
