"""Sandboxes for programs that a model wrote: bubblewrap, a SandboxFusion service, or no isolation.

A sandbox runs programs and returns what they printed. The output is graded outside, since a program could change
whatever is decided next to it.

It bounds the damage of honest mistakes and of a policy's tricks. docs/decisions.md says what it does not protect from.
"""

import json
import math
import os
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from signal import Signals
from typing import NamedTuple, Protocol

from troll_jax.rewards.worker import CannotGrade

_START_LIMIT = 30.0  # seconds until a sandbox that has not started is an error, which no program is to blame for
_GRACE = 3.0  # seconds past the time limit that the inside of a sandbox has to say so
_SERVICE_GRACE = 10.0  # the same for a service: queues and networks
_LARGEST_REPLY = 2**28  # bytes of a service's reply
# Bytes of standard output from which on SandboxFusion may have cut it, or let the program wait for the rest to be read.
_SERVICE_BUFFER = 2**17
# Ids from here on are nobody's. Each sandbox that root starts gets its own, as the kernel counts processes by user, and
# those of a sandbox that has just been killed for some milliseconds more.
_FIRST_USER = 2**31
_sandboxes = count()
_REFUSED_CASES = (400, 413, 422)  # HTTP: what is wrong may be in the case, and a program must not stop a run with it
_KNOWN = ('print(input())', 'ready'), 'ready'  # a case, and what it prints
_SERVICE_ADVICE = (
    'Is the service up, of the protocol of SandboxFusion, and large enough for all workers? Look at its log, restart '
    'it, or change SandboxFusion.url.'
)


class Run(NamedTuple):
    """The result of one program on one input."""

    status: str  # 'finished', or why not: 'failed', 'timeout', 'memory', 'output'; 'cut' if the sandbox cut its output
    output: str  # what it printed
    detail: str = ''  # for people


class Sandbox(Protocol):
    """Something that runs Python programs. Workers get it pickled."""

    longest_case: float
    """Seconds after which `run` has said something about a case in any event, the start of the sandbox included."""

    def check(self) -> None:
        """Raises a `CannotGrade` that says what to do if programs cannot be run."""

    def run(self, cases: Iterable[tuple[str, str]]) -> Iterator[Run]:
        """Runs (source, standard input) one after another, each when its result is asked for.

        The first case is taken from `cases` when the sandbox has started.

        May end early, if a program took the sandbox down. Close the iterator to end what still runs.

        Raises:
            CannotGrade: the sandbox is out of order.
        """


@dataclass(frozen=True)
class _Limits:
    """Limits of a program.

    Args:
        case_seconds: time limit of one case, of wall clock and of CPU.
        memory_gb: address space of one process, in GiB.
        output_mb: largest file, and so largest output, in MiB.
    """

    case_seconds: float = 10.0
    memory_gb: float = 1.0
    output_mb: float = 16.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise ValueError(f'{type(self).__name__}.{name} is {value}; expected a finite number above zero.')

    @property
    def longest_case(self) -> float:
        return _START_LIMIT + self.case_seconds + _GRACE + 1.0  # that said what went wrong

    def _driver(self, processes: int, user: int) -> list[str]:
        """The command of a driver, with its limits."""
        source = Path(__file__).with_name('driver.py').read_text()
        limits = (self.case_seconds, int(self.memory_gb * 2**30), processes, int(self.output_mb * 2**20), user)
        # Without `site`: its files may take longer than all the rest. Programs have the standard library.
        return [_interpreter(), '-I', '-S', '-B', '-X', 'utf8', '-c', source, *map(str, limits)]


