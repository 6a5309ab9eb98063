"""Runs a kernel on several threads: plain Python threads over compiled code that holds no lock.

Numba's own layers would abort the process on concurrent calls (workqueue) or kill a forked child
(OpenMP). Here the items of a call are claimed one by one from a counter, the caller works too and
never waits for a thread that has not begun, so a busy core costs no more than itself.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numba.np.ufunc import parallel

from nbdelta.cpu._call import ITEMS, SCRATCH, SCRATCH_STEP

_local = threading.local()
_lock = threading.Lock()
_helpers = None


def _forget_helpers():
    """Threads do not survive a fork: the child makes its own."""
    global _helpers, _lock
    _helpers, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def thread_count():
    """Threads a call may use: ``NUMBA_NUM_THREADS``, or what ``set_num_threads`` said."""
    # get_num_threads() would start Numba's thread pool, which is not used here
    if parallel._is_initialized:
        return numba.get_num_threads()
    return numba.config.NUMBA_NUM_THREADS


def _executor():
    global _helpers
    if _helpers is None:
        with _lock:
            if _helpers is None:
                count = max(1, numba.config.NUMBA_NUM_THREADS - 1)
                _helpers = ThreadPoolExecutor(count, thread_name_prefix="nbdelta")
    return _helpers


def _scratch(size):
    """Memory of the calling thread, on a cache line boundary; it grows and is kept."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.size < size + 64:
        buffer = _local.buffer = np.empty(size + 64, np.uint8)
    address = buffer.ctypes.data
    return address + -address % 64


def run(kernel, desc, items, scratch_bytes, threads):
    """Run `items` items of a kernel on up to `threads` threads, `scratch_bytes` of memory each."""
    if items == 0:
        return
    workers = min(threads, items)
    # an odd number of lines more: workers' buffers should not meet in the same cache sets
    step = (scratch_bytes + 63) // 64 * 64 + 64
    desc[ITEMS] = items
    desc[SCRATCH], desc[SCRATCH_STEP] = _scratch(workers * step), step
    if workers == 1:
        kernel(desc, 0)
        return
    others = [_executor().submit(kernel, desc, worker) for worker in range(1, workers)]
    try:
        kernel(desc, 0)
    finally:
        for other in others:
            # one that has not begun is not needed any more
            if not other.cancel():
                other.result()
