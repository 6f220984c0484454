"""The sandbox: programs that try to get out of bubblewrap's, and the client of a service."""

import ast
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from isolation import require_bubblewrap
from patience import patience

from troll_jax.data.tasks.eurus_code import EurusCode
from troll_jax.rewards import sandbox
from troll_jax.rewards.code import grade_code
from troll_jax.rewards.sandbox import Bubblewrap, Run, SandboxFusion, Unisolated
from troll_jax.rewards.worker import CannotGrade

# Generous for programs that end by themselves, since the machine may be busy; those that do not have a shorter limit.
BOX = Bubblewrap(case_seconds=30.0, memory_gb=0.5, output_mb=1.0, processes=4, disk_mb=8.0)
SHORT = 0.7 * patience()  # seconds


@pytest.fixture(scope='module')
def bubblewrap():
    require_bubblewrap()
    return BOX


def run(sandbox, program: str, given: str = '') -> Run:
    (result,) = sandbox.run([(program, given)])
    return result


def processes_of(sandbox: Bubblewrap) -> list[str]:
    """Command lines of what its `run` has started, known by the time limit; other tests may run at the same time."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            found.append((entry / 'cmdline').read_bytes().decode(errors='replace'))
        except OSError:
            continue
    return [line for line in found if '_sitebuiltins' in line and f'\0{sandbox.case_seconds}\0' in line]


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# --- what programs get

PROGRAMS = {
    'print(int(input()) * 2)': ('finished', '14\n'),
    'import sys\nprint(sys.stdin.read().strip() * 2)': ('finished', '77\n'),
    'print(open(0).read(), end="")': ('finished', '7\n'),
    'print(open("/dev/stdin").read(), end="")': ('finished', '7\n'),
    'if __name__ == "__main__":\n    print(1)\n    exit()': ('finished', '1\n'),
    'import threading\nthreading.Timer(0.05, lambda: print("late")).start()': ('finished', 'late\n'),
    'import atexit\natexit.register(print, "end")': ('finished', 'end\n'),
    'print("é\u05d0")': ('finished', 'é\u05d0\n'),
    'open("note", "w").write("5")\nprint(open("note").read())': ('finished', '5\n'),
    'print(1)\n1 / 0': ('failed', '1\n'),
    'def': ('failed', ''),
    'print("\0")': ('failed', ''),
    'import sys\nsys.exit(3)': ('failed', ''),
    'import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)': ('failed', ''),
    'def f(): f()\nf()': ('failed', ''),
}


@pytest.mark.parametrize('make', [lambda: BOX, lambda: Unisolated(30.0, 0.5, 1.0)], ids=['bubblewrap', 'unisolated'])
def test_programs_run_as_by_an_interpreter(make):
    """Guards against programs that are right and fail for what the sandbox does to input, threads or the exit."""
    if isinstance(make(), Bubblewrap):
        require_bubblewrap()
    for result, (program, expected) in zip(make().run([(p, '7\n') for p in PROGRAMS]), PROGRAMS.items(), strict=True):
        assert (result.status, result.output) == expected, (program, result)


@pytest.mark.parametrize('make', [lambda: BOX, lambda: Unisolated(30.0, 0.5, 1.0)], ids=['bubblewrap', 'unisolated'])
def test_limits_hold(make):
    """Guards against one program that takes all time, memory or output; those after it run as if nothing were."""
    if isinstance(make(), Bubblewrap):
        require_bubblewrap()
    attacks = [
        ('x = bytearray(10 * 2**30)', 'memory'),
        ('x = []\nwhile True: x.append(bytes(2**24))', 'memory'),
        ('for _ in range(1000): print("x" * 2**20)', 'output'),
        ('try:\n  for _ in range(1000): print("x" * 2**20)\nexcept OSError: pass', 'output'),
        ('import sys\nsys.stderr.write("x" * 2**30)', 'memory'),
        ('print(5)', 'finished'),
    ]
    results = list(make().run([(program, '') for program, _ in attacks]))
    assert [result.status for result in results] == [status for _, status in attacks]
    assert all(len(result.output) <= 2**20 and result.detail for result in results[:-1])
    hang = ['while True: pass', 'import time\ntime.sleep(1000)']
    results = list(replace(make(), case_seconds=SHORT).run([(program, '') for program in hang]))
    assert [result.status for result in results] == ['timeout'] * 2 and all(result.detail for result in results)


def test_closing_ends_what_runs(bubblewrap):
    """Guards against programs that outlive a grading that has seen enough."""
    box = replace(bubblewrap, case_seconds=30.53)
    with closing(box.run([('print(1)', ''), ('print(2)', '')])) as runs:
        assert next(runs).output == '1\n'
        assert len(processes_of(box)) == 2  # bubblewrap and the driver
    assert wait_until(lambda: not processes_of(box))


# --- escapes

READ_FILE = 'print(open({!r}).read())'


def test_files_of_the_host_are_out_of_reach(bubblewrap, tmp_path):
    """Guards against programs that read keys, tests or checkpoints, or change them."""
    secret = tmp_path / 'secret'
    secret.write_text('xyzzy')
    me = os.getpid()
    targets = ['/etc/shadow', '/etc/passwd', secret, Path(__file__), f'/proc/{me}/environ', '/proc/1/environ']
    targets += ['/proc/1/root/etc/shadow', '/proc/1/mem', '/proc/1/fd/0', os.path.expanduser('~/.ssh/id_rsa')]
    for result, target in zip(bubblewrap.run([(READ_FILE.format(str(t)), '') for t in targets]), targets, strict=True):
        assert result.status == 'failed', (target, result)
        assert any(word in result.detail for word in ('FileNotFoundError', 'PermissionError')), (target, result)
    see = 'import os\nfor path in ("/", "/tmp"): print(os.listdir(path))\n'
    see += 'print([p for p in os.listdir("/proc") if p.isdigit()])'
    result = run(bubblewrap, see)
    names, tmp, processes = map(ast.literal_eval, result.output.splitlines())
    assert not {'home', 'work', 'var', 'sys', 'run', 'mnt'} & set(names) and tmp == [] and len(processes) == 2


def test_nothing_of_the_host_can_be_written(bubblewrap, tmp_path):
    for folder in (tmp_path, '/usr', '/usr/bin', '/etc', '/dev', '/', '/proc/sys/kernel', sys.base_prefix):
        result = run(bubblewrap, f'open("{folder}/planted", "w").write("x")')
        assert result.status == 'failed' and 'Error' in result.detail, (folder, result)
        assert not (Path(folder) / 'planted').exists()


def test_the_network_is_out_of_reach(bubblewrap):
    """Guards against programs that send data out, or fetch an answer."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        connect = f'import socket\nsocket.create_connection(("127.0.0.1", {port}), 20)\nprint("in")'
        assert run(Unisolated(30.0), connect).output == 'in\n'  # without a sandbox it works
        server.accept()[0].close()
        result = run(bubblewrap, connect)
        assert result.status == 'failed' and 'Error' in result.detail
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    interfaces = run(bubblewrap, 'import socket\nprint([name for _, name in socket.if_nameindex()])')
    assert interfaces.output == "['lo']\n"


