"""Several processes of one run, of which one is killed or told to stop: the others end, and the next start goes on.

    python -m tests.faults.processes [--processes 2 4] [--kills 5] [--seed 0] [--folder DIR]

All that a run can have is in it: critic, reference model, dynamic sampling, evaluation, parts of the model on every
process (fsdp and tensor axes). One process with as many devices runs it first. The last line is JSON.
"""

import argparse
import functools
import json
import os
import random
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import experiments.plumbing.run
import troll_jax.collect
import troll_jax.learn
import troll_jax.models.hf_weights
from experiments import evaluate, train
from experiments.plumbing.command import begin, command_line
from experiments.plumbing.run import TrainingRun
from troll_jax.checkpoint import Checkpoints
from troll_jax.rewards.pool import Grader
from troll_jax.settings import Compute
from troll_jax.sharding import checksum, named_sharding, place, send

from .runs import Process, everything, rows, whole_steps
from .soak import write_model

DEVICES = 4
MESH = ('Compute.fsdp = 2', 'Compute.tensor = 2')
SIMPLE = ('quickstart', 'clip')
FULL = (
    'quickstart',
    'ppo',
    'Method.regularisers = [@kl_to_reference]',
    'kl_to_reference.coefficient = 0.01',
    'Method.refresh_reference_every = 2',
    'Sampling.max_draws = 2',
    'Run.evaluate_every = 2',
    'critic/adamw.learning_rate = 1e-3',
)
MOMENTS = ('saving', 'rollout', 'update', 'grading', 'restoring')
# What ends a process after another has died: an error in what it was doing with the dead one, or the news from JAX.
TOLD = re.compile('the run ends, the first error of its processes says why|another task died')
LONGEST = 120  # seconds after which none may be left when one has died: two of JAX's limits, on a busy machine


def mark(name: str, value: int = 0) -> None:
    os.write(1, f'\nMARK {name} {value}\n'.encode())


