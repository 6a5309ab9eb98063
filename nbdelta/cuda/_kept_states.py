"""Memory for states that the forward pass of packed sequences keeps, where no sequence fills it.

Shapes alone do not tell how many states there are, so there may be memory for more of them. It
becomes zeros: whoever looks at the tensor, as hooks on saved tensors do, finds no old numbers.
"""

import numpy as np
from numba import cuda

from nbdelta.cuda._call import CHECKPOINTS, HV, LENGTH, K, N, V, array_at, at, describe
from nbdelta.cuda._call import first_checkpoint as count_checkpoints
from nbdelta.cuda._jit import kernel, place_of, specialised
from nbdelta.cuda._memory import ITEMSIZE, real_of, writer

THREADS = 128


@specialised
def _clear_kernel(REAL):
    """The kernel, for a grid of states x value heads: it writes to those past the last one."""
    put, size, zero = writer(str(REAL), REAL), ITEMSIZE[str(REAL)], REAL(0)

    @kernel(THREADS)
    def clear_states_kernel(desc):
        number, hv = cuda.blockIdx.x // desc[HV], cuda.blockIdx.x % desc[HV]
        if number < count_checkpoints(desc, desc[N]):
            return
        first = at(array_at(desc, CHECKPOINTS), number, hv, 0)
        for i in range(cuda.threadIdx.x, desc[K] * desc[V], THREADS):
            put(first + i * size, zero)

    return clear_states_kernel


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of what is launched."""
    for dtype in ("float32", "float64"):
        yield f"backward unused states {dtype}", _clear_kernel(real_of(dtype)), LENGTH, 0


def clear_unused_states(problem):
    """Fill the checkpoints of a problem, C-contiguous ones, with zeros from the last one on."""
    p = problem
    REAL = real_of(p.checkpoints.dtype)
    desc = describe(p, np.dtype(str(REAL)))
    blocks = p.checkpoints.shape[0] * p.HV
    _clear_kernel(REAL).launch((blocks, 1, 1), desc, place_of(p.q))
