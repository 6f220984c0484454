"""The inside of a grading worker. Light on purpose: what is imported here, every worker pays for."""

import logging
import numbers
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

_ORPHAN_GRACE = 5.0  # seconds past the deadline after which a worker whose caller has died ends by itself


class CannotGrade(RuntimeError):
    """The grader is broken, not the response. It ends the run, which would learn from zeros otherwise."""


def serve(descriptor: int) -> None:
    """Runs a worker: loads the grading function, then answers until the caller closes the connection.

    Args:
        descriptor: file descriptor of the worker's end of the connection. It brings the pickled function, the
            deadline in seconds and the memory limit in bytes, then (response, answer) pairs; it takes ('ready', None)
            and an outcome per pair.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends the workers
    logging.disable(logging.CRITICAL)  # verifiers warn about every odd answer
    connection = Connection(descriptor)
    worker = os.getpid()
    os.register_at_fork(after_in_child=connection.close)  # or the caller would not see that the worker has died
    try:
        pickled, deadline, memory_limit = connection.recv()
        try:
            _limit_memory(memory_limit)
            grade = pickle.loads(pickled)
        except Exception as error:
            connection.send(('cannot start', _describe(error)))
            return
        connection.send(('ready', None))
        while True:
            response, answer = connection.recv()
            # The caller kills at the deadline. Should the caller be dead, the kernel does it: a signal with its default
            # action ends even a loop in C that never lets Python run a handler.
            signal.setitimer(signal.ITIMER_REAL, deadline + _ORPHAN_GRACE)
            outcome = grade_one(grade, response, answer)
            if os.getpid() != worker:
                os._exit(1)  # a child that the grading function left behind: the answer is its parent's to give
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(outcome)
    except (EOFError, OSError):
        pass  # the caller closed the connection or died
    if os.getpgrp() == worker == os.getpid():
        os.killpg(worker, signal.SIGKILL)  # this process, and those that gradings have left behind


def grade_one(grade: Callable[[str, str], float], response: str, answer: str) -> tuple[str, object]:
    """('reward', float), or ('invalid', what came instead of a finite number), or ('error', what was raised).

    Or ('cannot grade', why), which is for the caller to raise.
    """
    try:
        reward = grade(response, answer)
    except CannotGrade as error:
        return 'cannot grade', _describe(error)
    except Exception as error:
        return 'error', _describe(error)
    if isinstance(reward, numbers.Real) and abs(reward) < 3e38:  # finite as float32; false for NaN
        return 'reward', float(reward)
    return 'invalid', repr(reward)[:200]


def _describe(error: Exception) -> str:
    # What is wrong with a text may be that it cannot be encoded, for a log either.
    return f'{type(error).__name__}: {error}'[:2000].encode(errors='backslashreplace').decode()


def _limit_memory(limit: int) -> None:
    if sys.platform != 'linux':  # elsewhere the limit does not exist or is not obeyed
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
