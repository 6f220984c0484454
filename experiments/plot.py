"""Draws the curves of one or several runs.

python -m experiments.plot RUN_DIR [RUN_DIR …] --output curves.png
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.plumbing.command import run_command
from troll_jax.metrics import read_metrics

# Per panel: title, whether its axis is logarithmic, and metric → style of its line.
PANELS = [
    ('success', False, {'reward/mean': '-', 'eval/success': 'o'}),
    ('entropy of the sampled tokens (nats)', False, {'rollout/entropy': '-'}),
    (
        'KL to the old policy (nats per token)',
        True,
        {'update/kl_mean': '-', 'update/kl_p99': '--', 'update/kl_max': ':'},
    ),
    ('share of tokens', False, {'update/projected_share': '-', 'update/clipped_share': '--'}),
]


def plot_runs(runs: Mapping[str, Sequence[dict]], output: str | Path) -> None:
    """Writes a PNG with the curves of runs, given as name → rows of `metrics.jsonl`."""
    figure = draw_runs(runs)
    figure.savefig(output, dpi=110)


def draw_runs(runs: Mapping[str, Sequence[dict]]) -> Figure:
    """One panel for each of `PANELS`, and in it one line for each metric of each run that has something to show."""
    figure = Figure(figsize=(4.2 * len(PANELS), 3.4), layout='constrained')
    axes = figure.subplots(1, len(PANELS))
    for axis, (title, logarithmic, metrics) in zip(axes, PANELS, strict=True):
        for colour, (name, rows) in enumerate(runs.items()):
            for metric, style in metrics.items():
                points = [(row['step'], row[metric]) for row in rows if row.get(metric) is not None]
                # A share that is zero throughout belongs to the other objective, and a logarithmic axis has no zero.
                hidden = logarithmic or metric.endswith('_share')
                if not points or (hidden and not any(value for _, value in points)):
                    continue
                label = f'{name}: {metric.split("/")[-1].replace("_", " ")}' if len(metrics) > 1 else name
                axis.plot(*zip(*points, strict=True), style, color=f'C{colour}', label=label, markersize=4)
        axis.set(title=title, xlabel='step', yscale='log' if logarithmic else 'linear')
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    return figure


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
