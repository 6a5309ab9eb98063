"""From what every chunk, value head and channel has to the gradients of the call's arrays."""

from numba import cuda, int64

from nbdelta.cuda._backward_call import (
    DA_LOG,
    DDT_BIAS,
    DG,
    DKEY,
    DQ,
    FACTORS,
    RAW_G,
    READS_K,
    READS_Q,
    SHARES,
    WRITES,
    chunk_of,
)
from nbdelta.cuda._call import (
    A_LOG,
    BOUND,
    DT_BIAS,
    GROUP,
    HV,
    KEY,
    L2NORM,
    RAW_GATE,
    TILED,
    H,
    K,
    Q,
    T,
    array_at,
    at,
)
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._math import exp, gate_functions
from nbdelta.cuda._memory import (
    ITEMSIZE,
    read_real,
    reader,
    real_field,
    real_of,
    write_real,
    writer,
)
from nbdelta.cuda._shared import element, set_element
from nbdelta.cuda._step import warp_sum
from nbdelta.cuda._tile_functions import uint32

THREADS, WARPS = 128, 4
LANES = 32


@specialised
def heads_kernel(dtype, KP):
    """The kernel that adds up dq or dk over the value heads of a key head, a token a warp.

    For a grid of (tokens / warps, rounded up, x key heads x sequences, 2); in the y direction q,
    then k.
    """
    REAL = real_of(dtype)
    get, put, get_real = reader(dtype, REAL), writer(dtype, REAL), reader(str(REAL), REAL)
    size = ITEMSIZE[str(REAL)]
    total_of = warp_sum(REAL, 1)
    # channels of a lane
    OF_LANE = KP // LANES
    zero = REAL(0)

    @kernel(THREADS)
    def backward_heads_kernel(desc):
        r_sum, r_x = cuda.local.array(OF_LANE, REAL), cuda.local.array(OF_LANE, REAL)
        lane, block = cuda.threadIdx.x & 31, uint32(cuda.blockIdx.x)
        # divided in 32 bits, which a grid has
        lots, heads = uint32((desc[T] + WARPS - 1) // WARPS), uint32(desc[H])
        t, block = int64(block % lots) * WARPS + (cuda.threadIdx.x >> 5), uint32(block // lots)
        hk, b = int64(block % heads), int64(block // heads)
        if t >= desc[T]:
            return
        x, out, parts = array_at(desc, Q), array_at(desc, DQ), array_at(desc, READS_Q)
        of_keys = cuda.blockIdx.y
        if of_keys:
            x, out, parts = array_at(desc, KEY), array_at(desc, DKEY), array_at(desc, READS_K)
        first, step = hk * desc[GROUP], 1
        if desc[TILED]:
            first, step = int64(hk), desc[H]
        for i in range(OF_LANE):
            c = min(lane + LANES * i, desc[K] - 1)
            r_x[i] = get(at(x, b, t, hk) + c * x[5])
            r_sum[i] = zero
        for m in range(desc[GROUP]):
            source = at(parts, b, t, first + m * step)
            for i in range(OF_LANE):
                r_sum[i] += get_real(source + min(lane + LANES * i, desc[K] - 1) * size)
        if desc[L2NORM]:
            along = zero
            for i in range(OF_LANE):
                if lane + LANES * i < desc[K]:
                    along += r_x[i] * r_sum[i]
            (along,) = total_of((along,))
            factor = get_real(at(array_at(desc, FACTORS), b, t, first) + of_keys * size)
            along *= factor * factor
            for i in range(OF_LANE):
                r_sum[i] = factor * (r_sum[i] - along * r_x[i])
        for i in range(OF_LANE):
            c = lane + LANES * i
            if c < desc[K]:
                put(at(out, b, t, hk) + c * out[5], r_sum[i])

    return backward_heads_kernel


@specialised
def gates_kernel(REAL, per_channel, wide):
    """The kernel that ends at the gradient of g, for a grid of chunks x value heads.

    `wide`: whether a gate, A_log or dt_bias may be float64.
    """
    get, put = reader(str(REAL), REAL), writer(str(REAL), REAL)
    read, write, real = read_real(REAL, wide), write_real(REAL, wide), real_field(REAL)
    size = ITEMSIZE[str(REAL)]
    sigmoid, log_decay = gate_functions(REAL)
    total_of = warp_sum(REAL, 1)
    zero, one = REAL(0), REAL(1)

    @device
    def raw_gradient(desc, grad, x, rate, bias):
        """From that of a log decay, the gradients of the raw gate and of log(rate)."""
        bound = real(desc[BOUND])
        if bound < zero:
            x = rate * (x + bias)
            slope = bound * sigmoid(x) * sigmoid(-x)
            slope, by_rate = slope * rate, slope * x
        else:
            slope, by_rate = -rate * sigmoid(x + bias), log_decay(desc, x, rate, bias)
        # an infinite gate that nothing passes through: 0, not 0 times infinity
        return grad * slope, zero if grad == zero else grad * by_rate

    @kernel(THREADS)
    def backward_gates_kernel(desc):
        s_rate, s_bias = cuda.shared.array(THREADS, REAL), cuda.shared.array(THREADS, REAL)
        tid = cuda.threadIdx.x
        slot, hv = cuda.blockIdx.x // desc[HV], cuda.blockIdx.x % desc[HV]
        _, b, first, count, _ = chunk_of(desc, slot)
        grads, dg, g = array_at(desc, WRITES), array_at(desc, DG), array_at(desc, RAW_G)
        A_log, dt_bias = array_at(desc, A_LOG), array_at(desc, DT_BIAS)
        shares = array_at(desc, SHARES)
        rate = one
        if A_log[0] != 0:
            rate = exp(read(A_log[1], A_log[0] + hv * A_log[2]))
        own_bias = dt_bias[0] + hv * dt_bias[2]
        of_rate = zero
        if per_channel:
            for c in range(tid, desc[K], THREADS):
                of_bias, bias = zero, zero
                if dt_bias[0] != 0:
                    bias = read(dt_bias[1], own_bias + c * dt_bias[3])
                for i in range(count):
                    grad = get(at(grads, b, first + i, hv) + c * size)
                    if desc[RAW_GATE]:
                        x = read(g[1], at(g, b, first + i, hv) + c * g[5])
                        grad, by_rate = raw_gradient(desc, grad, x, rate, bias)
                        of_rate += by_rate
                        of_bias += grad
                    write(dg[1], at(dg, b, first + i, hv) + c * dg[5], grad)
                if shares[0] != 0:
                    put(at(shares, slot, hv, 1 + c), of_bias)
        else:
            of_bias = zero
            for i in range(tid >> 5, count, WARPS):
                grad = zero
                for c in range(tid & 31, desc[K], LANES):
                    grad += get(at(grads, b, first + i, hv) + c * size)
                (grad,) = total_of((grad,))
                if tid & 31 == 0:
                    if desc[RAW_GATE]:
                        bias = zero
                        if dt_bias[0] != 0:
                            bias = read(dt_bias[1], own_bias)
                        x = read(g[1], at(g, b, first + i, hv))
                        grad, by_rate = raw_gradient(desc, grad, x, rate, bias)
                        of_rate += by_rate
                        of_bias += grad
                    write(dg[1], at(dg, b, first + i, hv), grad)
            set_element(s_bias, tid, of_bias)
        if shares[0] == 0:
            return
        set_element(s_rate, tid, of_rate)
        cuda.syncthreads()
        if tid == 0:
            of_rate = element(s_rate, 0)
            for i in range(1, THREADS):
                of_rate += element(s_rate, i)
            put(at(shares, slot, hv, 0), of_rate)
            if not per_channel:
                of_bias = element(s_bias, 0)
                for i in range(1, THREADS):
                    of_bias += element(s_bias, i)
                put(at(shares, slot, hv, 1), of_bias)

    return backward_gates_kernel


@specialised
def shares_kernel(REAL, wide):
    """The kernel that adds up the chunks' shares in the gradients of A_log and dt_bias.

    A thread per value head and number. `wide`: whether those may be float64.
    """
    get, write = reader(str(REAL), REAL), write_real(REAL, wide)
    zero = REAL(0)

    @kernel(THREADS)
    def backward_shares_kernel(desc):
        shares, dA, dbias = array_at(desc, SHARES), array_at(desc, DA_LOG), array_at(desc, DDT_BIAS)
        # one number of A_log, then one of dt_bias for a gate or for every channel of one
        numbers = shares[3] // shares[4]
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        hv, c = item // numbers, item % numbers
        if hv >= desc[HV]:
            return
        last = c + 1
        if c > 0 and dbias[3] == 0:
            # one bias for all channels
            last = numbers if c == 1 else 0
        total = zero
        for i in range(c, last):
            for slot in range(shares[5]):
                total += get(at(shares, slot, hv, i))
        if c == 0 and dA[0] != 0:
            write(dA[1], dA[0] + hv * dA[2], total)
        if 0 < c < last and dbias[0] != 0:
            write(dbias[1], dbias[0] + hv * dbias[2] + (c - 1) * dbias[3], total)

    return backward_shares_kernel