def test_a_fork_bomb_stays_small(bubblewrap):
    """Guards against a machine without free process ids; also of threads, and of one that catches its errors."""
    bombs = [
        'import os\nwhile True: os.fork()',
        'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass',
        'import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()',
    ]
    short = replace(bubblewrap, case_seconds=SHORT)
    results = [run(box, bomb) for bomb, box in zip(bombs, (bubblewrap, short, bubblewrap), strict=True)]
    assert [result.status for result in results] == ['failed', 'timeout', 'failed'], results
    count = 'import os, time\nn = 0\ntry:\n  while os.fork(): n += 1\n  time.sleep(9)\nexcept OSError: print(n)'
    assert int(run(bubblewrap, count).output) < 4


def test_the_disk_cannot_be_filled(bubblewrap):
    """Guards against a /tmp or /dev/shm that holds all of the host's memory."""
    fill = (
        'n = 0\n'
        'try:\n'
        '  while True:\n'
        '    with open(f"FOLDER/{n}", "wb") as file: file.write(bytes(2**19))\n'
        '    n += 1\n'
        'except OSError: print(n)'
    )
    assert 10 < int(run(bubblewrap, fill.replace('FOLDER', '/tmp')).output) <= 16  # of half a MiB
    assert run(bubblewrap, fill.replace('FOLDER', '/dev/shm')).output == '0\n'
    hidden = 'import os\nx = []\nwhile True:\n  x.append(os.memfd_create(""))\n  os.write(x[-1], bytes(2**20 - 1))'
    assert 'Too many open files' in run(bubblewrap, hidden).detail  # 64 files of 1 MiB at most


