"""A process may be forked at any time, while other threads of it are in the middle of something."""

# registers a lock of its own for forks, which Python takes in the reverse of this order: ours come
# first, so that whoever has one of them can still ask for a logger
import logging  # noqa: F401
import os
import threading
from typing import Protocol


class Lock(Protocol):
    """A lock that the thread which has it may take again."""

    def acquire(self) -> object:
        """Wait for it."""

    def release(self) -> None:
        """Give it back."""


# first those that are held while others are asked for
_locks: list[Lock] = []


class _Held(threading.local):
    """What a thread that forks has taken; there may be several of them."""

    def __init__(self) -> None:
        self.locks: list[Lock] = []


_held = _Held()


def wait_for(lock: Lock) -> None:
    """Let forks wait until nobody else has a lock.

    The child has none of the other threads: what one of them had begun would never be finished, and
    its locks would stay locked.

    Parameters
    ----------
    lock : Lock
        Of whatever must not be cut in two. Not asked for by those who have a lock that was given
        here later.
    """
    _locks.append(lock)


def _before() -> None:
    # whoever had one of them may have imported a module that gave one more meanwhile
    while len(_held.locks) < len(_locks):
        lock = _locks[len(_held.locks)]
        lock.acquire()
        _held.locks.append(lock)


def _after() -> None:
    while _held.locks:
        _held.locks.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
