"""Grading in worker processes that can be killed: a verifier that hangs costs one reward, not the run.

One socket joins the caller to each worker, and a worker holds one grading at a time. So a deadline belongs to exactly
one grading, a kill loses exactly that one, and sending never blocks, because the other end is always reading.

Workers are fresh interpreters, neither forks (JAX's threads and locks must not be forked) nor `multiprocessing`
children (which import the caller's main script again, with JAX and the model in it). They import what the grading
function needs and no more.
"""

import logging
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import NamedTuple

import numpy as np

from troll_jax.rewards.worker import grade_one

_logger = logging.getLogger(__name__)

_START_LIMIT = 120.0  # seconds for a worker to import the grading function; generous, as file systems may be slow
_LOOKS = 0.02  # seconds between looks for further responses of a batch
_STARTS_IN_A_ROW = 3  # workers that may die before they are ready until the pool gives up
_PROGRAM = 'import sys; sys.path[:] = sys.argv[2:]; from troll_jax.rewards.worker import serve; serve(int(sys.argv[1]))'


class Grades(NamedTuple):
    """Rewards of a batch, and how many of its gradings went wrong."""

    rewards: np.ndarray  # [R] float32; 0 where it went wrong
    timeouts: int  # killed at the deadline
    crashes: int  # the worker died
    errors: int  # the grading function raised
    graded: np.ndarray  # [R] bool; false where it went wrong


class Arriving:
    """A batch that is graded in the background while its responses arrive.

    Args:
        grader: its grader.
        answers: the answer to each of R responses.
    """

    grades: Future[Grades]
    """What `Grader.__call__` returns of the whole batch, or the error it raises."""

    def __init__(self, grader: 'Grader', answers: Sequence[str]):
        self._responses, self._waiting = [''] * len(answers), deque()
        self.grades = grader.background.submit(grader, self._responses, answers, self._waiting)

    def add(self, i: int, response: str) -> None:
        """Hands over response i, once for each."""
        self._responses[i] = response
        self._waiting.append(i)

    def give_up(self) -> None:
        """Ends the grading: no more responses will come."""
        self._waiting.append(None)