def test_nothing_outlives_its_program(bubblewrap):
    """Guards against daemons: a double fork in a session of its own, which no signal to a group reaches."""
    daemon = (
        'import os, time\n'
        'if os.fork() == 0:\n'
        '  os.setsid()\n'
        '  if os.fork() == 0:\n'
        '    time.sleep(1000)\n'
        '  os._exit(0)\n'
        'time.sleep(0.1)\nprint("left")'
    )
    see = 'import os\nprint([p for p in os.listdir("/proc") if p.isdigit()])'
    box = replace(bubblewrap, case_seconds=30.54)
    first, second = box.run([(daemon, ''), (see, '')])
    assert first.output == 'left\n' and len(ast.literal_eval(second.output)) == 2
    assert wait_until(lambda: not processes_of(box))


def test_a_killed_caller_takes_its_programs_along(bubblewrap):
    """Guards against programs that go on when a grading worker was killed at its deadline."""
    box = replace(bubblewrap, case_seconds=61.5)
    pid = os.fork()
    if pid == 0:
        list(box.run([('import time\ntime.sleep(50)', '')]))
        os._exit(0)
    assert wait_until(lambda: len(processes_of(box)) == 3)  # bubblewrap, the driver and its fork
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert wait_until(lambda: not processes_of(box))


def test_the_driver_cannot_be_touched(bubblewrap):
    """Guards against a program that takes over what runs it, by signals or as its debugger, and then its limits."""
    signals = (
        'import os, signal\nfor s in (9, 19, 15, 2, 11):\n  try: os.kill(1, s)\n  except OSError: pass\nprint("sent")'
    )
    group = f'import os\nos.kill({os.getpid()}, 9)'
    attach = (
        'import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n'
        'print([libc.ptrace(how, 1, 0, 0) for how in (16, 0x4206)], ctypes.get_errno())'
    )
    privileged = 'import os\nfor call in (lambda: os.setuid(0), lambda: os.chroot("/tmp"), lambda: os.nice(-5)):\n'
    privileged += '  try: call(); print("in")\n  except OSError: pass'
    results = list(bubblewrap.run([(p, '') for p in (signals, group, attach, privileged, 'print("alive")')]))
    assert results[0].output == 'sent\n' and results[4].output == 'alive\n'
    assert results[1].status == 'failed' and 'ProcessLookupError' in results[1].detail
    assert results[2].output == '[-1, -1] 1\n'  # EPERM
    assert results[3].output == ''


def test_a_program_has_no_namespace_of_its_own(bubblewrap):
    """Guards against a file system without a size limit, which whoever has a namespace can mount."""
    unshare = (
        'import ctypes\nlibc = ctypes.CDLL(None)\n'
        'print(libc.unshare(0x10000000), libc.unshare(0x10020000), libc.unshare(0x20000))\n'
        'print([line.split()[1] for line in open("/proc/self/status") if line[:6] in ("CapEff", "CapPrm")])'
    )
    assert run(bubblewrap, unshare).output == "-1 -1 -1\n['0000000000000000', '0000000000000000']\n"


def test_a_sandbox_that_is_not_there_is_an_error(monkeypatch, tmp_path):
    """Guards against programs that run unisolated because bubblewrap is missing or does not work."""
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(CannotGrade, match=r'Bubblewrap cannot run programs here[\s\S]*apt install bubblewrap'):
        Bubblewrap().check()
    (tmp_path / 'bwrap').write_text('#!/bin/sh\necho "No permissions to create new namespace" >&2\nexit 1\n')
    (tmp_path / 'bwrap').chmod(0o755)
    with pytest.raises(CannotGrade, match='No permissions to create new namespace[\\s\\S]*user namespaces'):
        Bubblewrap().check()


