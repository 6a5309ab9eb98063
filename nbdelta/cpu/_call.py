"""What a kernel knows of a call: one int64 array, the descriptor.

Every array is eight numbers (address, dtype code, byte strides), so one compilation serves all
layouts, read-only inputs included, and starting a kernel costs one argument.
"""

import numba
import numpy as np

from nbdelta.cpu._descriptor import claim, read_array, read_float, read_int64
from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import DTYPES

# arrays, eight numbers each; address 0: not given
Q, KEY, VALUE, G, BETA, A_LOG, DT_BIAS, H0, HT, O, CHECKPOINTS = range(0, 88, 8)
ADDRESS, CODE, STRIDES = 0, 1, 2
# index arrays: addresses of int64, or 0
CU_SEQLENS, STATE_INDICES, ACCEPTED, CHECKPOINT_STARTS = range(88, 92)
# sizes
B, T, H, HV, K, V, N, SLOTS, INTERVAL = range(92, 101)
# options; floats as the bits of a float64
SCALE, EPS, BOUND, RAW_GATE, SIGMOID_BETA, BETA_FACTOR, TILED = range(101, 108)
# sequences outside of these lengths are left to another kernel
MIN_LENGTH, MAX_LENGTH = 108, 109
# work: address of the kernel, numbers of items and workers, parts of a head, scratch (address,
# bytes a worker)
KERNEL, ITEMS, WORKERS, PARTS, SCRATCH, SCRATCH_STEP = range(110, 116)
# item of the whole call that is the first one of this batch, where workers have shares
FIRST = 116
# address of U of all blocks, which the forward pass keeps for the backward pass, or 0
KEPT_ROWS = 117
# key heads of an item, which take turns block by block
HEADS_TOGETHER = 118
# items claimed, of all or of each worker's share: on cache lines of their own, since all threads
# write to them
NEXT = 128
LENGTH = NEXT + 8 * numba.config.NUMBA_NUM_THREADS

L2NORM_EPS = 1e-6
NO_LIMIT = 2**62


def put_array(desc, index, view):
    """Write a view, or nothing for None."""
    if view is not None:
        desc[index] = view.address
        desc[index + CODE] = DTYPES.index(view.dtype)
        desc[index + STRIDES : index + STRIDES + len(view.strides)] = view.strides


def put_float(desc, index, value):
    """Write the bits of a float64."""
    desc[index : index + 1].view(np.float64)[0] = value


def describe(problem, min_length=0, max_length=None):
    """Descriptor of a problem, all but the work."""
    p = problem
    desc = np.zeros(LENGTH, np.int64)
    arrays = (p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias)
    arrays += (p.initial_state, p.final_state, p.o, p.checkpoints)
    for i, view in enumerate(arrays):
        put_array(desc, 8 * i, view)
    for index, array in (
        (CU_SEQLENS, p.cu_seqlens),
        (STATE_INDICES, p.state_indices),
        (ACCEPTED, p.num_accepted_tokens),
    ):
        if array is not None:
            desc[index] = array.ctypes.data
    desc[B : N + 1] = p.B, p.T, p.H, p.HV, p.K, p.V, p.N
    desc[SLOTS] = 0 if p.state_indices is None else p.state_indices.shape[1]
    desc[INTERVAL], desc[KEPT_ROWS] = p.checkpoint_interval, p.kept_rows
    put_float(desc, SCALE, p.scale)
    put_float(desc, EPS, L2NORM_EPS if p.use_qk_l2norm_in_kernel else -1.0)
    put_float(desc, BOUND, 0.0 if p.lower_bound is None else p.lower_bound)
    desc[RAW_GATE] = p.use_gate_in_kernel
    desc[SIGMOID_BETA] = p.use_beta_sigmoid_in_kernel
    put_float(desc, BETA_FACTOR, 2.0 if p.allow_neg_eigval else 1.0)
    desc[TILED] = p.head_order == "tiled"
    desc[MIN_LENGTH] = min_length
    desc[MAX_LENGTH] = NO_LIMIT if max_length is None else max_length
    return desc


def checkpoint_starts(problem):
    """Index of the first checkpoint of each sequence."""
    if problem.cu_seqlens is None:
        lengths = np.full(problem.N, problem.T, np.int64)
    else:
        lengths = np.diff(problem.cu_seqlens)
    counts = lengths // problem.checkpoint_interval
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


# Address, dtype code and four byte strides of an array, and a float64 option. Not `njit` functions:
# Numba gives every constant a type of its own and would compile them for each index.
array_at, real = read_array, read_float


@njit()
def at(x, i, j, k):
    """Address of ``x[i, j, k]``."""
    return x[0] + i * x[2] + j * x[3] + k * x[4]


@njit()
def lines(x, b, t, h, column):
    """First of the lines that hold 16 columns of 16 tokens, and the step to the next one.

    There is one for each token, or for each column where tokens lie side by side, as behind the
    short convolution of a model.
    """
    return at(x, b, t, h) + column * x[5], x[3] if abs(x[3]) > abs(x[5]) else x[5]


@njit()
def sequence(desc, n):
    """Batch index, first token and end of sequence n."""
    if desc[CU_SEQLENS]:
        bounds = desc[CU_SEQLENS] + 8 * n
        return 0, read_int64(bounds), read_int64(bounds + 8)
    return n, 0, desc[T]


@njit()
def value_head(desc, key_head, j):
    """Value head number j of a key head."""
    if desc[TILED]:
        return key_head + j * desc[H]
    return key_head * (desc[HV] // desc[H]) + j


@njit()
def next_item(desc, worker):
    """Claim an item: the next one of the worker's share, then of the others' shares; -1: none.

    A share is a run of items, so that a worker goes through memory from front to back, and what is
    fetched behind an item is not what another worker writes to.
    """
    items, workers = desc[ITEMS], desc[WORKERS]
    for i in range(workers):
        share = (worker + i) % workers
        first, end = items * share // workers, items * (share + 1) // workers
        if desc[NEXT + 8 * share] < end - first:
            item = first + claim(desc, NEXT + 8 * share)
            if item < end:
                return item + desc[FIRST]
    return -1


@njit()
def ends_share(desc, item):
    """Whether the item behind this one is of another worker's share, or there is none."""
    items, workers, end = desc[ITEMS], desc[WORKERS], item + 1 - desc[FIRST]
    share = (end * workers + items - 1) // items
    return items * share // workers == end
