"""Gradients of the chunked gated delta rule (docs/design.md derives them), in float32 or float64.

The states at the starts of chunks of 64 tokens come from the forward pass. Kernels over all chunks
at once alternate with the one that goes through the sequences from their ends:

    pairs      norms, effective betas, M and P of every block of 16 tokens        _backward_products
    errors     E of every chunk, from its state                                   _backward_scan
    scan       dS at the end of every chunk, dU, and so dV; the gradient of h0    _backward_scan
    weights    products of U with dO and Y for all pairs of a chunk; dbeta        _backward_products
    reads      products of tokens with S and dS                                   _backward_reads
    channels   gradients of q, k and the gate of every value head                 _backward_channels
    heads, gates, shares   their sums, through norms and gates                    _backward_finish

No sum is shared out by chance, so that every gradient has the same bits in every run.
"""

import numpy as np

from nbdelta.arrays import empty
from nbdelta.cuda._backward_call import (
    BACKWARD_LENGTH,
    BLOCK,
    BLOCKS,
    CHUNK,
    DERRORS,
    DSTATES,
    ERRORS,
    FACTORS,
    GRADIENTS,
    KEPT,
    PAIRS,
    RAW_G,
    READS_K,
    READS_Q,
    SHARES,
    WEIGHTS,
    WRITES,
)
from nbdelta.cuda._backward_channels import channels_bytes, channels_kernel
from nbdelta.cuda._backward_finish import THREADS, WARPS, gates_kernel, heads_kernel, shares_kernel
from nbdelta.cuda._backward_products import (
    pairs_bytes,
    pairs_kernel,
    weights_bytes,
    weights_kernel,
)
from nbdelta.cuda._backward_reads import reads_bytes, reads_kernel
from nbdelta.cuda._backward_scan import errors_kernel, scan_kernel
from nbdelta.cuda._backward_state import COLUMNS, shared_bytes
from nbdelta.cuda._call import KEY, LENGTH, VALUE, G, Q, describe, put_array
from nbdelta.cuda._chunk_form import PER_SEGMENT, SEGMENT, count_chunks
from nbdelta.cuda._chunk_pack import with_channels_side_by_side
from nbdelta.cuda._jit import device_limits, place_of
from nbdelta.cuda._kept_states import clear_unused_states as clear_unused_states
from nbdelta.cuda._kept_states import specialisations as of_kept_states
from nbdelta.cuda._memory import real_of
from nbdelta.cuda.gate import decays


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of what is launched.

    In float32, which has the most planes, and in bfloat16, with what differs then; not every dtype
    of do, which changes a few loads. In float64, where speed is not the point, the scan and the
    channels spill a few registers.
    """
    dtype, gate, do = "float32", "channel", "float32"
    for name, kernel, shared in (
        ("pairs, K 64", pairs_kernel(dtype, gate, 64, False), pairs_bytes(dtype, 64)),
        ("pairs, K 256", pairs_kernel(dtype, gate, 256, False), pairs_bytes(dtype, 256)),
        ("errors, K 64", errors_kernel(dtype, gate, 64, False), shared_bytes(dtype, 64, 2)),
        ("errors, K 256", errors_kernel(dtype, gate, 256, False), shared_bytes(dtype, 256, 2)),
        ("scan, K 64", scan_kernel(dtype, gate, do, 64, False), shared_bytes(dtype, 64, 3)),
        ("scan, K 128", scan_kernel(dtype, gate, do, 128, False), shared_bytes(dtype, 128, 3)),
        ("scan, K 256", scan_kernel(dtype, gate, do, 256, False), shared_bytes(dtype, 256, 3)),
        ("weights", weights_kernel(dtype, do, False), weights_bytes(dtype)),
        ("reads, K 64", reads_kernel(dtype, do, 64, False), reads_bytes(dtype, 64)),
        ("reads, K 128", reads_kernel(dtype, do, 128, False), reads_bytes(dtype, 128)),
        ("reads, K 256", reads_kernel(dtype, do, 256, False), reads_bytes(dtype, 256)),
        ("channels, K 64", channels_kernel(dtype, gate, 64), channels_bytes(dtype, 64)),
        ("channels, K 256", channels_kernel(dtype, gate, 256), channels_bytes(dtype, 256)),
        ("heads, K 256", heads_kernel(dtype, 256), 0),
        ("gates", gates_kernel(real_of(dtype), True, False), 0),
        ("shares", shares_kernel(real_of(dtype), False), 0),
    ):
        yield f"backward {name}", kernel, BACKWARD_LENGTH, shared
    dtype, gate = "bfloat16", "head"
    for name, kernel, shared in (
        ("errors, bfloat16", errors_kernel(dtype, gate, 128, False), shared_bytes(dtype, 128, 2)),
        (
            "scan, bfloat16",
            scan_kernel(dtype, gate, dtype, 128, False),
            shared_bytes(dtype, 128, 3),
        ),
        ("channels, bfloat16", channels_kernel(dtype, gate, 128), channels_bytes(dtype, 128)),
        ("reads, bfloat16", reads_kernel(dtype, dtype, 128, False), reads_bytes(dtype, 128)),
    ):
        yield f"backward {name}", kernel, BACKWARD_LENGTH, shared
    yield from of_kept_states()


def _decays(p, real):
    """The decay of every token, and channel if gates have them."""
    if p.g is None:
        return None
    out = empty(p.q, p.g.shape, real)
    decays(p, out)
    return out


def room_for_rows(tokens, K, V, dtype):
    """Return how many states more than `CHUNK` says are kept: none."""
    return 0


def _expect_room(p, KP, index):
    """Raise where a device has too little shared memory: for float64, 99 KB hold 64 channels."""
    dtype, room = p.q.dtype, device_limits(index).shared
    needed = max(
        pairs_bytes(dtype, KP), shared_bytes(dtype, KP, 3), weights_bytes(dtype),
        reads_bytes(dtype, KP), channels_bytes(dtype, KP),
    )  # fmt: skip
    if needed > room:
        raise ValueError(
            f"q: gradients in {dtype} with K = {p.K} need {needed} bytes of shared memory a block, "
            f"{p.q.device} has {room}; float32 needs half"
        )


def chunk_gated_delta_rule_bwd(gradients):
    """Fill the gradients of a problem.

    Parameters
    ----------
    gradients : Gradients
        A checked call, with what the forward pass kept.

    Raises
    ------
    ValueError
        Where the device has too little shared memory for float64.
    """
    grads, p = gradients, gradients.problem
    place, dtype, REAL = place_of(p.q), p.q.dtype, real_of(p.q.dtype)
    real = str(REAL)
    KP = 64 if p.K <= 64 else 128 if p.K <= 128 else 256
    _expect_room(p, KP, place[0])
    chunks = count_chunks(p.T, p.N, CHUNK, 1, p.cu_seqlens is not None)
    desc = np.zeros(BACKWARD_LENGTH, np.int64)
    desc[:LENGTH] = describe(p, np.dtype(real))
    desc[SEGMENT], desc[PER_SEGMENT] = CHUNK, 1
    arrays = {
        field: with_channels_side_by_side(x, place)
        for field, x in ((Q, p.q), (KEY, p.k), (VALUE, p.v))
    }
    of_tokens = {
        FACTORS: 4, PAIRS: 2 * BLOCK, ERRORS: p.V, DERRORS: p.V, READS_Q: p.K, READS_K: p.K,
        WRITES: p.K,
    }  # fmt: skip
    arrays.update(zip(GRADIENTS, grads.arrays()))
    arrays[RAW_G], arrays[G] = p.g, _decays(p, real)
    for index, numbers in of_tokens.items():
        arrays[index] = empty(p.q, (p.B, p.T, p.HV, numbers), real)
    arrays[DSTATES] = empty(p.q, (chunks, p.HV, p.K, p.V), real)
    arrays[WEIGHTS] = empty(p.q, (chunks, p.HV, 2 * CHUNK, CHUNK), real)
    arrays[KEPT] = empty(p.q, (chunks, p.HV, 1, p.K), real)
    summed = grads.dA_log is not None or grads.ddt_bias is not None
    biases = p.K if p.per_channel else 1
    if summed:
        shares = empty(p.q, (chunks, p.HV, 1 + biases), real)
        # its fourth axis says how many chunks there are
        arrays[SHARES] = shares.seen_as(shares.shape, (*shares.strides, chunks))
    for index, array in arrays.items():
        put_array(desc, index, array)

    gate = None if p.g is None else "channel" if p.per_channel else "head"
    do = None if grads.do is None else grads.do.dtype
    outside = (p.g, p.beta, p.A_log, p.dt_bias, p.initial_state, grads.dht)
    wide = any(x is not None and x.dtype == "float64" for x in (p.q, *outside))
    slices = -(-p.V // COLUMNS)
    per_chunk = chunks * p.HV

    def launch(kernel, blocks, shared=0, y=1):
        kernel.launch((blocks, y, 1), desc, place, shared=shared)

    launch(pairs_kernel(dtype, gate, KP, wide), per_chunk * BLOCKS, pairs_bytes(dtype, KP))
    launch(errors_kernel(dtype, gate, KP, wide), per_chunk * slices, shared_bytes(dtype, KP, 2))
    launch(scan_kernel(dtype, gate, do, KP, wide), p.N * p.HV * slices, shared_bytes(dtype, KP, 3))
    launch(weights_kernel(dtype, do, wide), per_chunk, weights_bytes(dtype))
    launch(reads_kernel(dtype, do, KP, wide), 3 * per_chunk, reads_bytes(dtype, KP))
    launch(channels_kernel(dtype, gate, KP), per_chunk, channels_bytes(dtype, KP))
    launch(heads_kernel(dtype, KP), -(-p.T // WARPS) * p.H * p.B, y=2)
    if p.g is not None:
        launch(gates_kernel(REAL, p.per_channel, wide), per_chunk)
    if summed:
        launch(shares_kernel(REAL, wide), -(-p.HV * (1 + biases) // THREADS))
