"""Cumulative gates of a chunk, in powers of 2, for both gate layouts."""

from math import e, log2

from numba import float32

from nbdelta.cuda._call import BOUND, RAW_GATE
from nbdelta.cuda._jit import device
from nbdelta.cuda._memory import reader, real_field
from nbdelta.cuda._memory_tiles import make_gate_sums, make_load_column
from nbdelta.cuda._ptx import ex2, lg2, reciprocal, shuffle_up, store_shared
from nbdelta.cuda._tile_functions import f32, int32, uint32
from nbdelta.cuda._tiles import add_exactly

LOG2E, LN2 = float32(log2(e)), float32(1 / log2(e))
ZERO, HALF, THIRD, ONE = float32(0), float32(0.5), float32(1 / 3), float32(1)
SMALL = float32(2**-8)
# A gate below this is a reset: it leaves nothing of a float32. Its size is bounded, so that sums
# stay finite and keep their precision.
RESET = float32(-160)

real = real_field(f32)


@device
def softplus(x):
    """log(1 + e^x); the series keeps what 1 + e^x would round away."""
    t = ex2(-abs(x) * LOG2E)
    if t < SMALL:
        log = t * (ONE - t * (HALF - t * THIRD))
    else:
        log = lg2(ONE + t) * LN2
    return log if x < ZERO else x + log


@device
def sigmoid(x):
    return reciprocal(ONE + ex2(-x * LOG2E))


@device
def log_gate(desc, x, rate, bias):
    """Log decay of an element of g."""
    if desc[RAW_GATE]:
        x += bias
        bound = real(desc[BOUND])
        x = bound * sigmoid(rate * x) if bound < ZERO else -rate * softplus(x)
    return x


def make_token_gates(form, dtype):
    """G of a chunk with a gate per token, by one warp: two tokens a lane."""
    tokens, part = form.tokens, form.vector
    read = reader(dtype or "float32", f32)

    @device
    def gate(desc, g, step, i, count, rate, bias):
        if g == 0 or i >= count:
            return ZERO
        x = LOG2E * log_gate(desc, read(g + i * step), rate, bias)
        return RESET if x < RESET else x

    @device
    def token_gates(desc, target, lane, count, g, step, rate, bias):
        i = int32(2 * lane)
        first = (gate(desc, g, step, i, count, rate, bias), ZERO)
        second = (gate(desc, g, step, i + 1, count, rate, bias), ZERO)
        total = add_exactly(first, second)
        for s in range(5):
            high, low = shuffle_up(total[0], 1 << s), shuffle_up(total[1], 1 << s)
            if lane >= 1 << s:
                total = add_exactly((high, low), total)
        high, low = shuffle_up(total[0], 1), shuffle_up(total[1], 1)
        if lane > 0:
            first = add_exactly((high, low), first)
        if i < tokens:
            at = uint32(target + 4 * i)
            store_shared(at, first[0])
            store_shared(uint32(at + 4), total[0])
            store_shared(uint32(at + part), first[1])
            store_shared(uint32(at + part + 4), total[1])

    return token_gates


def make_channel_gates(form, dtype, read_bias):
    """G of a chunk with a gate per channel, a channel a thread."""
    tokens, width = form.tokens, form.K
    pitch, threads = form.gate_pitch, 2 * form.tokens
    load_column = make_load_column(dtype or "float32", 8)
    gate_sums = make_gate_sums(form, 8, float(LOG2E), float(RESET))

    @device
    def channel_gates(desc, target, t, count, channels, g, step, dc, rate, bias, bias_step):
        for c in range(t, width, threads):
            # of channels that only pad, and tokens after the last, G is left as it is
            left = int32(count if c < channels else 0)
            b = ZERO
            if left > 0 and bias[0] != 0:
                b = read_bias(bias[1], bias[0] + c * bias_step)
            total = (ZERO, ZERO)
            source = g + c * dc
            at = uint32(target + 4 * c)
            for _ in range(tokens // 8):
                x = load_column(source, step, left)
                if desc[RAW_GATE]:
                    x = (
                        log_gate(desc, x[0], rate, b), log_gate(desc, x[1], rate, b),
                        log_gate(desc, x[2], rate, b), log_gate(desc, x[3], rate, b),
                        log_gate(desc, x[4], rate, b), log_gate(desc, x[5], rate, b),
                        log_gate(desc, x[6], rate, b), log_gate(desc, x[7], rate, b),
                    )  # fmt: skip
                total = gate_sums(total, x, at, left)
                source += 8 * step
                at = uint32(at + 8 * pitch)
                left = int32(left - 8)

    return channel_gates
