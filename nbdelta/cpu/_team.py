"""Runs a kernel on several threads: Python threads that wait for work in compiled code.

Numba's own layers would abort the process on concurrent calls (workqueue) or kill a forked child
(OpenMP), and handing a task to a Python thread takes as long as a decode step. Here a helper that
has just worked watches for the next job without holding the interpreter's lock, and sleeps when
none came for a while. The caller works too, claims items from the same counters, and waits for
nobody who has not begun: a busy core costs no more than itself.
"""

import atexit
import os
import queue
import threading
import time
from functools import cache

import numba
import numpy as np
from numba.np.ufunc import parallel

from nbdelta.cpu import _atomic as atomic
from nbdelta.cpu._call import FIRST, ITEMS, KERNEL, NEXT, SCRATCH, SCRATCH_STEP, WORKERS
from nbdelta.cpu._descriptor import read_int64
from nbdelta.cpu._jit import kernel

# words that the caller and the helpers share, on cache lines of their own
OWNED, JOB, TICKET, ACTIVE, AWAKE, ROUNDS, STOP = range(0, 56, 8)
# in the address of a descriptor, a multiple of 8
ONLY_POST = 1
# rounds of `pause`, 20 to 40 ns each, that a helper waits for work; seconds between the calls of a
# loop
FEW_ROUNDS, MANY_ROUNDS, NEAR = 100, 8000, 200e-6

# work of a thread between two looks at what Python has to say: 0.1 to 0.2 s; and seconds after
# which half of it is enough
BATCH_FLOPS, LONG = 4 * 10**9, 0.3

_local = threading.local()
_lock = threading.Lock()
_team = None


def _forget_team():
    """Threads do not survive a fork: the child makes its own."""
    global _team, _lock
    _team, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)


def thread_count():
    """Threads a call may use: ``NUMBA_NUM_THREADS``, or what ``set_num_threads`` said."""
    # get_num_threads() would start Numba's thread pool, which is not used here
    if parallel._is_initialized:
        return parallel._get_num_threads()
    return numba.config.NUMBA_NUM_THREADS


@cache
def _kernels():
    @kernel()
    def lead(words, desc):
        """Work on a job, with helpers if the team is free, and wait for those who joined.

        With `ONLY_POST` let them see it, and no more.
        """
        job = desc & ~ONLY_POST
        if atomic.get(words, JOB) != job and atomic.replace(words, OWNED, 0, 1):
            atomic.put(words, JOB, job)
            atomic.add(words, TICKET, 1)
        if desc & ONLY_POST:
            return
        atomic.call(read_int64(job + 8 * KERNEL), job, 0)
        # every call has a descriptor of its own
        if atomic.get(words, JOB) == job:
            # nothing is left to claim; a helper that saw the job before this has counted itself
            atomic.put(words, JOB, 0)
            while atomic.get(words, ACTIVE):
                atomic.pause()
            atomic.put(words, OWNED, 0)

    @kernel()
    def serve(words, worker):
        """Join every job with room for this worker, until there was none for a while."""
        seen, rounds = -1, 0
        atomic.add(words, AWAKE, 1)
        while rounds < atomic.get(words, ROUNDS) and not atomic.get(words, STOP):
            ticket = atomic.get(words, TICKET)
            if ticket != seen:
                seen = ticket
                atomic.add(words, ACTIVE, 1)
                # read after that: no caller ends a job, or frees it, under a counted helper
                job = atomic.get(words, JOB)
                if job and worker < read_int64(job + 8 * WORKERS):
                    atomic.call(read_int64(job + 8 * KERNEL), job, worker)
                    rounds = 0
                atomic.add(words, ACTIVE, -1)
            rounds += 1
            atomic.pause()
        atomic.add(words, AWAKE, -1)

    return lead, serve


