"""Devices that sample while others train."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults.runs import everything
from loop import HASH, assert_same, run, without_times
from test_collect import TASK, collector_of, groups_of, params

from troll_jax.learn import Learner
from troll_jax.metrics import read_metrics
from troll_jax.rewards.pool import Grader
from troll_jax.settings import Compute
from troll_jax.sharding import checksum, make_mesh, place

LAG = dict(task=[*HASH, 'Sampling.lag = 1', 'Run.evaluate_every = 2'])
SPLIT = ['Compute.overlap = True', 'Compute.rollout_devices = 1']


@pytest.fixture(scope='module')
def plain(tmp_path_factory, model) -> tuple:
    """The folder and the metrics of the run on one device that all others are compared with."""
    folder = tmp_path_factory.mktemp('plain')
    return folder, run(folder, model, **LAG)


def without_checksums(rows: list[dict]) -> list[dict]:
    return [{name: x for name, x in row.items() if name != 'rollout/weights_checksum'} for row in without_times(rows)]


def test_a_split_run_is_the_run_of_one_device(tmp_path, model, plain):
    """Guards weights of another step, a rollout in flight that a resumed run learns from twice or never, and parameters
    that an update consumes while they are sent: with and without overlap all is as with a lag on one device."""
    run(tmp_path / 'overlap', model, *SPLIT, 'Run.steps = 2', devices=2, **LAG)  # and goes on from there
    overlap = run(tmp_path / 'overlap', model, *SPLIT, devices=2, **LAG)
    in_turn = run(tmp_path / 'in_turn', model, SPLIT[1], devices=2, **LAG)
    assert without_checksums(overlap) == without_checksums(in_turn) == without_times(plain[1])
    sums = [[row.get('rollout/weights_checksum') for row in rows] for rows in (overlap, in_turn)]
    assert sums[0] == sums[1] and len(set(sums[0][1:])) == 3, 'of four rollouts, the first two by the start model'
    for name in ('overlap', 'in_turn'):
        assert_same(everything(tmp_path / name, 4), everything(plain[0], 4))


def test_meshes_of_other_shapes(tmp_path, model, plain):
    """Guards parameters that are laid out for one mesh and read on the other."""
    mesh = ['Compute.overlap = True', 'Compute.rollout_devices = 4', 'Compute.fsdp = 2', 'Compute.data = 2']
    split = run(tmp_path / 'split', model, *mesh, devices=8, **LAG)
    for one, other in zip(without_times(plain[1]), without_checksums(split), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            counts = 'evaluations' in name  # of the solver, whose quantiles are whole or half
            np.testing.assert_allclose(one[name], other[name], rtol=1e-2, atol=1 if counts else 1e-5, err_msg=name)


def test_sampling_in_a_thread_is_not_waited_for():
    """Guards an update that begins when the rollout has ended."""
    go_on = threading.Event()
    with ThreadPoolExecutor(1) as thread, Grader(TASK.grade, deadline=None) as grader:
        settings = dict(rewards=[('low', 1.0, lambda r: np.zeros(len(r.texts)))], grader=grader)
        expected = collector_of(**settings)(params(), None, 0)()
        waits = lambda: go_on.wait(300) or pytest.fail('the caller waits for the thread')
        later = collector_of(**settings, sampling_thread=thread, check=waits)(params(), None, 0)
        go_on.set()
        assert groups_of(later()) == groups_of(expected)


def test_checksum_tells_arrays_apart():
    """Guards parts that change places on their way, single bits, and sums that depend on the mesh."""
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    tree = {'a': x, 'b': x[0].astype(jnp.bfloat16)}
    meshes = [make_mesh(1, 4, 2), make_mesh(1, 2, 1, jax.devices()[6:])]
    sums = [int(checksum({name: place(y, mesh, ()) for name, y in tree.items()})) for mesh in meshes]
    assert sums[0] == sums[1] == int(checksum({'a': place(x, meshes[0], ('batch',)), 'b': tree['b']}))
    flipped = x.view(np.uint32).copy()
    flipped[7, 5] ^= 1
    for other in (x[::-1], x[:, [1, 0, 2, 3, 4, 5]], flipped.view(np.float32)):
        assert int(checksum(tree | {'a': other})) != sums[0]


def test_damaged_weights_are_refused(tmp_path, model, plain, monkeypatch):
    """Guards a rollout by weights that nobody has learnt, and the steps before it, which are saved."""
    hand_over, calls = Learner.hand_over, []

    def damaged(self, state, ahead=False):
        calls.append(ahead)
        sent, expected = hand_over(self, state, ahead)
        with jax.set_mesh(self.rollout_mesh):
            return (jax.tree.map(lambda x: x * 2, sent) if len(calls) == 4 else sent), expected  # of the fourth rollout

    settings = dict(devices=2, **LAG)
    monkeypatch.setattr(Learner, 'hand_over', damaged)
    with pytest.raises(OSError, match=r'checksum \d+, expected \d+.*Compute.rollout_devices'):
        run(tmp_path / 'split', model, *SPLIT, 'Run.checkpoint_every = 1', **settings)
    assert read_metrics(tmp_path / 'split/metrics.jsonl')[-1]['step'] == 3
    monkeypatch.undo()
    assert without_checksums(run(tmp_path / 'split', model, *SPLIT, **settings)) == without_times(plain[1])


def test_splits_that_are_errors(tmp_path, model):
    """Guards a split that is found impossible when weights are loaded."""
    for bindings, said in [
        (['Compute.rollout_devices = 2'], r'rollout_devices = 2 of 2 devices in 1 proc'),
        (['Compute.rollout_devices = 0'], 'Compute.rollout_devices.*above 0'),
        (
            ['Compute.rollout_devices = 4', 'Compute.fsdp = 4', 'Compute.slots = 6'],
            'slots = 6 must be a multiple of .* = 4',
        ),
        (['Compute.rollout_devices = 3'], 'prompts_per_step = 16 must be a multiple of .* = 3'),
    ]:
        with pytest.raises(ValueError, match=said):
            run(tmp_path / 'run', model, *bindings, devices=2 if ' 2' in bindings[0] else 8, **LAG)
    assert not (tmp_path / 'run').exists()
    assert Compute(rollout_devices=2, tensor=2).rollout_mesh.shape['tensor'] == 2