def watched(owner, name: str, moment: str, value: Callable[..., int] = lambda *_, **__: 0) -> None:
    """Has a function write to the log that it is called."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args, **kwargs):
        mark(moment, value(*args, **kwargs))
        return function(*args, **kwargs)

    setattr(owner, name, call)


def prepare(devices: int) -> None:
    jax.config.update('jax_num_cpu_devices', devices)
    watched(troll_jax.collect, 'sample_responses', 'rollout')
    watched(Grader, '__call__', 'grading', lambda _, responses, *__: len(responses))
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    watched(troll_jax.learn, 'place_parts', 'update', lambda rows, *_: size(rows))
    watched(troll_jax.learn.Learner, 'pack', 'packing', lambda _, rollout, *__: size(rollout.support))
    watched(TrainingRun, 'record', 'learnt')
    watched(Checkpoints, 'save', 'saving')
    watched(experiments.plumbing.run, 'restore_or_init', 'restoring')
    read = troll_jax.models.hf_weights._Stored.__getitem__

    def counted(stored, index) -> np.ndarray:
        values = read(stored, index)
        mark('read', values.size)
        return values

    troll_jax.models.hf_weights._Stored.__getitem__ = counted


def send_weights() -> None:
    """A command: sends arrays between meshes, and says of each pair whether all that arrived is in its place."""
    begin(command_line('', 'folder', '').parse_args())
    x = np.random.default_rng(0).normal(size=(3, 24, 24)).astype(np.float32)
    tree, axes = {'a': x, 'b': x[0].astype(jnp.bfloat16)}, {'a': ('layers', 'embed', 'mlp'), 'b': ('vocab', 'embed')}
    for n, settings in [(4, {'tensor': 2}), (4, {'fsdp': 4, 'context': 2}), (6, {'tensor': 2}), (5, {})]:
        try:
            compute = Compute(rollout_devices=n, **settings)
            source, target = compute.mesh, compute.rollout_mesh
        except ValueError as error:
            print(f'{n}: {error}', flush=True)
            continue
        with jax.set_mesh(source):
            params = {name: place(tree[name], source, axes[name]) for name in tree}
            sent = send(params, {name: named_sharding(target, axes[name]) for name in tree})
            expected = int(checksum(params))
        shards = [(name, shard) for name in tree for shard in sent[name].addressable_shards]
        with jax.set_mesh(target):
            same = int(checksum(sent)) == expected
        mark('sent', int(same and all(np.array_equal(shard.data, tree[name][shard.index]) for name, shard in shards)))
    jax.distributed.shutdown()  # the first process serves the others: it must be the last to end


class Together:
    """The processes of one command, which have all devices among them."""

    def __init__(
        self,
        run_dir: Path,
        processes: int,
        *arguments: str,
        command: Callable[[], None] = train.main,
        before: Callable[[int], None] = prepare,
        devices: int = DEVICES,
    ):
        with socket.socket() as free:
            free.bind(('localhost', 0))
            address = f'localhost:{free.getsockname()[1]}'
        where = lambda i: ['--coordinator', address, '--num-processes', str(processes), '--process-id', str(i)]
        self.all = [
            Process(
                run_dir,
                run_dir.parent / 'model',
                *(argument for argument in arguments if not argument.endswith('.gin')),
                files=[argument for argument in arguments if argument.endswith('.gin')],
                options=where(i) if processes > 1 else (),
                name=f'_{i}',
                before=functools.partial(before, devices // processes),
                command=command,
            )
            for i in range(processes)
        ]

    def said(self, i: int) -> str:
        return self.all[i].log.read_text(errors='replace')

    def told(self, i: int) -> bool:
        return bool(TOLD.search(self.said(i)))

    def marks(self, i: int, name: str) -> list[int]:
        return [int(x) for x in re.findall(rf'^MARK {name} (\d+)$', self.said(i), re.MULTILINE)]

    def wait_for(self, i: int, name: str, count: int = 1) -> None:
        assert self.all[i].wait_for(lambda: len(self.marks(i, name)) >= count), self.said(i)[-3000:]

    def end(self, seconds: float) -> list[tuple[int, float]]:
        """The exit code of each process, negative for a signal, and after how many seconds it ended."""
        begin, ended = time.monotonic(), {}
        while len(ended) < len(self.all):
            for i, process in enumerate(self.all):
                if i not in ended:
                    pid, status = os.waitpid(process.pid, os.WNOHANG)
                    if pid:
                        ended[i] = os.waitstatus_to_exitcode(status), time.monotonic() - begin
            if time.monotonic() - begin > seconds:
                hung = sorted(set(range(len(self.all))) - set(ended))
                for i in hung:
                    os.kill(self.all[i].pid, signal.SIGKILL)
                    os.waitpid(self.all[i].pid, 0)
                raise AssertionError(f'{hung} have not ended in {seconds} s: {self.said(hung[0])[-3000:]}')
            time.sleep(0.01)
        return [ended[i] for i in range(len(self.all))]

    def signal(self, i: int, number: int) -> None:
        os.kill(self.all[i].pid, number)

    def kill(self, i: int) -> None:
        self.signal(i, signal.SIGKILL)

    def finish(self) -> None:
        for i, (code, _) in enumerate(self.end(300)):
            assert code == 0, self.said(i)[-3000:]


def started_at(folder: Path) -> int:
    """The step from which the next start goes on."""
    return (whole_steps(folder) or [0])[-1]


def kill_many(folder: Path, processes: int, kills: int, generator: random.Random) -> list[dict]:
    """Kills one process after another, each in a run that has got further, and then lets the run end."""
    killed, found = folder / f'killed_{processes}', []
    settings = (*SIMPLE, *MESH, f'Run.steps = {2 * kills + 2}')
    for i in range(kills):
        moment, victim = MOMENTS[i % len(MOMENTS)], i % processes  # the first process is special: the others meet there
        before = started_at(killed)
        together = Together(killed, processes, *settings)
        together.wait_for(victim, moment, 1 if moment == 'restoring' else 2)  # the second save is of the second step
        time.sleep(generator.uniform(0, 0.1))
        together.kill(victim)
        ended = together.end(LONGEST)
        others = [ended[j] for j in range(processes) if j != victim]
        assert all(code for code, _ in others), f'ended as if nothing had happened: {ended}'
        seconds = max(s for _, s in others)
        found.append({'moment': moment, 'victim': victim, 'seconds': round(seconds, 1), 'codes': [c for c, _ in ended]})
        found[-1] |= {'told': all(together.told(j) for j in range(processes) if j != victim)}
        found[-1] |= {'steps': [before, started_at(killed)]}
        assert started_at(killed) >= before
        print(processes, 'processes', found[-1], flush=True)
    Together(killed, processes, *settings).finish()
    return found


def stop(folder: Path, processes: int, victims: list[int]) -> list[int]:
    """Sends SIGTERM to some processes: all must end well at the same step. Returns the steps that are saved then."""
    run_dir = folder / f'stopped_{processes}_{len(victims)}'
    settings = (*SIMPLE, *MESH, f'Run.steps = {2 * len(MOMENTS) + 2}')
    together = Together(run_dir, processes, *settings)
    together.wait_for(victims[0], 'learnt')
    for i in victims:
        together.signal(i, signal.SIGTERM)
    together.finish()
    saved = whole_steps(run_dir)
    assert all(f'stopped after step {saved[-1]},' in together.said(i) for i in range(processes)), together.said(0)
    return saved


def evaluated(folder: Path, processes: int) -> dict[str, str]:
    """Evaluates the run by one process once more, in so many processes. Returns what was written."""
    options = ('evaluation.samples_per_prompt = 3', f"evaluation.folder = '{folder / f'evaluated_{processes}'}'")
    Together(folder / 'full_1', processes, *options, command=evaluate.main).finish()
    return {path.name: path.read_text() for path in (folder / f'evaluated_{processes}').iterdir()}


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest relative one of the logged numbers but a mesh's own, and of the last checkpoint's arrays by norms."""
    b = rows(other)
    a = rows(one)[: len(b)]  # the other one may have been stopped
    own = ('seconds/', 'rollout/tokens_per_second', 'update/tokens_per_second')
    own += ('rollout/weights_checksum', 'update/padding_share')  # of roundings, and of rows
    a, b = ([{name: x for name, x in row.items() if not name.startswith(own)} for row in of] for of in (a, b))
    assert [row.keys() for row in a] == [row.keys() for row in b]
    # A NaN would be no maximum.
    whole = lambda x: float(np.nan_to_num(x, nan=np.inf))
    apart = lambda x, y: whole(np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 1e-2))
    numbers = [(apart(x[name], y[name]), name) for x, y in zip(a, b, strict=True) for name in x]
    step = a[-1]['step']
    saved, expected = (jax.tree.leaves_with_path(everything(run, step)) for run in (other, one))
    assert [path for path, _ in saved] == [path for path, _ in expected]
    arrays = [
        (apart(x.astype(np.float64), y.astype(np.float64)), jax.tree_util.keystr(path, simple=True, separator='/'))
        for (path, x), (_, y) in zip(expected, saved, strict=True)
    ]
    return {'numbers': max(numbers), 'arrays': max(arrays), 'count': [len(numbers), len(arrays)]}