class Grader:
    """Grades batches of responses with one function, each grading under a deadline.

    A context manager: leaving it ends the workers, and so does the end of the calling process. Workers start at the
    first call, or earlier in the background with `start()`, and serve until the end; one that was killed is replaced.
    Linux and macOS: a worker inherits its end of the connection as a file descriptor.

    Args:
        grade: `(response, answer) -> reward`, a finite number. With a deadline it is pickled, so it must be importable
            by name: a function of a module, or a method of a picklable object.
        deadline: time limit of one grading, in seconds of wall clock. None grades in the calling process, in any
            of its threads, for plain string work that cannot hang.
        workers: number of processes; by default one per CPU that this process may use.
        memory_limit_gb: address space of a worker, in GB, where the platform can limit it (not on macOS).

    Raises:
        ValueError: a deadline or a number of workers that is not positive, or a function that cannot be pickled.
    """

    def __init__(
        self,
        grade: Callable[[str, str], float],
        *,
        deadline: float | None,
        workers: int | None = None,
        memory_limit_gb: float = 4.0,
    ):
        if deadline is not None and not deadline > 0:
            raise ValueError(f'deadline is {deadline}; expected seconds > 0, or None to grade in this process.')
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        if workers < 1:
            raise ValueError(f'workers is {workers}; expected at least 1.')
        self._grade = grade
        self._deadline = deadline
        self._size = workers
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self.background = ThreadPoolExecutor(1)
        self._one_at_a_time = threading.RLock()  # a batch in the background and one of an evaluation
        self._failed_starts = 0
        self._logged_error = self._has_graded = self._closed = False
        if deadline is not None:
            self._setup = (_pickle_by_name(grade), deadline, int(memory_limit_gb * 2**30))

    def __enter__(self) -> 'Grader':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start(self) -> None:
        """Starts the workers that are missing, without waiting for them to be ready."""
        if self._deadline is None:
            return
        with self._one_at_a_time:
            while len(self._workers) < self._size:
                worker = _Worker(self._setup)
                self._workers.append(worker)
                self._selector.register(worker.connection, selectors.EVENT_READ, worker)

    def close(self) -> None:
        """Ends the workers. A batch that another thread grades ends within a second or one grading, with an error."""
        self._closed = True
        with self._one_at_a_time:
            for worker in list(self._workers):
                self._remove(worker)
        self.background.shutdown()

    def __call__(
        self, responses: Sequence[str], answers: Sequence[str], waiting: deque[int | None] | None = None
    ) -> Grades:
        """Rewards of `responses[i]` against `answers[i]`, in order.

        Args:
            responses: R of them.
            answers: to each.
            waiting: which responses are there to be graded; others of them follow, or a None, which ends the batch. By
                default all are there. See `Arriving`.

        Raises:
            ValueError: the two differ in length, or a reward is not a finite number (names the sample).
            RuntimeError: the grader is closed, or the batch was given up; workers cannot start; the grading function
                raised a `CannotGrade`, with the reason, or it failed on every response so far, of which there are at
                least two.
        """
        if len(responses) != len(answers):
            raise ValueError(
                f'Got {len(responses)} responses and {len(answers)} answers; expected one answer for each.'
            )
        with self._one_at_a_time:
            grade = self._grade_here if self._deadline is None else self._grade_in_workers
            outcomes = grade(responses, answers, deque(range(len(answers))) if waiting is None else waiting)

        rewards, graded = np.zeros(len(outcomes), np.float32), np.zeros(len(outcomes), bool)
        counts = {'timeout': 0, 'crash': 0, 'error': 0}
        for i, (kind, value) in enumerate(outcomes):
            if kind == 'reward':
                rewards[i], graded[i] = value, True
            elif kind == 'cannot grade':
                raise RuntimeError(f'Grading is out of order, at sample {i}: {value}')
            elif kind == 'invalid':
                raise ValueError(
                    f'The reward of sample {i} is {value}; expected a finite number from {self._grade!r}. '
                    f'The response begins {responses[i][:80]!r}, the answer is {answers[i][:80]!r}.'
                )
            else:
                counts[kind] += 1
                if kind == 'error' and not self._logged_error:
                    self._logged_error = True
                    _logger.warning(
                        'Grading sample %d raised, so it is not learnt from; further ones are only counted.\n%s\nThe '
                        'response begins %r, the answer is %r.',
                        *(i, value, responses[i][:80], answers[i][:80]),
                    )
        self._has_graded |= graded.any()
        if not self._has_graded and len(graded) > 1:
            kind, why = outcomes[0]
            raise RuntimeError(
                f'{self._grade!r} failed on all of {len(graded)} responses, the first by {kind} ({why}). '
                f'It begins {responses[0][:80]!r}, the answer is {answers[0][:80]!r}. Mend the grader, or its deadline.'
            )
        return Grades(rewards, counts['timeout'], counts['crash'], counts['error'], graded)

    def check_open(self) -> None:
        """Raises a RuntimeError if the grader is closed."""
        if self._closed:
            raise RuntimeError('the grader is closed, so nothing is graded; make a new one')

    def _grade_here(self, responses, answers, waiting: deque[int | None]) -> list[tuple[str, object]]:
        outcomes = [('error', None)] * len(answers)
        for _ in answers:
            self.check_open()
            while not waiting:
                time.sleep(_LOOKS)
                self.check_open()
            i = _next(waiting)
            outcomes[i] = grade_one(self._grade, responses[i], answers[i])
        return outcomes

    def _grade_in_workers(self, responses, answers, waiting: deque[int | None]) -> list[tuple[str, object]]:
        outcomes: list[tuple[str, object]] = [('crash', None)] * len(answers)
        unfinished = unsent = len(answers)
        timeout = 0.0  # first see which workers became ready, or died, since the last batch
        try:
            while unfinished:
                self.check_open()
                self.start()
                for key, _ in self._selector.select(timeout):
                    unfinished -= self._receive(key.data, outcomes)
                for worker in list(self._workers):
                    if time.monotonic() >= worker.limit and not worker.connection.poll():
                        unfinished -= self._give_up(worker, outcomes)
                for worker in self._workers:
                    if waiting and worker.idle:
                        i, unsent = _next(waiting), unsent - 1
                        worker.send(i, (responses[i], answers[i]))
                timeout = min((w.limit for w in self._workers), default=0.0) - time.monotonic()
                # Looks once a second whether it is closed.
                timeout = min(max(0.0, timeout), _LOOKS if unsent > len(waiting) else 1.0)
            self.start()  # replacements of killed workers load while the caller does other things
        finally:
            # After an interrupt or an error, a worker at work would answer into the next batch.
            for worker in list(self._workers):
                if worker.sample is not None:
                    self._remove(worker)
        return outcomes

    def _give_up(self, worker: '_Worker', outcomes: list[tuple[str, object]]) -> int:
        """Kills a worker that is past its limit. Returns how many gradings that finishes, which is 1."""
        if worker.sample is None:
            raise RuntimeError(
                f'A grading worker was not ready after {_START_LIMIT:.0f} s of importing {self._grade!r}; make that '
                'import lighter.'
            )
        outcomes[worker.sample] = ('timeout', None)
        self._remove(worker)
        return 1

    def _receive(self, worker: '_Worker', outcomes: list[tuple[str, object]]) -> int:
        """Takes one message of a worker, or its end. Returns how many gradings that finishes, 0 or 1."""
        sample = worker.sample
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            exit_code = self._remove(worker, patience=1.0)
            if sample is not None:
                outcomes[sample] = ('crash', None)
                return 1
            if not worker.ready:
                self._failed_starts += 1
                if self._failed_starts >= _STARTS_IN_A_ROW:
                    raise RuntimeError(
                        f'{self._failed_starts} grading workers in a row died while starting (last exit code '
                        f'{exit_code}); what they printed is above. Check that {self._grade!r} can be imported by '
                        f'`{sys.executable}`, and the memory limit.'
                    ) from None
            return 0
        if kind == 'ready':
            worker.ready, worker.limit = True, math.inf
            self._failed_starts = 0
            return 0
        if kind == 'cannot start':
            raise RuntimeError(f'A grading worker could not load {self._grade!r}:\n{value}')
        outcomes[sample] = (kind, value)
        worker.sample, worker.limit = None, math.inf
        return 1

    def _remove(self, worker: '_Worker', *, patience: float = 0.0) -> int:
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        return worker.end(patience)