def test_a_sandbox_that_hangs_at_its_start_is_an_error(monkeypatch, tmp_path):
    """Guards against a machine out of order that looks like programs that take too long: by a limit past the pool's
    deadline, or by waiting for what a killed starter left behind."""
    (tmp_path / 'bwrap').write_text(f'#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/pid\nwait\n')
    (tmp_path / 'bwrap').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    for box in (Bubblewrap(case_seconds=0.1), Unisolated(0.1)):
        assert EurusCode(sandbox=box, program_seconds=0.1).deadline > sandbox._START_LIMIT + 1
    monkeypatch.setattr(sandbox, '_START_LIMIT', 0.5)
    begin = time.monotonic()
    with pytest.raises(CannotGrade, match=r'did not start a program: no answer in time \(limit: 0.5 s\)'):
        run(Bubblewrap(), 'print(1)')
    assert time.monotonic() - begin < 60
    if (tmp_path / 'pid').exists():
        os.kill(int((tmp_path / 'pid').read_text()), 9)


def test_a_slow_start_takes_no_time_from_a_program(monkeypatch, tmp_path):
    """Guards against programs that fail because the machine was busy when their sandbox was made."""
    require_bubblewrap()
    (tmp_path / 'bwrap').write_text(f'#!/bin/sh\nsleep {2.0 * patience()}\nexec {shutil.which("bwrap")} "$@"\n')
    (tmp_path / 'bwrap').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    tests = json.dumps({'inputs': ['', ''], 'outputs': ['1', '1']})
    grade = grade_code('```python\nprint(1)\n```', tests, sandbox=BOX, program_seconds=1.9 * patience())
    assert grade.reward == 1.0, grade


@pytest.mark.parametrize('arguments', [{'case_seconds': 0}, {'memory_gb': -1}, {'disk_mb': float('nan')}])
def test_limits_are_above_zero(arguments):
    with pytest.raises(ValueError, match='expected a finite number above zero'):
        Bubblewrap(**arguments)


# --- a service