@dataclass(frozen=True)
class Bubblewrap(_Limits):
    """Namespaces of Linux by `bwrap` (Debian and Ubuntu: `apt install bubblewrap`, 0.8 or later).

    A program sees /usr, the Python installation and NumPy, all read-only, and an empty /tmp. It has no network, no
    other process in sight, no privileges and its own limits.

    Args:
        processes: processes and threads of a program at a time. Kernels before 5.14 count those of the user.
        disk_mb: size of /tmp, in MiB.
    """

    processes: int = 16
    disk_mb: float = 64.0

    def check(self) -> None:
        _check(
            self,
            'Install it with `apt install bubblewrap` (0.8 or later). If it is there, the kernel or the container has '
            'to allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, '
            'kernel.apparmor_restrict_unprivileged_userns=0; docker run --privileged).',
        )

    def run(self, cases: Iterable[tuple[str, str]]) -> Iterator[Run]:
        bwrap = shutil.which('bwrap')
        if bwrap is None:
            raise CannotGrade('there is no `bwrap` in the PATH.')
        user = _FIRST_USER + os.getpid() % 2**22 * 2**8 + next(_sandboxes) % 2**8 if _is_root() else 0
        yield from _drive([bwrap, *self._walls(user), *self._driver(self.processes, user)], cases, self)

    def _walls(self, user: int) -> list[str]:
        # Root needs no namespace of users, and in one its processes would not be counted by the kernel. The driver
        # becomes a user of its own instead.
        apart = (
            ['--cap-drop', 'ALL', '--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
            if user
            else ['--unshare-user', '--disable-userns']
        )
        apart += ['--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts', '--unshare-cgroup-try']
        shown = ['--ro-bind', '/usr', '/usr', '--dir', '/etc']
        shown += ['--ro-bind-try', '/etc/ld.so.cache', '/etc/ld.so.cache']
        for path in ('/bin', '/lib', '/lib64', '/sbin'):
            if os.path.islink(path):
                shown += ['--symlink', os.readlink(path), path]
            else:
                shown += ['--ro-bind-try', path, path]
        python = os.path.realpath(sys.base_prefix)
        if not python.startswith('/usr/'):
            for parent in reversed(Path(python).parents[:-1]):
                shown += ['--dir', str(parent)]  # or only its owner could pass through it
            shown += ['--ro-bind', python, python]
        numpy = find_spec('numpy').submodule_search_locations[0]
        shown += ['--dir', '/packages']
        for path in (numpy, f'{numpy}.libs'):
            shown += ['--ro-bind-try', path, f'/packages/{os.path.basename(path)}']
        return [
            *('--die-with-parent', '--new-session', '--as-pid-1', '--clearenv', '--hostname', 'sandbox'),
            *apart,
            *shown,
            *('--proc', '/proc', '--dev', '/dev', '--remount-ro', '/dev'),
            *('--perms', '1777', '--size', str(int(self.disk_mb * 2**20)), '--tmpfs', '/tmp'),
            *('--remount-ro', '/', '--chdir', '/tmp', '--setenv', 'HOME', '/tmp', '--setenv', 'PATH', '/usr/bin:/bin'),
            *('--setenv', 'OMP_NUM_THREADS', '1', '--'),
        ]


@dataclass(frozen=True)
class Unisolated(_Limits):
    """No isolation: programs that a model wrote can do what the user of this process can.

    For machines that have nothing to lose. Time, memory (on Linux) and output are still limited.
    """

    def check(self) -> None:
        _check(self, 'Look at the error above.')

    def run(self, cases: Iterable[tuple[str, str]]) -> Iterator[Run]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield from _drive(self._driver(0, 0), cases, self, folder)


@dataclass(frozen=True)
class SandboxFusion:
    """A service with the protocol of SandboxFusion (github.com/bytedance/SandboxFusion): POST /run_code.

    Args:
        url: URL of the service, without /run_code.
        case_seconds: time limit of one case.
        memory_gb: memory limit of one case.
        attempts: attempts per case, until a service that does not answer ends the run. If it answers that it failed,
            or refuses a program, it gets a program that cannot fail: is it the service or the program?
    """

    url: str
    case_seconds: float = 10.0
    memory_gb: float = 1.0
    attempts: int = 4

    def __post_init__(self):
        if not self.url.startswith(('http://', 'https://')):
            raise ValueError(f"SandboxFusion.url is {self.url!r}; expected e.g. 'http://localhost:8080'.")
        if self.attempts < 1 or not 0 < self.case_seconds < math.inf or not 0 < self.memory_gb < math.inf:
            raise ValueError(f'expected limits above zero and at least one attempt; got {self}.')

    @property
    def longest_case(self) -> float:
        pauses = sum(map(_pause, range(self.attempts - 1)))
        return 2 * (self.attempts * (self.case_seconds + _SERVICE_GRACE) + pauses) + _GRACE

    def check(self) -> None:
        _check(self, 'Is the service up, and the URL right?')

    def run(self, cases: Iterable[tuple[str, str]]) -> Iterator[Run]:
        for case in cases:
            run = self._ask(*case)
            if run.status in ('sandbox error', 'refused'):
                known = self._ask(*_KNOWN[0])
                if not _is_known(known):
                    raise CannotGrade(
                        f'{self.url} answered {self.attempts} times: {run.detail}. It does not run print(input()) '
                        f'either: {known}. {_SERVICE_ADVICE}'
                    )
                run = run._replace(status='failed')
            yield run

    def _ask(self, source: str, given: str) -> Run:
        """The service's result of a case; its status may also be 'sandbox error' or 'refused'."""
        for attempt in range(self.attempts):
            last = attempt == self.attempts - 1
            try:
                reply = self._post(source, given)
                if len(reply) == _LARGEST_REPLY:
                    return Run('output', '', 'wrote too much')
                run = _read_reply(reply)
                if last or run.status != 'sandbox error':
                    return run
            except urllib.error.HTTPError as error:
                if error.code in _REFUSED_CASES:
                    return Run('refused', '', f'refused with HTTP {error.code}')
                if last or error.code < 500 and error.code not in (408, 429):
                    raise CannotGrade(f'{self.url} answered {error}. {_SERVICE_ADVICE}') from error
            except (OSError, HTTPException, ValueError) as error:
                if last:
                    raise CannotGrade(
                        f'{self.url} did not answer {self.attempts} times, the last time with '
                        f'{type(error).__name__}: {error}. {_SERVICE_ADVICE}'
                    ) from error
            time.sleep(_pause(attempt))
        raise AssertionError('the last attempt returns or raises')

    def _post(self, source: str, given: str) -> bytes:
        request = {
            'code': source,
            'language': 'python',
            'stdin': given,
            'compile_timeout': self.case_seconds,
            'run_timeout': self.case_seconds,
            'memory_limit_MB': int(self.memory_gb * 1024),
        }
        message = urllib.request.Request(
            f'{self.url.rstrip("/")}/run_code', json.dumps(request).encode(), {'Content-Type': 'application/json'}
        )
        limit = self.case_seconds + _SERVICE_GRACE
        end = time.monotonic() + limit
        content = bytearray()
        with urllib.request.urlopen(message, timeout=limit) as reply:
            while len(content) < _LARGEST_REPLY and (chunk := reply.read1(2**20)):
                content += chunk
                if time.monotonic() > end:  # the timeout above is of single reads
                    raise TimeoutError(f'the reply did not end within {limit} s')
        return bytes(content[:_LARGEST_REPLY])


def _pause(attempt: int) -> float:
    return 0.5 * 2**attempt


def _read_reply(reply: bytes) -> Run:
    """The result in a reply of SandboxFusion. Raises a ValueError if it is not of that protocol."""
    try:
        body = json.loads(reply)
        if body['status'] == 'SandboxError':
            return Run('sandbox error', '', f'error of the sandbox: {body.get("message")}'[:2000])
        if body['status'] not in ('Success', 'Failed'):
            raise ValueError(f'status {body["status"]!r}')
        result = body['run_result'] or body['compile_result']
        output, detail = result.get('stdout') or '', _last_line(result.get('stderr') or '')
        if result['status'] == 'Error':  # of what runs programs, not of a program
            return Run('sandbox error', '', f'error of the sandbox: {detail}')
        finished = result['status'] == 'Finished' and result['return_code'] == 0 and body['status'] == 'Success'
        if (finished or result['status'] == 'TimeLimitExceeded') and len(output.encode()) >= _SERVICE_BUFFER:
            return Run('cut', output, f'the service may have cut its output after {len(output)} characters')
        if result['status'] == 'TimeLimitExceeded':
            return Run('timeout', output, detail)
        if finished:
            return Run('finished', output)
        return Run('memory' if detail.startswith('MemoryError') else 'failed', output, detail)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'a reply that is not of the protocol ({type(error).__name__}: {error}): {reply[:200]!r}'
        ) from error


