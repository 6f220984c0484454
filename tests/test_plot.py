"""Curves: every run and metric that has something to show is drawn, once, where it belongs."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.plot import PANELS, draw_runs, plot_runs


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
    """The runs of the lines of each panel; each has its name beside them once, in its colour, and clear of others."""
    for axis in figure.axes:
        names = {text.get_text(): text for text in axis.texts}
        assert set(names) == {line.get_label() for line in axis.lines} and len(names) == len(axis.texts)
        for line in axis.lines:
            assert names[line.get_label()].get_color() == line.get_color()
        heights = sorted(text.xy[1] for text in axis.texts)
        assert all(high - low >= 0.089 for low, high in itertools.pairwise(heights))
        assert not heights or -0.01 <= heights[0] <= heights[-1] <= 1.1
    return [[line.get_label() for line in axis.lines] for axis in figure.axes]


def draw(**runs) -> Figure:
    return draw_runs({'': runs})


def test_every_line_is_drawn_in_its_panel():
    """Guards against a metric that was renamed and is no longer drawn, and against points at wrong steps."""
    figure = draw(troll=rows(), clip=rows(**{'update/projected_share': 0.0, 'update/clipped_share': 0.2}))
    # The share of the other objective, zero throughout, is left out.
    both = ['troll', 'troll', 'clip', 'clip']
    assert labels(figure) == [both, ['troll', 'clip'], both, ['troll', 'clip']]
    reward, success = figure.axes[0].lines[:2]
    np.testing.assert_array_equal(reward.get_xydata(), [[1, 0.5], [2, 0.5], [3, 0.5]])
    np.testing.assert_array_equal(success.get_xydata(), [[0, 0.3], [2, 0.4]])
    assert [axis.get_yscale() for axis in figure.axes] == ['linear', 'linear', 'log', 'linear']
    for axis in figure.axes:
        assert {line.get_label(): line.get_color() for line in axis.lines} == {'troll': 'C0', 'clip': 'C1'}


def test_groups_of_runs_are_columns():
    """Guards runs under the title of others, and axes of one kind that cannot be compared."""
    low, high = rows(), rows(**{'reward/mean': 0.9})
    figure = draw_runs({'gentle': {'a': low}, 'stale': {'a': high, 'b': low}}, [PANELS[0], PANELS[2]])
    assert [len(runs) for runs in labels(figure)] == [2, 4, 2, 4]
    assert [axis.get_title().split('\n')[0] for axis in figure.axes] == ['gentle', 'stale'] * 2
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_run_that_never_succeeds_is_drawn():
    """Guards against a success or an entropy of zero that is taken for a metric that is not there."""
    figure = draw(run=[row | {'eval/success': 0.0} for row in rows(**{'reward/mean': 0.0, 'rollout/entropy': 0.0})])
    assert [len(names) for names in labels(figure)[:2]] == [2, 1]


def test_missing_metrics_and_nulls_are_left_out():
    """Guards against a run of an older version, one without evaluations, and a NaN that the log keeps as null."""
    some = rows(**{'update/kl_max': None, 'update/clipped_share': None})
    some = [{name: value for name, value in row.items() if name != 'eval/success'} for row in some]
    some[2]['rollout/entropy'] = None
    assert labels(figure := draw(run=some, just_started=[])) == [['run']] * 4
    some[-1].update({'update/kl_mean': 0.0, 'reward/mean': float('nan')})  # the names stay inside
    labels(draw(run=some))
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_xdata(), [1, 3])


# Not those of objects that other tests left to the garbage collector.
@pytest.mark.filterwarnings('error', 'ignore::pytest.PytestUnraisableExceptionWarning')
def test_the_file_is_a_png(tmp_path):
    """Guards against a logarithmic axis without a positive value, an empty legend, and figures that pile up."""
    plot_runs({'off': rows(**{f'update/kl_{name}': 0.0 for name in ('mean', 'max')})}, tmp_path / 'curves.png')
    plot_runs({'empty': []}, tmp_path / 'empty.png')
    for name in ('curves', 'empty'):
        data = (tmp_path / f'{name}.png').read_bytes()
        assert data[:8] == b'\x89PNG\r\n\x1a\n' and data[-8:-4] == b'IEND'
    assert (tmp_path / 'curves.png').stat().st_size > (tmp_path / 'empty.png').stat().st_size
    assert plt.get_fignums() == []
