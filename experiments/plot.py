"""Draws the curves of one or several runs.

troll plot RUN_DIR [RUN_DIR …] --output curves.png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.plumbing.command import run_command
from troll_jax.metrics import read_metrics

Runs = Mapping[str, Sequence[dict]]  # name → rows of `metrics.jsonl`

# Per panel: title, whether its axis is logarithmic, and metric → style of its line. All lines of a run have its colour.
PANELS = [
    ('share of right answers (dots: held-out problems, greedy)', False, {'reward/mean': '-', 'eval/success': 'o'}),
    ('entropy of the sampled tokens, nats', False, {'rollout/entropy': '-'}),
    ('KL to π_old, nats (dotted: the largest)', True, {'update/kl_mean': '-', 'update/kl_max': ':'}),
    (
        'share of tokens that are projected or clipped',
        False,
        {'update/projected_share': '-', 'update/clipped_share': '-'},
    ),
]


def plot_runs(runs: Runs, output: str | Path) -> None:
    """Writes a PNG with all panels of runs."""
    draw_runs({'': runs}).savefig(output, dpi=110)


def draw_runs(groups: Mapping[str, Runs], panels: Sequence[tuple] = tuple(PANELS)) -> Figure:
    """Panels with a line for each metric of each run that has something to show, the run's name beside its end.

    Of several groups, title → runs, each has a column. The numbers of one kind share their axis.
    """
    rows, columns = (len(panels), len(groups)) if len(groups) > 1 else (-(-len(panels) // 2), 2)
    figure = Figure(figsize=(5.2 * columns, 2.8 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, sharey='row' if len(groups) > 1 else False)
    cells = [(panel, group, runs) for panel in panels for group, runs in groups.items()]
    for axis, ((title, logarithmic, metrics), group, runs) in zip(axes.flat, cells, strict=False):
        for colour, (name, steps) in enumerate(runs.items()):
            for metric, style in metrics.items():
                points = [(row['step'], row[metric]) for row in steps if row.get(metric) is not None]
                # A share that is zero throughout belongs to the other objective, and a logarithmic axis has no zero.
                hidden = logarithmic or metric.endswith('_share')
                if points and not (hidden and not any(value for _, value in points)):
                    axis.plot(*zip(*points, strict=True), style, color=f'C{colour}', label=name, markersize=4)
        axis.set(yscale='log' if logarithmic else 'linear')
        axis.set_title(f'{group}\n{title}' if group else title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel('step')
    for axis in axes.flat:
        _name_lines(axis)
    return figure


def _name_lines(axis) -> None:
    """Writes the name of each run at the right, as high as its first line ends, and the names clear of each other."""
    axis.autoscale_view()
    first = {line.get_label(): line for line in reversed(axis.lines)}

    def height(line) -> float:
        """In parts of the axis, at the last point that can be drawn."""
        points = line.get_xydata()
        shown = np.isfinite(points[:, 1]) & ((points[:, 1] > 0) | (axis.get_yscale() == 'linear'))
        return axis.transAxes.inverted().transform(axis.transData.transform(points[shown][-1]))[1]

    lowest = -1.0
    for place, name in sorted((height(line), name) for name, line in first.items()):
        lowest = max(place, lowest + 0.09)
        axis.annotate(name, (1.02, lowest), xycoords='axes fraction', color=first[name].get_color(), va='center')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run_dirs', nargs='+', help='folders of runs')
    parser.add_argument('--output', default='curves.png')
    arguments = parser.parse_args()
    runs = {run: read_metrics(Path(run) / 'metrics.jsonl') for run in arguments.run_dirs}
    for run, rows in runs.items():
        if not rows:
            raise ValueError(f'{run}/metrics.jsonl has no whole line; expected the folder of a run that took a step')
    plot_runs(runs, arguments.output)
    print(f'wrote {arguments.output}')


if __name__ == '__main__':
    run_command(main)