class Service(BaseHTTPRequestHandler):
    """SandboxFusion's protocol, with programs that really run; or what `server.answers` says, in turn."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.requests.append((self.path, body))
        answer = self.server.answers.pop(0) if self.server.answers else self.server.usual
        if answer == 'hang':
            time.sleep(1.5)
            return
        if answer == 'trickle':
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b' ')
                time.sleep(0.05)
            return
        content = answer if isinstance(answer, bytes) else json.dumps(self.run(body)).encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        self.wfile.write(content)

    def run(self, body: dict) -> dict:
        (result,) = Unisolated(case_seconds=body['run_timeout']).run([(body['code'], body['stdin'])])
        result = result._replace(output=result.output[: self.server.cut])
        status = 'TimeLimitExceeded' if result.status == 'timeout' else 'Finished'
        code = None if result.status == 'timeout' else int(result.status != 'finished')
        command = {'status': status, 'execution_time': 0.1, 'return_code': code, 'stdout': result.output}
        command['stderr'] = f'Traceback\n{result.detail}\n'
        return {
            'status': 'Success' if code == 0 else 'Failed',
            'message': '',
            'compile_result': None,
            'run_result': command,
            'executor_pod_name': None,
            'files': {},
        }

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr('troll_jax.rewards.sandbox._pause', lambda attempt: 0.01)
    monkeypatch.setattr('troll_jax.rewards.sandbox._SERVICE_GRACE', 20.0)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with ThreadingHTTPServer(('127.0.0.1', 0), Service) as server:
        server.requests, server.answers, server.usual, server.cut = [], [], 200, None
        server.url = f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_protocol_of_a_service(service):
    """Guards against a client that reads what no service writes; names are those of SandboxFusion."""
    box = SandboxFusion(service.url + '/', case_seconds=1.0 + SHORT, memory_gb=0.5)
    box.check()
    programs = ['print(input())', '1 / 0', 'while True: pass', 'raise MemoryError']
    results = list(box.run([(program, 'é') for program in programs]))
    assert [r.status for r in results] == ['finished', 'failed', 'timeout', 'memory']
    assert results[0].output == 'é\n' and 'ZeroDivisionError' in results[1].detail
    path, body = service.requests[1]
    assert path == '/run_code'
    assert body == {
        'code': 'print(input())',
        'language': 'python',
        'stdin': 'é',
        'compile_timeout': box.case_seconds,
        'run_timeout': box.case_seconds,
        'memory_limit_MB': 512,
    }


def test_a_service_that_stumbles_is_asked_again(service):
    """Guards against a run that ends for one lost packet."""
    service.answers = [503, b'<html>', b'{"status": "SandboxError"}', 200]
    assert run(SandboxFusion(service.url), 'print(3)').output == '3\n'
    assert len(service.requests) == 4


@pytest.mark.parametrize(
    'usual, message',
    [
        (500, 'HTTP Error 500'),
        (404, 'HTTP Error 404'),
        (400, r'refused with HTTP 400. It does not run print\(input\(\)\) either'),
        (422, r'refused with HTTP 422. It does not run print\(input\(\)\) either'),
        (b'garbage', 'not of the protocol.*garbage'),
        (b'[]', 'not of the protocol'),
        (b'{"status": "Success"}', 'not of the protocol'),
        (b'{"status": "Success", "run_result": {"status": "Finished"}}', 'not of the protocol'),
        (b'{"status": "SandboxError", "message": "disk full"}', 'disk full.* It does not run print'),
        (b'{"status": "Failed", "run_result": {"status": "Error", "stderr": "no python"}}', 'no python.* It does not'),
        ('hang', 'did not answer 2 times, the last time with TimeoutError'),
        ('trickle', 'did not answer 2 times, the last time with TimeoutError: the reply did not end within'),
    ],
)
def test_a_service_that_is_out_of_order_is_an_error(service, monkeypatch, usual, message):
    """Guards against zeros for rewards while nothing is graded: whatever a service says, if it says it always."""
    if usual in ('hang', 'trickle'):
        monkeypatch.setattr(sandbox, '_SERVICE_GRACE', 0.3)
    service.usual = usual
    with pytest.raises(CannotGrade) as error:
        run(SandboxFusion(service.url, case_seconds=0.2, attempts=2), 'print(3)')
    assert re.search(message, str(error.value)) and service.url in str(error.value)
    assert 'Look at its log, restart it, or change SandboxFusion.url' in str(error.value)


def test_a_service_that_is_down_is_an_error(service):
    service.shutdown()
    service.server_close()
    with pytest.raises(CannotGrade, match=r'SandboxFusion cannot run programs here[\s\S]*Is the service up'):
        SandboxFusion(service.url, attempts=2).check()


@pytest.mark.parametrize(
    'answers, status',
    [
        ([413], 'failed'),
        ([422], 'failed'),
        ([b'{"status": "SandboxError", "message": "no"}'] * 2, 'failed'),
        ([b'x' * 2000], 'output'),
    ],
)
def test_a_program_cannot_end_the_run(service, monkeypatch, answers, status):
    """Guards against programs that a service refuses or fails at, and ones that print more than is read of a reply, by
    which a policy could stop its own training."""
    monkeypatch.setattr(sandbox, '_LARGEST_REPLY', 2000)
    service.answers = list(answers)
    result, after = SandboxFusion(service.url, attempts=2).run([('print(3)', ''), ('print(4)', '')])
    assert result.status == status and result.detail and after.output == '4\n'


def test_output_that_a_service_cuts_is_no_fault_of_a_program(service):
    """Guards against zeros for right programs with much output, of which a service keeps 160,910 characters and says
    that they finished, or lets them wait for a full pipe; and against programs that get out of a 0 by printing much."""
    box = SandboxFusion(service.url, case_seconds=1.0 + SHORT)
    tests = json.dumps({'inputs': [''], 'outputs': ['\n'.join(map(str, range(40_000)))]})
    short = json.dumps({'inputs': [''], 'outputs': ['0\n1']})
    call = json.dumps({'inputs': [[]], 'outputs': [5], 'fn_name': 'f'})
    grade = lambda program, tests=tests: grade_code(program, tests, sandbox=box, program_seconds=60.0).reward
    right = 'print(*range(40_000), sep="\\n", flush=True)\n'
    assert grade(right) == 1.0
    service.cut = 160_910
    for program in (right, right + 'import time\ntime.sleep(99)'):
        with pytest.raises(RuntimeError, match='may have cut its output after 160910 characters'):
            grade(program)
    with pytest.raises(RuntimeError, match='may have cut'):
        grade('print("x" * 200_000, flush=True)\ndef f(): return 5', call)
    assert grade(right, short) == grade(right.replace('range(', 'range(1, ')) == 0.0
    assert grade('print("x" * 200_000)') == grade('print()') == 0.0


def test_a_url_is_a_url():
    with pytest.raises(ValueError, match="expected e.g. 'http://localhost:8080'"):
        SandboxFusion('localhost:8080')
