"""Saved rollouts, and objectives compared on them: by a real run of a tiny model, replayed from its folder alone."""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from loop import settings
from tiny import decoder_config, save_qwen3

from experiments.plumbing.gin_files import Config
from experiments.plumbing.gin_text import to_bindings
from experiments.studies.replay import find_methods, replay, rounded
from experiments.studies.replay_report import draw, report
from experiments.train import train
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.learn import summarise
from troll_jax.models import decoder as decoders
from troll_jax.models.quantization import PRECISIONS
from troll_jax.packing import BatchShape, abstract_batch
from troll_jax.saved_batches import load_batches, save_batches
from troll_jax.settings import Method
from troll_jax.types import Batch, SparseLogProbs

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / 'configs'


class StartsLow(Arithmetic):
    """Rewards responses by their first character: something that tells the samples of any policy apart."""

    def grade(self, response: str, answer: str) -> float:
        return float(response < '5')


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """The folder of two steps with four updates each, at a learning rate at which half of the tokens leave the region.

    In bfloat16 the sampler's record and the trainer's policy differ, so that it shows which of them was saved.
    """
    folder = tmp_path_factory.mktemp('replay')
    tokenizer = character_tokenizer(CHARACTERS)
    save_qwen3(folder / 'model', tokenizer, initializer_range=0.5)
    bindings = [
        'import test_replay',
        f'Experiment.model = {str(folder / "model")!r}',
        'Experiment.task = @test_replay.StartsLow()',
        'Experiment.max_prompt_length = 4',
        'Experiment.max_response_length = 3',
        "Compute.dtype = 'bfloat16'",
        'test_replay.StartsLow.operands = 2',
        'test_replay.StartsLow.train_size = 60',
        'test_replay.StartsLow.test_size = 10',
        f'Run.folder = {str(folder / "run")!r}',
        'Run.steps = 2',
        'Sampling.prompts_per_step = 16',
        'Sampling.samples_per_prompt = 4',
        'Method.minibatch_prompts = 4',
        'Run.evaluate_every = 0',
        'Run.checkpoint_every = 1',
        'Run.keep_checkpoints = 1',
        'Run.save_rollout_every = 1',
        "Method.old_policy = 'recompute'",
        'Compute.head_chunk = 40',
        'adamw.learning_rate = 0.02',
    ]
    last = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            'experiments.train.summarise', lambda updates, lag: last.append(updates[-1]) or summarise(updates, lag)
        )
        train(*settings([CONFIGS / 'quickstart.gin', CONFIGS / 'objectives/troll.gin'], bindings))
    (folder / 'run/kl_max_of_the_last_update').write_text(str(last[-1].policy.metrics['kl_max']))
    return folder / 'run'


def test_all_objectives_begin_with_the_policy_gradient(run):
    """Guards against parameters that did not sample the rollout, and against the sampler's record in place of what was
    learnt from. Where π̃ = π_old nothing is projected or clipped, and all have the gradient of the policy gradient.
    """
    result = replay(run, objectives=['dppo'], updates=0, step=0)
    assert (result['step'], result['checkpoint'], result['updates']) == (0, 0, 0)
    assert result['kl_at_start'] == result['before']['kl_mean'] < 1e-6
    assert list(result['objectives']) == ['importance_weighted', 'dppo', 'run']
    assert result['objectives']['run']['gradient_norm'] > 0.1
    equal = result['objectives']['run']['kl_mean_after_equal_step']
    for name, row in result['objectives'].items():
        assert row['finite'] and row['affected_share'] == row['silenced_share'] == 0, name
        assert row['gradient_norm'] == pytest.approx(result['objectives']['run']['gradient_norm'], rel=1e-4)
        assert min(result['cosines'][name].values()) > 0.9999, name
        assert row['kl_mean_after_equal_step'] == pytest.approx(equal, rel=1e-3)


