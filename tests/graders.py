"""Grading functions that misbehave on command, for the tests of the pool; workers import this file."""

import mmap
import os
import re
import signal
import sys
import time

from troll_jax.rewards.worker import CannotGrade


def obey(response: str, answer: str) -> float:
    """Does what the response says; otherwise 1.0 if it equals the answer."""
    match response.split():
        case ['spin']:
            while True:
                pass
        case ['regex']:  # exponential backtracking inside C: no signal handler and no other thread ever runs
            re.fullmatch('(a+)+b', 'a' * 64)
        case ['sleep', seconds]:
            time.sleep(float(seconds))
        case ['exit']:
            os._exit(3)
        case ['killed']:
            os.kill(os.getpid(), signal.SIGKILL)
        case ['raise']:
            raise KeyError('no such thing')
        case ['raise', message]:
            raise KeyError(Exception(message))
        case ['cannot', 'grade']:
            raise CannotGrade('the service is down')
        case ['nan']:
            return float('nan')
        case ['infinity']:
            return float('inf')
        case ['huge']:
            return 10**400
        case ['text']:
            return 'correct'
        case ['nothing']:
            return None
        case ['memory']:
            return float(len(bytearray(64 * 2**30)))
        case ['memory', 'in', 'steps']:
            blocks = []
            while True:
                blocks.append(bytes(2**26))
        case ['memory', gigabytes]:
            return float(len(bytearray(int(gigabytes) * 2**30)))
        case ['map', gigabytes]:
            return float(len(mmap.mmap(-1, int(gigabytes) * 2**30)) > 0)
        case ['sys.exit']:
            sys.exit(0)
        case ['fork', 'and', what]:
            if os.fork() == 0:
                time.sleep(1000)
            if what == 'hang':
                time.sleep(1000)
            if what == 'exit':
                os._exit(3)
        case ['fork', 'twice']:
            os.fork()  # both processes return
        case ['pid']:
            return float(os.getpid())
        case ['main']:
            import __main__

            return float(hasattr(__main__, '__file__'))
    return float(response == answer)


class Deadly:
    """Ends the process that loads it, as a package with a broken native library does."""

    def __reduce__(self):
        return os._exit, (5,)

    def grade(self, response: str, answer: str) -> float:
        return 1.0


class Unloadable:
    """Pickles well and cannot be loaded, as a task whose package is missing on the worker's side."""

    def __reduce__(self):
        return int, ('not a number',)

    def grade(self, response: str, answer: str) -> float:
        return 1.0