def _check(sandbox: Sandbox, advice: str) -> None:
    runs = sandbox.run([_KNOWN[0]])
    try:
        run = next(runs)
    except (CannotGrade, StopIteration) as error:
        raise CannotGrade(
            f'{type(sandbox).__name__} cannot run programs here: {error}\n{advice} Or choose another sandbox: '
            'Bubblewrap, SandboxFusion, or Unisolated, which lets the programs of a model do all that you can do.'
        ) from error
    finally:
        runs.close()
    if not _is_known(run):
        raise CannotGrade(f'{sandbox} was given print(input()) and "ready" to run, and came back with {run}. {advice}')


def _is_known(run: Run) -> bool:
    """True if a run is the right one of the case that every sandbox can run."""
    return run.status == 'finished' and run.output.strip() == _KNOWN[1]


def _drive(command: list[str], cases: Iterable[tuple[str, str]], limits: _Limits, folder: str | None = None):
    """Results of a driver that `command` starts."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={} if folder is None else {'HOME': folder, 'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1'},
            bufsize=0,
        )
    except OSError as error:
        raise CannotGrade(f'{command[0]!r} cannot be started: {error}.') from error
    with process:  # waits for its end, and closes the pipes
        try:
            try:
                _read(process.stdout, 5, time.monotonic() + _START_LIMIT)
            except (EOFError, TimeoutError) as error:
                process.kill()
                raise CannotGrade(
                    f'{command[0]!r} did not start a program: {_said(process.stderr) or error} (limit: '
                    f'{_START_LIMIT} s). Is the machine overloaded, or out of memory or processes?'
                ) from error
            for source, given in cases:
                end = time.monotonic() + limits.case_seconds + _GRACE
                try:
                    for text in (source, given):
                        block = text.encode(errors='backslashreplace')
                        process.stdin.write(struct.pack('!I', len(block)))
                        _write(process.stdin, block)
                    (status,) = struct.unpack('!i', _read(process.stdout, 4, end))
                    output, errors = (
                        _read(process.stdout, struct.unpack('!I', _read(process.stdout, 4, end))[0], end)
                        for _ in range(2)
                    )
                except TimeoutError:
                    yield Run('timeout', '', 'the sandbox did not answer')
                    return
                except (EOFError, OSError):
                    yield Run('failed', '', 'the sandbox died')
                    return
                yield _describe(status, output.decode(errors='replace'), errors.decode(errors='replace'))
        finally:
            process.kill()


def _describe(status: int, output: str, errors: str) -> Run:
    detail = _last_line(errors)
    if status == -1:
        return Run('timeout', output, 'killed at the time limit')
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return Run('finished', output)
    if code < 0:
        kinds = {'SIGXCPU': ('timeout', 'CPU time'), 'SIGXFSZ': ('output', 'wrote too large a file, or too much')}
        name = Signals(-code).name if -code in set(Signals) else str(-code)
        kind, detail = kinds.get(name, ('failed', f'killed by {name}'))
        return Run(kind, output, detail)
    return Run('memory' if detail.startswith('MemoryError') else 'failed', output, detail or f'exit code {code}')


def _last_line(errors: str) -> str:
    return errors.strip().rpartition('\n')[2][:500]


def _read(pipe, size: int, end: float) -> bytes:
    """Exactly `size` bytes, or a TimeoutError at `end`, or an EOFError."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    content = bytearray()
    while len(content) < size:
        if not poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
            raise TimeoutError('no answer in time')
        chunk = os.read(pipe.fileno(), min(size - len(content), 2**20))
        if not chunk:
            raise EOFError('it ended')
        content += chunk
    return bytes(content)


def _said(pipe) -> str:
    """The content of a pipe, without waiting for its end: a process that was left behind may hold the other one."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return os.read(pipe.fileno(), 2000).decode(errors='replace').strip() if poll.poll(500) else ''


def _write(pipe, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[pipe.write(rest) :]


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


@cache
def _is_root() -> bool:
    """Root of the machine, not of a namespace of users with a few ids."""
    try:
        return os.geteuid() == 0 and Path('/proc/self/uid_map').read_text().split() == ['0', '0', str(2**32 - 1)]
    except OSError:
        return False
