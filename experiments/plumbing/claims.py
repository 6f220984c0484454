"""Claims: what one process of a host is at, and no other may begin."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import IO


@contextmanager
def claimed(locks: IO, name: object, wait: bool) -> Iterator[bool]:
    """True while no other process has what is named so. The system takes a claim back from a process that dies.

    A claim is a lock of one byte of a file, at a place that the name decides. Without `wait`, False if another has it.
    """
    byte = int.from_bytes(blake2b(repr(name).encode(), digest_size=6).digest(), 'big')
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
    except (BlockingIOError, PermissionError):
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, byte)
