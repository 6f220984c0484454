"""The record of a run: valid JSON, every step once, whatever crashed in between; and the same in TensorBoard."""

import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from troll_jax.metrics import MetricsWriter, read_metrics


def write(folder, steps, **options) -> None:
    with MetricsWriter(folder, **options) as metrics:
        for step in steps:
            metrics.write(step, {'loss': 0.5 * step})


def steps_in(folder) -> list[int]:
    """Strict: every line must be JSON, with a newline at its end."""
    text = (folder / 'metrics.jsonl').read_text()
    assert text.endswith('\n') or not text
    return [json.loads(line)['step'] for line in text.splitlines()]


def events(file) -> list[Event]:
    """A TensorBoard file is records of length, its checksum, an event, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack_from('<Q', data)
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def table(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / 'constrained_tokens.jsonl').read_text().splitlines()]


def scalars(found: list[Event]) -> list[tuple[int, str, float]]:
    return [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]


def test_lines_are_json_and_numbers_come_back(tmp_path):
    """Guards against numpy and JAX scalars that json cannot write, and against values rounded to text."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(0, {'eval/success': np.float32(0.1)})
        metrics.write(3, {'loss': -1 / 3, 'reward/timeouts': 2, 'skipped': np.array(1.0)})
    assert read_metrics(tmp_path / 'metrics.jsonl') == [
        {'step': 0, 'eval/success': float(np.float32(0.1))},
        {'step': 3, 'loss': -1 / 3, 'reward/timeouts': 2.0, 'skipped': 1.0},
    ]
    assert steps_in(tmp_path) == [0, 3]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    """Guards against buffered lines, which a killed run takes with it."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {'loss': 1.0})
        assert steps_in(tmp_path) == [1]


def test_not_a_number_becomes_null_and_costs_nothing_else(tmp_path):
    """Guards against one NaN that makes the file unreadable (bare NaN is not JSON) or drops its row or its run."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {'a': math.nan, 'b': 1.0, 'c': math.inf, 'd': -math.inf})
        metrics.write(2, {'a': 2.0})
    strict = lambda constant: pytest.fail(f'{constant} is not JSON')
    rows = [json.loads(line, parse_constant=strict) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert rows == [{'step': 1, 'a': None, 'b': 1.0, 'c': None, 'd': None}, {'step': 2, 'a': 2.0}]


@pytest.mark.parametrize('second', [4, 3, 0])
def test_steps_only_grow(tmp_path, second):
    """Guards against two writers of one step: a curve that goes back in time."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(4, {'loss': 1.0})
        with pytest.raises(ValueError, match=f'step {second} come after those of step 4'):
            metrics.write(second, {'loss': 2.0})
        metrics.write(5, {'loss': 3.0})
    assert steps_in(tmp_path) == [4, 5]


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Guards against steps after the checkpoint that stay and are written again, and against a lost past."""
    write(tmp_path, range(0, 8))
    write(tmp_path, range(6, 10), resume_after=5)
    assert steps_in(tmp_path) == list(range(10))
    assert [row['loss'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [0.5 * step for step in range(10)]
    with MetricsWriter(tmp_path, resume_after=20) as metrics, pytest.raises(ValueError, match='step 20 come after'):
        metrics.write(20, {})


@pytest.mark.parametrize('torn', ['{"step": 3, "lo', '{"step": 3, "loss": 1.5', '\n', '\x00\x00\x00'])
def test_a_torn_last_line_is_removed(tmp_path, torn):
    """Guards against a run that cannot be read or resumed because it was killed while it wrote a line."""
    write(tmp_path, [1, 2])
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write(torn)
    assert [row['step'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2]
    write(tmp_path, [4], resume_after=3)
    assert steps_in(tmp_path) == [1, 2, 4]


def test_half_a_character_is_removed(tmp_path):
    """Guards against a table of tokens that a crash cut within a character, and that no start could read again."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write_table(1, [{'text': 'é', 'constrained': 1, 'seen': 2}])
    path = tmp_path / 'constrained_tokens.jsonl'
    path.write_bytes(path.read_bytes() + '{"step": 2, "tokens": [{"text": "é'.encode()[:-1])
    with MetricsWriter(tmp_path, resume_after=1) as metrics:
        metrics.write_table(2, [{'text': 'ö', 'constrained': 1, 'seen': 2}])
    assert [row['tokens'][0]['text'] for row in table(tmp_path)] == ['é', 'ö']


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path):
    """Guards against a row of step 0 that is kept, so that the second start fails on writing it again."""
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0, 1])
    assert steps_in(tmp_path) == [0, 1]


def test_tensorboard_holds_the_scalars_and_forgets_what_was_repeated(tmp_path):
    """Guards against values that reach one of the two records only, and against a zigzag after resuming."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {'loss': 0.25, 'update/kl_max': 3.0})
        metrics.write(2, {'loss': math.nan})
    (file,) = (tmp_path / 'tensorboard').iterdir()
    *exact, (step, tag, value) = scalars(events(file))
    assert exact == [(1, 'loss', 0.25), (1, 'update/kl_max', 3.0)]
    assert (step, tag) == (2, 'loss') and math.isnan(value)

    resumed = tmp_path / 'resumed'
    with MetricsWriter(resumed, resume_after=7) as metrics:
        metrics.write(8, {'loss': 0.5})
    (file,) = (resumed / 'tensorboard').iterdir()
    found = events(file)
    assert scalars(found) == [(8, 'loss', 0.5)]
    # TensorBoard drops what earlier files say of the steps from here on.
    starts = [event.step for event in found if event.session_log.status == event.session_log.START]
    assert starts == [8]


def test_tables_are_json_and_follow_a_resumed_run(tmp_path):
    """Guards text that is no ASCII or has a line's end in it, and tables of steps that are repeated."""
    rows = [
        {'token': 3, 'text': 'ü\n"', 'constrained': 2, 'seen': 5},
        {'token': 1, 'text': '数', 'constrained': 1, 'seen': 1},
    ]
    with MetricsWriter(tmp_path) as metrics:
        for step in (2, 4, 6):
            metrics.write_table(step, rows)
            assert table(tmp_path)[-1] == {'step': step, 'tokens': rows}  # on disk before the next one
        metrics.write_table(8, [])
    assert [row['step'] for row in table(tmp_path)] == [2, 4, 6, 8]
    (file,) = (tmp_path / 'tensorboard').iterdir()
    texts = [value.tensor.string_val[0].decode() for event in events(file) for value in event.summary.value]
    assert texts[0].splitlines() == ['    ' + repr('ü\n"') + ' 2 of 5', "    '数' 1 of 1"]
    with (tmp_path / 'constrained_tokens.jsonl').open('a') as file:
        file.write('{"step": 9, "tok')
    with MetricsWriter(tmp_path, resume_after=4) as metrics:
        metrics.write_table(6, rows[:1])
    assert table(tmp_path) == [{'step': step, 'tokens': rows} for step in (2, 4)] + [{'step': 6, 'tokens': rows[:1]}]