class _Team:
    """The helpers of this process and the words they share with the callers."""

    def __init__(self):
        self.lead, self.serve = _kernels()
        self.words = np.zeros(64, np.int64)
        self.address = self.words.ctypes.data
        self.alarm = queue.SimpleQueue()
        self.helpers, self.wanted = [], 0
        self.last = 0.0
        atexit.register(self.stop)

    def run(self, desc, workers, brief):
        """Run the kernel of the descriptor at an address."""
        near = time.perf_counter() - self.last < NEAR
        self.words[ROUNDS] = MANY_ROUNDS if near else FEW_ROUNDS
        asleep = len(self.helpers) - self.words.item(AWAKE)
        missing = len(self.helpers) < workers - 1
        # whatever an interrupt breaks off, a job that was posted is done and withdrawn
        try:
            if missing or (asleep and (near or not brief)):
                # first, as they may wake at once on a busy core, and would find nothing to do
                self.lead(self.address, desc | ONLY_POST)
                if missing:
                    self.start(workers - 1)
                for _ in range(min(asleep, workers - 1)):
                    self.alarm.put(None)
        finally:
            self.lead(self.address, desc)
        self.last = time.perf_counter()

    def start(self, count):
        """Start helpers; they enter the list themselves, as an interrupt may come at any step here.

        Of calls at the same time each may start all that it misses: those too many end at once.
        """
        self.wanted = max(self.wanted, count)
        for _ in range(count - len(self.helpers)):
            try:
                threading.Thread(target=self.help, daemon=True).start()
            except RuntimeError:  # no more threads to be had: fewer do the work, or one
                return

    def help(self):
        with _lock:
            worker = len(self.helpers) + 1
            if worker > self.wanted:
                return
            self.helpers.append(threading.current_thread())
        while not self.words[STOP]:
            self.serve(self.address, worker)
            self.alarm.get()

    def stop(self):
        """End the helpers while the memory that they watch is still there."""
        self.words[STOP] = 1
        for _ in self.helpers:
            self.alarm.put(None)
        for helper in self.helpers:
            helper.join()


def _the_team():
    global _team
    if _team is None:
        with _lock:
            if _team is None:
                _team = _Team()
    return _team


def _scratch(size):
    """Memory of the calling thread, on a cache line boundary; it grows and is kept."""
    kept = getattr(_local, "scratch", None)
    if kept is None or kept[0].size < size + 64:
        buffer = np.empty(size + 64, np.uint8)
        address = buffer.ctypes.data
        kept = _local.scratch = buffer, address + -address % 64
    return kept[1]


def run(
    kernel, desc, items, scratch_bytes, threads, brief=False, address=None, flops=0, shares=False
):  # fmt: skip
    """Run `items` items of a kernel on up to `threads` threads, `scratch_bytes` of memory each.

    Parameters
    ----------
    kernel : function
        As `nbdelta.cpu._jit.kernel` makes it.
    desc : array of int64
        Descriptor of the call, nobody else's until the call returns.
    items, scratch_bytes, threads : int
        As said.
    brief : bool
        Whether it takes about as long as waking a thread. Helpers that sleep are then left alone,
        unless the calls come one right after the other.
    address : int, optional
        Of the descriptor, where the caller knows it.
    flops : int
        Of one item, or what takes as long, if the call may be long. It then comes back to Python
        several times a second, where an interrupt from the keyboard is noticed; no item is left
        half done.
    shares : bool
        Whether the kernel takes its items by `next_item`.
    """
    if items == 0:
        return
    workers = min(threads, items)
    # an odd number of lines more: workers' buffers should not meet in the same cache sets
    step = (scratch_bytes + 63) // 64 * 64 + 64
    desc[KERNEL], desc[WORKERS] = kernel.address, workers
    desc[SCRATCH], desc[SCRATCH_STEP] = _scratch(workers * step), step
    address = desc.ctypes.data if address is None else address
    first, together = 0, workers * max(1, BATCH_FLOPS // flops) if flops else items
    while first < items:
        end = min(items, first + together)
        if shares:
            desc[FIRST], desc[ITEMS] = first, end - first
            if first:
                for worker in range(workers):
                    desc[NEXT + 8 * worker] = 0
        else:
            desc[NEXT], desc[ITEMS] = first, end
        begin = time.perf_counter() if flops else 0.0
        if workers == 1:
            kernel(address, 0)
        else:
            _the_team().run(address, workers, brief)
        first += together
        # other programs have the cores, or the memory is far away
        if flops and time.perf_counter() - begin > LONG:
            together = max(workers, together // 2)