def test_replay_walks_the_way_of_the_run(run, tmp_path):
    """Guards against another order of minibatches, a fresh optimizer, and settings of one objective that another reads.

    The way is three updates, of which the second and third are off-policy, to the KL that the run's last one found.
    """
    unbounded = tmp_path / 'unbounded.gin'
    unbounded.write_text("include 'configs/objectives/troll.gin'\ntroll.alpha = 0.0\ntroll.bound = 10.0\n")
    result = replay(run, objectives=[str(unbounded)])
    kl_max = float((run / 'kl_max_of_the_last_update').read_text())
    assert (result['step'], result['checkpoint'], result['updates']) == (1, 1, 3)
    assert kl_max > 0.1 and kl_max == pytest.approx(result['before']['kl_max'], rel=1e-4)
    assert list(result['objectives']) == ['importance_weighted', 'unbounded', 'run']
    plain, unbounded, troll = result['objectives'].values()
    assert result['cosines']['unbounded']['importance_weighted'] > 0.9999 > result['cosines']['run']['unbounded']
    assert troll['affected_share'] > 0.1
    # What the trust region is for: the same data and optimizer, another place.
    assert plain['affected_share'] == 0 and troll['kl_mean_after'] < plain['kl_mean_after']
    for distance in ('kl_mean', 'tv_mean'):
        after = [row[f'{distance}_after_equal_step'] for row in (plain, unbounded, troll)]
        assert after[0] == pytest.approx(after[1], rel=1e-3) and abs(after[2] / after[0] - 1) > 0.05, distance
    assert all(row['milliseconds'] > 0 for row in (plain, unbounded, troll))
    cells = troll['held'].values()
    held = sum(cell['tokens'] * cell['share'] for cell in cells if cell['tokens'])
    assert 0 < held <= troll['affected_share'] * result['tokens'] * (1 + 1e-6)
    assert json.loads((run / 'replay_1.json').read_text()) == result
    assert (run / 'replay_1.png').read_bytes().startswith(b'\x89PNG')


def test_a_batch_that_breaks_some_objectives_is_explained(run, tmp_path):
    """Guards against a report that names no token, the wrong one, or objectives that do not read what is broken.

    The log-probability that was recorded of one token is not a number. TROLL reads its distribution instead.
    """
    batch = load_batches(run / 'rollouts/1.npz').batches[0]
    where = tuple(np.argwhere((batch.loss_weights > 0) & (batch.advantages != 0))[3])
    batch.old_log_probs[where] = np.nan
    save_batches(tmp_path / 'broken.npz', [batch], step=7)  # of which there is no checkpoint
    result = replay(run, objectives=['clip'], batch=tmp_path / 'broken.npz')
    assert {name: row['finite'] for name, row in result['objectives'].items()} == {
        'importance_weighted': False,
        'clip': False,
        'run': True,
    }
    clip = result['objectives']['clip']
    token = clip['first_broken']
    assert (clip['broken_tokens'], token['micro_batch_row_position']) == (1, list(where))
    assert token['text'] == ['<pad>', '<eos>', *CHARACTERS][batch.tokens[where]]
    assert token['old_log_prob'] == token['loss'] == 'nan' and -20 < token['log_prob'] < 0
    assert (
        clip['gradient_norm']
        is clip['kl_mean_after']
        is clip['kl_mean_after_equal_step']
        is result['cosines']['clip']['run']
        is None
    )
    assert result['objectives']['run']['kl_mean_after'] > 0 < result['objectives']['run']['tv_mean_after_equal_step']
    text = report(result)
    assert 'no checkpoint 7; the parameters are those of 2' in text
    assert f'clip: NOT FINITE at 1 tokens, first at {token["text"]!r} after' in text
    labels = [label.get_text() for label in draw(result).axes[0].get_yticklabels()]
    assert labels == ['importance_weighted', 'clip', 'run *']
    json.dumps(result, allow_nan=False)


