"""The inside of a sandbox: runs Python programs one after another, each in a process of its own.

A bare interpreter gets this file as text (`python -I -S -c`), so it uses the standard library alone and little of it. A
program is then a fork of it. It knows no expected output, so that whoever takes it over can only say what a program
could have printed anyway. The exception are asserts that `rewards.code` cannot compare outside (`AssertTest`): they are
part of the source, and a program can read in its own process all that is there, whatever the driver did to hide it.

In bubblewrap's sandbox it is the init process: what a program leaves running is killed when the program has ended.

Over stdin and stdout, with lengths of 4 bytes:
    driver: b'ready'
    caller: length, source, length, standard input
    driver: wait status (−1: killed at the time limit), length, standard output, length, end of standard error
"""

import _sitebuiltins
import builtins
import ctypes
import gc
import importlib
import math
import os
import resource
import select
import signal
import struct
import sys
import time
import types

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4  # linux/prctl.h
libc = ctypes.CDLL(None)
CLONE_NEWUSER, CAPABILITY_VERSION_3 = 0x10000000, 0x20080522  # linux/sched.h, linux/capability.h
# What programs are given (`rewards.code`), so that not each of them has to load it.
MODULES = (
    'typing string re datetime collections heapq bisect copy math random statistics itertools functools operator io '
    'json linecache'
).split()
STACK = 2**27  # bytes; the kernel keeps as much address space free, whatever the limit was at the start
TAIL = 2000  # bytes of standard error that are kept


def serve(seconds: float, memory: int, processes: int, output: int, user: int) -> bytes:
    """Answers the caller until it closes the pipe. Returns in the processes of programs only, with the source to run.

    Args:
        seconds: time limit of one program, of wall clock and of CPU.
        memory: address space of one process, in bytes.
        processes: processes and threads that a program may have at a time; 0 for no limit.
        output: largest file, and so largest output, in bytes.
        user: user id to become, for a sandbox that is started by root; 0 to stay.
    """
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        enter_namespace()
    protect(dumpable=False)  # from programs, which have the same user
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 64)  # also bounds what files without a name can hold
    limit(resource.RLIMIT_STACK, STACK)  # of programs; what an interpreter starts with ends deep recursion
    if sys.platform == 'linux':
        limit(resource.RLIMIT_AS, memory)
    if processes:
        limit(resource.RLIMIT_NPROC, processes + 1)
    sys.path.append('/packages')  # which bubblewrap's has
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # or the end of each program would look through all of these
    write(b'ready')
    while True:
        source, given = read_block(), read_block()
        files = [open_file(given), open_file(b''), open_file(b'')]
        pid = os.fork()
        if not pid:
            become_program(files, seconds, output)
            return source
        status = wait(pid, time.monotonic() + seconds)
        kill_all_of(pid)
        reply = struct.pack('!i', -1 if status is None else status)
        for file, size in zip(files[1:], (output, TAIL), strict=True):
            start = max(0, os.fstat(file).st_size - size) if size == TAIL else 0
            content = os.pread(file, size, start)
            reply += struct.pack('!I', len(content)) + content
        for file in files:
            os.close(file)
        write(reply)


def enter_namespace() -> None:
    """Goes into a namespace of users that has no user and gives no capability: in it nobody can make another.

    In one of its own a program could mount a file system without a limit. Where the kernel refuses, it cannot either.
    """
    if libc.unshare(CLONE_NEWUSER) == 0:
        header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        if libc.capset(header, none) != 0:
            raise OSError('capabilities cannot be given up')


def become_program(files: list[int], seconds: float, output: int) -> None:
    os.setsid()
    for i, file in enumerate(files):
        os.dup2(file, i)
    os.closerange(3, 64)
    protect(dumpable=True)  # or /dev/stdin would be another user's
    cpu = math.ceil(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    limit(resource.RLIMIT_FSIZE, output)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores: a program could continue after the error
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        file = open(
            ('stdin', 'stdout', 'stderr').index(name), mode, encoding='utf-8', errors='surrogateescape', closefd=False
        )
        setattr(sys, name, file)
        setattr(sys, f'__{name}__', file)
    builtins.exit, builtins.quit = (_sitebuiltins.Quitter(name, 'Ctrl-D') for name in ('exit', 'quit'))
    sys.argv = ['program.py']


def protect(*, dumpable: bool) -> None:
    """Ends this process with its parent, and keeps others of its user from reading or changing it if not dumpable.

    The first needs the same user. Where that differs, because root has started the sandbox, `wait` notices.
    """
    if sys.platform == 'linux':
        prctl = libc.prctl
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def wait(pid: int, end: float) -> int | None:
    """The wait status of a child, or None at `end`, or if the caller has gone.

    Waits for orphans, too, which the init process inherits.
    """
    caller = select.poll()
    caller.register(0, select.POLLIN)  # it sends nothing until it has its reply, so this is its end
    delay = 1
    while True:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done == pid:
            return status
        left = 1000 * (end - time.monotonic())
        if left <= 0 or not done and caller.poll(min(delay, left)):
            return None
        delay = min(2 * delay, 16)


def kill_all_of(pid: int) -> None:
    try:
        if os.getpid() == 1:  # of a process namespace: everything else in it
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def open_file(content: bytes) -> int:
    """A file without a name that holds `content`."""
    if hasattr(os, 'memfd_create'):
        file = os.memfd_create('')
    else:
        file = os.open('unnamed', os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.unlink('unnamed')
    write(content, file)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def read_block() -> bytes:
    return read(struct.unpack('!I', read(4))[0])


def read(size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        chunk = os.read(0, min(size - len(content), 2**16))
        if not chunk:
            os._exit(0)  # the caller has seen enough
        content += chunk
    return bytes(content)


def write(content: bytes, file: int = 1) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


if __name__ == '__main__':
    program = serve(float(sys.argv[1]), *map(int, sys.argv[2:]))
    # At the top level, so that the end of a program is the end of an interpreter: threads, buffers, exit code.
    driver = sys.modules['__main__']
    sys.modules['__main__'] = main = types.ModuleType('__main__')
    exec(compile(program, 'program.py', 'exec'), main.__dict__)