def _next(waiting: deque[int | None]) -> int:
    if (i := waiting.popleft()) is None:
        raise RuntimeError('the rollout ended before all of its responses came to be graded')
    return i


class _Worker:
    """The caller's side of one worker process."""

    def __init__(self, setup: tuple[bytes, float, int]):
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, '-c', _PROGRAM, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # what a grading function starts is killed with the worker
            # Workers are as many as cores; threads of a numerical library in each would only fight.
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'},
        )
        theirs.close()
        self.deadline = setup[1]
        self.ready = False
        self.sample: int | None = None  # index of the grading at work
        self.limit = time.monotonic() + _START_LIMIT  # when to give up on what it does now
        with suppress(OSError):  # it died at once; the closed connection tells
            self.connection.send(setup)

    @property
    def idle(self) -> bool:
        return self.ready and self.sample is None

    def send(self, sample: int, pair: tuple[str, str]) -> None:
        self.sample = sample
        self.limit = time.monotonic() + self.deadline
        with suppress(OSError):
            self.connection.send(pair)

    def end(self, patience: float) -> int:
        """Lets the process end by itself for `patience` seconds, then kills it, and all of its group in any event.

        Returns its exit code.
        """
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says it of a zombie
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _pickle_by_name(grade: Callable[[str, str], float]) -> bytes:
    try:
        pickled = pickle.dumps(grade)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{grade!r} cannot be sent to a worker ({error}); expected a function of a module or a method of a '
            'picklable object. Move it to a module, or set deadline=None if it cannot hang.'
        ) from None
    if b'__main__' in pickled:
        raise ValueError(
            f'{grade!r} is defined in the main script or a notebook, which workers do not import; move it to a module, '
            'or set deadline=None if it cannot hang.'
        )
    return pickled