def short(folder: Path) -> dict:
    """A run that four processes begin, of which one is killed, and that two go on with, until they are told to stop: up
    to there it must be the run of one process."""
    settings = (*FULL, *MESH, 'Run.steps = 8', 'Run.evaluate_every = 100')
    alone = Process(folder / 'nobody', folder / 'model', options=['--distributed'])
    _, status = os.waitpid(alone.pid, 0)
    lonely = {'code': os.waitstatus_to_exitcode(status), 'said': alone.log.read_text()}
    senders = Together(folder / 'sent', 2, command=send_weights, devices=12)
    senders.finish()
    one = Together(folder / 'alone', 1, *settings, 'Run.keep_checkpoints = 8')
    one.finish()
    run_dir = folder / 'run'
    four = Together(run_dir, 4, *settings)
    assert four.all[0].wait_for(lambda: bool(whole_steps(run_dir)))
    four.kill(2)
    ended = four.end(LONGEST)
    result = {
        'lonely': lonely,
        'sent': [senders.marks(i, 'sent') for i in range(2)],
        'refused': senders.said(0),
        # Before the next start writes other logs:
        'codes': [code for code, _ in ended],
        'seconds': max(seconds for _, seconds in ended),
        'told': [four.told(i) for i in range(4)],
        'parameters': sum(one.marks(0, 'read')),
        'read': [sum(four.marks(i, 'read')) for i in range(4)],
        'graded': [four.marks(i, 'grading') for i in range(4)],
        'held': [
            [of.marks(i, name)[0] for name in ('packing', 'update')] for of in (one, four) for i in range(len(of.all))
        ],
        'steps': [started_at(run_dir)],
    }
    two = Together(run_dir, 2, *settings)
    two.wait_for(1, 'learnt')
    two.signal(1, signal.SIGTERM)
    two.finish()
    result['steps'].append(started_at(run_dir))
    return result | {'logged': rows(run_dir)} | differences(folder / 'alone', run_dir)


def everything_once(folder: Path, several: list[int], kills: int, seed: int) -> dict:
    """All numbers of processes, on two meshes, with every kind of fault."""
    generator, killed, stopped, evaluations = random.Random(seed), {}, {}, {}
    settings = (*FULL, 'Run.steps = 4')
    for n in (1, *several):
        Together(folder / f'full_{n}', n, *settings, *MESH).finish()
        Together(folder / f'fsdp_{n}', n, *settings, 'Compute.fsdp = 4').finish()
        evaluations[n] = evaluated(folder, n)
        assert evaluations[n] == evaluations[1], f'{n} processes evaluate otherwise than one'
        print(n, 'processes have run the whole job', flush=True)
    Together(folder / 'alone', 1, *SIMPLE, *MESH, f'Run.steps = {2 * kills + 2}').finish()
    for n in several:
        killed[n] = kill_many(folder, n, kills, generator)
        stopped[n] = [stop(folder, n, victims) for victims in ([n - 1], list(range(n)))]
    # From here on this process touches devices: no forks any more.
    faults = [fault for of_n in killed.values() for fault in of_n]
    return {
        'kills': len(faults),
        'seconds_until_the_others_ended': [fault['seconds'] for fault in faults],
        'told': sum(fault['told'] for fault in faults),
        'stops': sum(map(len, stopped.values())),
        'differences_to_one_process': {
            f'{name}_{n}': differences(folder / one, folder / f'{name}_{n}')
            for one, name in [('full_1', 'full'), ('fsdp_1', 'fsdp'), ('alone', 'killed')]
            for n in several
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=int, nargs='+', default=[2, 4])
    parser.add_argument('--kills', type=int, default=5, help='for each number of processes')
    parser.add_argument('--short', action='store_true', help='what the tests run')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folder', type=Path, help='to write to, which must not exist; a temporary one by default')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / 'processes'
        folder.mkdir(parents=True)
        write_model(folder / 'model', vocab_size=18, num_key_value_heads=2)  # which two devices divide
        if arguments.short:
            result = short(folder)
        else:
            result = everything_once(folder, arguments.processes, arguments.kills, arguments.seed)
        print(json.dumps(result))


if __name__ == '__main__':
    main()
