"""The benchmark of a device, on this CPU and in tiny sizes: every part runs, so that it does on the day of a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.attention import cudnn_with_offsets, segment_offsets
from experiments.benchmarks.device import SHARES, main, run_parts
from experiments.benchmarks.device_parts import PARTS, first_that_fits, run_part
from experiments.benchmarks.measure import PROMPT, RESPONSE, random_batch
from troll_jax.packing import BatchShape

REPOSITORY = Path(__file__).parent.parent

# What a reader looks for in each part's rows, besides `part` and `what`.
EXPECTED = {
    'ceilings': {'copy_gb_per_s', 'matmul_tflops'},
    'numerics': {'error', 'limit', 'passed'},
    'decode': {'room', 'tokens_per_second', 'ms_per_step', 'share_of_floor', 'prefill_tokens_per_second'},
    'update': {'tokens_per_second', 'share_of_matmul', 'planned_gb'},
    'attention': {'rows', 'ms', 'error', 'temporary_gb'},
    'head': {'ms', 'ms_over_clip', 'temporary_gb'},
    'projection': {'ms', 'share_of_floor', 'mean_evaluations'},
    'step': {'seconds', 'seconds_rollout', 'seconds_reward', 'seconds_update', 'seconds_prefill', 'seconds_decode'},
}


@pytest.mark.parametrize('name', sorted(PARTS.keys() - {'numerics'}))
def test_every_part_runs(tmp_path, name):
    """Guards against a script that has rotted when a GPU is at hand for some minutes."""
    run_part(name, tmp_path, profile=name == 'step')
    assert bool(list(tmp_path.rglob('*.xplane.pb'))) == (name == 'step')
    rows = [json.loads(line) for line in (tmp_path / f'{name}.jsonl').read_text().splitlines()]
    assert rows and len({row['what'] for row in rows}) == len(rows)
    for row in rows:
        assert row['part'] == name and EXPECTED[name] < set(row)
        numbers = [x for x in row.values() if isinstance(x, int | float)]
        assert np.isfinite(numbers).all() and min(numbers) >= 0, row
        assert row.get('passed', True) and row.get('finite', True), row


def test_offsets_of_segments(monkeypatch):
    """Guards offsets that JAX takes for others: what it makes of them for cuDNN is where in memory each segment of all
    rows begins, and how long it is. And a private function that goes: forward and backward pass are traced."""
    cudnn = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
    segments = jnp.array([[3, 3, 3, 1, 2, 2, 0, 0], [5] * 8, [1, 1, 2, 2, 3, 3, 3, 3]])
    lengths, offsets = segment_offsets(segments, max_segments=4)
    x = jnp.zeros((3, 8, 4, 16), jnp.bfloat16)
    lengths, _, offsets, _ = map(np.ravel, cudnn._fix_seqlen_offsets(lengths, lengths, offsets, offsets, x, x))
    np.testing.assert_array_equal(lengths[:9], [3, 1, 2, 2, 8, 2, 2, 4, 0])
    np.testing.assert_array_equal(offsets[:9] / (4 * 16), [0, 3, 4, 6, 8, 16, 18, 20, 24])
    assert not lengths[8:].any()

    monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)
    monkeypatch.setattr(cudnn, 'check_compute_capability', lambda capability: True)
    attend = lambda q: jnp.sum(cudnn_with_offsets(q, x, x, segments, max_segments=4).astype(jnp.float32))
    text = jax.jit(jax.grad(attend)).trace(x).lower(lowering_platforms=('cuda',)).as_text()
    assert '__cudnn$fmhaSoftmax(' in text and '__cudnn$fmhaSoftmaxBackward(' in text


@pytest.mark.slow
def test_numerics(tmp_path):
    """Guards errors past their limits, and limits that nothing exceeds: the noise of bfloat16 is far beyond what
    float32 may have."""
    run_part('numerics', tmp_path, profile=False)
    rows = [json.loads(line) for line in (tmp_path / 'numerics.jsonl').read_text().splitlines()]
    assert len(rows) == 8 and all(EXPECTED['numerics'] < set(row) and row['passed'] for row in rows), rows
    exact, rough = (row for row in rows if row['what'].startswith('KL of sampler'))
    assert exact['error'] < exact['limit'] / 100 < 10 * exact['limit'] < rough['error'] < rough['limit']


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(tmp_path, monkeypatch, capsys):
    """Guards what the command leaves: a table, one line of JSON last, the same in a file; and an unknown part."""
    command = [sys.executable, '-m', 'experiments.benchmarks.device', '--out', str(tmp_path), '--only']
    command.append('projection,ceilings')
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert list(SHARES) == list(PARTS)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / 'results.json').read_text())
    assert [row['part'] for row in found['rows']] == ['ceilings', 'projection', 'projection']
    assert found['machine']['jax'] == jax.__version__ and '| ceilings | copy_gb_per_s ' in result.stdout
    monkeypatch.setattr(sys, 'argv', [*command[2:], 'speed'])
    with pytest.raises(SystemExit, match='2'):
        main()
    assert 'no part speed; expected some of ceilings, numerics' in capsys.readouterr().err


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch):
    """Guards the other figures of a machine that is there for minutes; and why a part has none."""
    monkeypatch.setenv('JAX_PLATFORMS', 'nonsense')
    (row,) = run_parts(['ceilings'], tmp_path, seconds=300, profile=False)
    assert row['part'] == 'ceilings' and 'status 1: RuntimeError' in row['failed'] and 'nonsense' in row['failed']
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    slow, late = run_parts(['decode', 'head'], tmp_path, seconds=2.4, profile=False)
    assert slow['part'] == 'decode' and slow['failed'].startswith('ended after 2 s')
    assert late['part'] == 'head' and late['failed'].startswith('no time was left')


def test_sizes_shrink_where_memory_is_short():
    """Guards figures of a small card: the first size that fits counts, and another error is not taken for memory's."""

    def run(size, message='RESOURCE_EXHAUSTED: Out of memory'):
        if size > 2:
            raise jax.errors.JaxRuntimeError(message)
        return size

    assert first_that_fits((8, 4, 2, 1), run) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE'):
        first_that_fits((8, 4), run)
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
        first_that_fits((8, 2), lambda size: run(size, 'INTERNAL'))


def test_random_batches():
    """Guards figures of rows that hold anything but whole sequences, each with its prompt outside of the loss."""
    batch = random_batch(BatchShape(2, 3, 640), 100)
    assert (np.diff(batch.segment_ids, axis=2) == 1).sum() == 6 and batch.segment_ids.max() == 2
    assert (batch.loss_weights > 0).sum() == 12 * RESPONSE and not np.any(batch.loss_weights[..., :PROMPT])
    np.testing.assert_allclose(batch.loss_weights.sum(), 1, rtol=1e-5)
    np.testing.assert_array_equal(batch.old.tokens[..., 0], batch.tokens)
    with pytest.raises(ValueError, match='rows of 600 tokens'):
        random_batch(BatchShape(1, 1, 600), 100)
