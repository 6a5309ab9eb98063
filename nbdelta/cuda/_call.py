"""What a kernel knows of a call: one tuple of int64, the descriptor.

The fields have the names of ``cpu/_call.py``. Every array is six numbers (address, dtype code, four
byte strides), so one compilation serves all layouts. Index arrays are on the device: the host has
not seen what is in them, and the kernels do not trust it.
"""

from functools import lru_cache

import numpy as np

from nbdelta.cuda._jit import device
from nbdelta.cuda._memory import DTYPES, fields, read_index
from nbdelta.cuda._tile_functions import int32, uint32

# arrays, six numbers each; address 0: not given
Q, KEY, VALUE, G, BETA, A_LOG, DT_BIAS, H0, HT, O, CHECKPOINTS = range(0, 66, 6)
# index arrays: the same, with one or two byte strides
CU_SEQLENS, STATE_INDICES, ACCEPTED = range(66, 84, 6)
ADDRESS, CODE, STRIDES = 0, 1, 2
# sizes; SLOTS is S of state_indices [N, S], POOL the number of states in the pool, GROUP HV / H,
# ROOM the number of checkpoints: boundaries on the device may ask for more
B, T, H, HV, K, V, N, SLOTS, POOL, INTERVAL, GROUP, ROOM = range(84, 96)
# options; floats as the bits of the compute dtype
SCALE, EPS, BOUND, RAW_GATE, SIGMOID_BETA, BETA_FACTOR, TILED, L2NORM = range(96, 104)
# sequences outside of these lengths are left to another kernel
MIN_LENGTH, MAX_LENGTH = 104, 105
# of the single kernel: scratch addresses and sizes, whatever it needs
EXTRA = 106
LENGTH = 112

L2NORM_EPS = 1e-6
NO_LIMIT = 2**31 - 1
LARGEST_K = 256


@lru_cache
def _layout(dtype, strides):
    return (DTYPES.index(dtype), *strides, *[0] * (4 - len(strides)))


_NOT_GIVEN = (0,) * 6


def array_fields(view):
    """The six numbers of a view, or of None."""
    return _NOT_GIVEN if view is None else (view.address, *_layout(view.dtype, view.strides))


def put_array(desc, index, view):
    """Write a view, or nothing for None."""
    desc[index : index + 6] = array_fields(view)


def bits_of(value, dtype=np.float32):
    """A number of the compute dtype as an integer of its bits."""
    return int(np.array(value, dtype).view(np.int64 if dtype == np.float64 else np.int32))


def put_float(desc, index, value, dtype=np.float32):
    """Write the bits of a number of the compute dtype."""
    desc[index] = bits_of(value, dtype)


@lru_cache
def _float_options(dtype, scale, bound, doubled):
    options = scale, L2NORM_EPS, bound or 0.0, 2.0 if doubled else 1.0
    return tuple(bits_of(x, dtype) for x in options)


def describe(problem, dtype=np.float32, min_length=0, max_length=None):
    """Descriptor of a problem for a kernel that computes in `dtype`.

    Raises
    ------
    ValueError
        When K is more than the kernels hold.
    """
    p = problem
    if p.K > LARGEST_K:
        raise ValueError(f"k: on CUDA devices K is at most {LARGEST_K}, got {p.K}")
    desc = []
    arrays = (p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias)
    arrays += (p.initial_state, p.final_state, p.o, p.checkpoints)
    arrays += (p.cu_seqlens, p.state_indices, p.num_accepted_tokens)
    for view in arrays:
        desc += array_fields(view)
    slots = 0 if p.state_indices is None else p.state_indices.shape[1]
    pool = 0 if p.initial_state is None else p.initial_state.shape[0]
    room = 0 if p.checkpoints is None else p.checkpoints.shape[0]
    desc += p.B, p.T, p.H, p.HV, p.K, p.V, p.N, slots, pool, p.checkpoint_interval, p.HV // p.H
    desc += (room,)
    scale, eps, bound, factor = _float_options(dtype, p.scale, p.lower_bound, p.allow_neg_eigval)
    desc += scale, eps, bound, p.use_gate_in_kernel, p.use_beta_sigmoid_in_kernel, factor
    desc += p.head_order == "tiled", p.use_qk_l2norm_in_kernel
    desc += min_length, NO_LIMIT if max_length is None else max_length
    desc += (0,) * (LENGTH - len(desc))
    return np.array(desc, np.int64)


# `array_at(desc, Q)`: (address, dtype code, four byte strides)
array_at = fields(6)


@device
def at(x, i, j, k):
    """Address of ``x[i, j, k]``."""
    return x[0] + i * x[2] + j * x[3] + k * x[4]


@device
def sequence(desc, n):
    """Batch index, first token and end of sequence n; boundaries out of range make it empty."""
    cu = array_at(desc, CU_SEQLENS)
    if cu[0] == 0:
        return n, 0, desc[T]
    bos, eos = read_index(cu[1], cu[0] + n * cu[2]), read_index(cu[1], cu[0] + (n + 1) * cu[2])
    if bos < 0 or eos > desc[T] or eos < bos:
        return 0 * n, 0, 0 * desc[T]
    return 0 * n, bos, eos


@device
def first_checkpoint(desc, n):
    """Number of the first checkpoint of sequence n: the sequences before it have as many."""
    count = 0
    for m in range(n):
        _, bos, eos = sequence(desc, m)
        count += int32(divided(uint32(eos - bos), uint32(desc[INTERVAL]))[0])
    return count


@device
def divided(x, y):
    """Quotient and remainder of two uint32. (Numba widens int32, and int64 takes a routine.)"""
    quotient = uint32(x // y)
    return quotient, uint32(x - quotient * y)


@device
def key_head(desc, hv):
    """The head of q and k that a value head reads."""
    # (by int64: with `divided` the widest decode kernel spills on sm_90)
    hv = int32(hv)
    return hv % int32(desc[H]) if desc[TILED] else hv // int32(desc[GROUP])