def test_a_stale_rollout_and_a_rounded_sampler(run):
    """Guards a lag that moves π_old along, and a precision that rounds nothing or what another checkpoint knows."""
    start = lambda **options: replay(run, objectives=['importance_weighted'], step=0, updates=0, **options)
    int8, stale = start(precision='int8'), start(lag=1)
    assert (int8['checkpoint'], stale['checkpoint'], stale['step']) == (0, 1, 0)
    assert 1e-6 < int8['kl_at_start'] < 0.1 * stale['kl_at_start']
    assert 'π_old is recomputed with weights in int8' in report(int8)
    assert 'rollout of step 0. From checkpoint 1' in report(stale) and 'WARNING' not in report(stale)
    assert {path.name for path in run.glob('replay_0*.json')} >= {
        'replay_0_after_0_int8.json',
        'replay_0_after_0_lag_1.json',
    }


@pytest.mark.parametrize('precision', PRECISIONS)
def test_weights_are_rounded_as_the_sampler_does(precision):
    """Guards scales of another axis, and embeddings that are rounded, too."""
    config = decoder_config(23, decode_precision=precision)
    params = decoders.init(config, jax.random.key(0))
    got, (others, layers) = rounded(params, precision), decoders.decode_weights(params, config)
    is_same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, params)), strict=True)]
    assert all(is_same) == (precision == 'bfloat16')  # which is another dtype to compute in
    assert len(layers) == 2
    for i, layer in enumerate(layers):
        jax.tree.map(lambda whole, one, i=i: np.testing.assert_array_equal(whole[i], one), got['layers'], layer)
    for name in got.keys() - {'layers'}:
        jax.tree.map(np.testing.assert_array_equal, got[name], others[name])


def test_a_minibatch_without_a_token_to_learn_from_is_an_error(run, tmp_path):
    """Guards an IndexError: of a rollout that the length limit cut, all loss weights may be zero."""
    batch = load_batches(run / 'rollouts/1.npz').batches[0]
    save_batches(tmp_path / 'masked.npz', [batch._replace(loss_weights=0 * batch.loss_weights)], step=1)
    with pytest.raises(ValueError, match='minibatch 1 of .*masked.npz has no token with a loss weight'):
        replay(run, batch=tmp_path / 'masked.npz')


def test_methods_are_their_files_alone():
    """Guards against settings of the run's own objective that another one of the same function would inherit, and
    against methods that differ in their data alone and would be computed twice.
    """
    files = [CONFIGS / 'quickstart.gin', CONFIGS / 'objectives/gspo.gin']
    changes = ['Method.tail_rule = @bucket_tail', 'Method.regularisers = [@entropy_bonus]']
    run = Config(files, [*changes, 'entropy_bonus.coefficient = 1']).build(Method)
    methods = {method.name: method for method in find_methods(run, ['clip', 'rloo', 'dr_grpo', 'ppo', 'gspo'], [])}
    assert [(name, method.same) for name, method in methods.items()] == [
        ('importance_weighted', ['rloo']),
        ('clip', []),
        ('dr_grpo', ['ppo']),
        ('gspo', []),
        ('run', []),  # it has a regulariser
    ]
    own = lambda name: {
        line.removeprefix('experiments.studies.replay.Compared.'): value
        for line, value in to_bindings(methods[name].method).items()
    }
    tail = {'regularisers': '()', 'tail_rule': '@bucket_tail'}
    assert own('importance_weighted') == {'objective': '@importance_weighted'} | tail
    assert own('clip') == {'objective': '@ppo_clip'} | tail, 'all of its settings are the defaults'
    run = Config(files).build(Method)
    assert [(m.name, m.same) for m in find_methods(run, ['gspo'], [])] == [
        ('importance_weighted', []),
        ('gspo', ['run']),
    ]
    all_methods = [len(find_methods(run, [], [], has_reference=has)) for has in (False, True)]
    assert all_methods == [34, 35], 'all files of configs/objectives, less those that differ in their data'
    with pytest.raises(ValueError, match='grpo compares with a reference model'):
        find_methods(run, ['grpo'], [])


