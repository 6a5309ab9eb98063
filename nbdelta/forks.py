"""A process may be forked at any time, while other threads of it are in the middle of something."""

# registers a lock of its own for forks, which Python takes in the reverse of this order: ours come
# first, so that whoever has one of them can still ask for a logger
import logging  # noqa: F401
import os
from typing import Protocol


class Lock(Protocol):
    """A lock that the thread which has it may take again."""

    def acquire(self) -> object:
        """Wait for it."""

    def release(self) -> None:
        """Give it back."""


def wait_for(lock: Lock) -> None:
    """Let forks wait until nobody else has a lock.

    The child has none of the other threads: what one of them had begun would never be finished, and
    its locks would stay locked.

    Parameters
    ----------
    lock : Lock
        Of whatever must not be cut in two.
    """
    held: list[Lock] = []

    def before() -> None:
        lock.acquire()
        held.append(lock)

    def after() -> None:
        # nothing is held when this was registered in the middle of a fork, which waited for
        # another lock, or when the wait was interrupted
        if held:
            held.pop().release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)
