"""Curves: every run and metric that has something to show is drawn, once, where it belongs."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.plot import draw_runs, plot_runs


def rows(**changes) -> list[dict]:
    """Three steps of a run with TROLL; an evaluation at every other one."""
    values = {
        'reward/mean': 0.5,
        'rollout/entropy': 0.2,
        'update/kl_mean': 1e-4,
        'update/kl_p99': 1e-2,
        'update/kl_max': 0.3,
        'update/projected_share': 0.01,
        'update/clipped_share': 0.0,
    }
    values = {name: value for name, value in (values | changes).items() if value is not None}
    evaluation = {'step': 0, 'eval/success': 0.3}
    return [evaluation] + [
        {'step': step, **values} | ({'eval/success': 0.4} if step == 2 else {}) for step in (1, 2, 3)
    ]


def labels(figure) -> list[list[str]]:
    """Of the lines of each panel; what the legend shows is the same."""
    for axis in figure.axes:
        legend = [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
        assert legend == [line.get_label() for line in axis.lines]
    return [[line.get_label() for line in axis.lines] for axis in figure.axes]


def test_every_line_is_drawn_in_its_panel():
    """Guards against a metric that was renamed and is no longer drawn, and against points at wrong steps."""
    figure = draw_runs({'troll': rows(), 'clip': rows(**{'update/projected_share': 0.0, 'update/clipped_share': 0.2})})
    kl = ['kl mean', 'kl p99', 'kl max']
    assert labels(figure) == [
        ['troll: mean', 'troll: success', 'clip: mean', 'clip: success'],
        ['troll', 'clip'],
        [f'{run}: {name}' for run in ('troll', 'clip') for name in kl],
        # The share of the other objective, zero throughout, is left out.
        ['troll: projected share', 'clip: clipped share'],
    ]
    reward, success = figure.axes[0].lines[:2]
    np.testing.assert_array_equal(reward.get_xydata(), [[1, 0.5], [2, 0.5], [3, 0.5]])
    np.testing.assert_array_equal(success.get_xydata(), [[0, 0.3], [2, 0.4]])
    assert [axis.get_yscale() for axis in figure.axes] == ['linear', 'linear', 'log', 'linear']
    for axis in figure.axes:
        colours = {line.get_label().split(':')[0]: line.get_color() for line in axis.lines}
        assert colours == {'troll': 'C0', 'clip': 'C1'}


def test_a_run_that_never_succeeds_is_drawn():
    """Guards against a success or an entropy of zero that is taken for a metric that is not there."""
    figure = draw_runs(
        {'run': [row | {'eval/success': 0.0} for row in rows(**{'reward/mean': 0.0, 'rollout/entropy': 0.0})]}
    )
    assert labels(figure)[:2] == [['run: mean', 'run: success'], ['run']]


def test_missing_metrics_and_nulls_are_left_out():
    """Guards against a run of an older version, one without evaluations, and a NaN that the log keeps as null."""
    some = rows(**{'update/kl_p99': None, 'update/clipped_share': None})
    some = [{name: value for name, value in row.items() if name != 'eval/success'} for row in some]
    some[2]['rollout/entropy'] = None
    figure = draw_runs({'run': some, 'just started': []})
    assert labels(figure) == [['run: mean'], ['run'], ['run: kl mean', 'run: kl max'], ['run: projected share']]
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xdata(), [1, 3])


# Not those of objects that other tests left to the garbage collector.
@pytest.mark.filterwarnings('error', 'ignore::pytest.PytestUnraisableExceptionWarning')
def test_the_file_is_a_png(tmp_path):
    """Guards against a logarithmic axis without a positive value, an empty legend, and figures that pile up."""
    plot_runs({'off': rows(**{f'update/kl_{name}': 0.0 for name in ('mean', 'p99', 'max')})}, tmp_path / 'curves.png')
    plot_runs({'empty': []}, tmp_path / 'empty.png')
    for name in ('curves', 'empty'):
        data = (tmp_path / f'{name}.png').read_bytes()
        assert data[:8] == b'\x89PNG\r\n\x1a\n' and data[-8:-4] == b'IEND'
    assert (tmp_path / 'curves.png').stat().st_size > (tmp_path / 'empty.png').stat().st_size
    assert plt.get_fignums() == []