def test_errors_say_what_there_is(run):
    """Guards against a traceback from the depths for a name, number or file that does not exist."""
    for arguments, message in [
        ({'step': 5}, r'no saved rollout of step 5; there are \[0, 1\]'),
        ({'updates': 4}, '0 to 3; got 4'),
        ({'objectives': ['trol']}, "called 'objectives/trol'. Did you mean 'objectives/troll'"),
        ({'batch': 'nothing.npz'}, "no file of saved batches 'nothing.npz'"),
    ]:
        with pytest.raises(ValueError, match=message):
            replay(run, **arguments)
    for arguments, message in [
        ({'step': 0, 'lag': 5}, r'no checkpoint 5, which is 5 steps after .*there are \[1, 2\]'),
        ({'lag': -1}, 'lag must be at least 0 .*got -1'),
        ({'precision': 'int4'}, "one of bfloat16, int8, fp8, or none; got 0 and 'int4'"),
        (
            {'precision': 'int8', 'bindings': ['Sampling.lag = 1', 'Method.old_policy = "rollout"']},
            'has Sampling.lag = 1; leave out --precision',
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            replay(run, **arguments)
    with pytest.raises(ValueError, match='save_rollout_every = 30 must be a multiple of checkpoint_every = 25'):
        settings(['quickstart', 'troll'], ["Run.folder = 'unused'", 'Run.save_rollout_every = 30'])


def some_batches() -> list[Batch]:
    generator = np.random.default_rng(0)
    shapes = abstract_batch(BatchShape(2, 3, 5), kept=7)
    return [jax.tree.map(lambda x: generator.normal(size=x.shape).astype(x.dtype), shapes) for _ in range(2)]


class LaterBatch(NamedTuple):
    """A batch that has got more fields, some of which may be None."""

    tokens: jax.Array
    old: SparseLogProbs
    values: jax.Array | None = None
    reference: SparseLogProbs | None = None


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
    """Guards against fields that are lost, swapped or of another type, today's and those that batches may get."""
    batches = some_batches()
    for step in (3, 11):  # the second one in place of the first
        save_batches(tmp_path / 'rollouts/11.npz', batches, step=step)
    assert [file.name for file in (tmp_path / 'rollouts').iterdir()] == ['11.npz']
    loaded = load_batches(tmp_path / 'rollouts/11.npz')
    assert loaded.step == 11 and jax.tree.structure(loaded.batches) == jax.tree.structure(batches)
    assert all(leaf.dtype in (np.int32, np.float32) for leaf in jax.tree.leaves(loaded.batches))
    jax.tree.map(np.testing.assert_array_equal, loaded.batches, batches)

    monkeypatch.setattr('troll_jax.saved_batches.Batch', LaterBatch)
    with pytest.raises(ValueError, match=r'0/advantages.*which a Batch does not have'):
        load_batches(tmp_path / 'rollouts/11.npz')
    first = batches[0]
    later = [
        LaterBatch(first.tokens, first.old),
        LaterBatch(first.tokens, first.old, first.loss_weights, batches[1].old),
    ]
    save_batches(tmp_path / 'later.npz', later, step=0)
    loaded = load_batches(tmp_path / 'later.npz').batches
    assert jax.tree.structure(loaded) == jax.tree.structure(later)
    jax.tree.map(np.testing.assert_array_equal, loaded, later)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    """Guards against half a file, a flipped bit or a pickle that is replayed, or run, as if it were a rollout."""
    path = tmp_path / 'batches.npz'
    save_batches(path, some_batches(), step=0)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()

    def check(message: str):
        with pytest.raises(ValueError, match=message):
            load_batches(path)

    for part in (whole[:-7], whole[: len(whole) // 2], b''):
        path.write_bytes(part)
        check('cannot be read, it is damaged')
    for entry in entries:
        i = entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        check('cannot be read, it is damaged')
    for foreign, message in [
        ({'weights': np.ones(3)}, "holds no saved batches: 'step'"),
        ({'step': 0, 'count': 1}, 'holds no saved batches: .*missing 7 required'),
        ({'step': np.array([{}], dtype=object)}, 'allow_pickle'),
    ]:
        np.savez(path, **foreign)
        check(message)
    with path.open('wb') as file:
        np.save(file, np.ones(3))
    check('cannot be read')
