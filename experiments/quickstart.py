"""The quickstart: compares TROLL and Clip in minutes, on a CPU and without a network.

    troll quickstart [--folder runs/quickstart] [--seed 0]

Makes the warm-started model, then trains it with TROLL and with Clip twice: with gentle updates, at which both perform
the same, and with a learning rate five times as high and four times as many updates of each rollout batch, a setting
that was chosen because they differ there (docs/comparison.md). Evaluates the model before and after on held-out
problems. Prints the results as a table, and writes `summary.json` and `curves.png` into the folder.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.evaluate import evaluation
from experiments.plot import PANELS, draw_runs
from experiments.plumbing.command import run_command, start_log
from experiments.plumbing.gin_files import Config
from experiments.plumbing.names import SETTINGS
from experiments.train import train
from experiments.warm_start import warm_start
from troll_jax.metrics import read_metrics

METHODS = ('troll', 'clip')
SAMPLES = 8  # per held-out problem
RUNS = {  # the ending of the runs' names
    '': ('8 updates per rollout batch, learning rate 2e-4', ['Run.steps = 24', 'Run.evaluate_every = 8']),
    '_stale': (
        '32 updates per rollout batch, learning rate 1e-3',
        ['Run.steps = 10', 'Sampling.prompts_per_step = 256', 'adamw.learning_rate = 1e-3', 'Run.evaluate_every = 5'],
    ),
}


def share_programs(platform: str | None) -> None:
    """Keeps all that is compiled in `.jax_cache`, and chooses a platform, where environment variables name none."""
    config = jax.config
    config.update('jax_platforms', config.jax_platforms or platform)
    config.update('jax_compilation_cache_dir', config.jax_compilation_cache_dir or os.path.abspath('.jax_cache'))
    config.update('jax_persistent_cache_min_compile_time_secs', 0)


def evaluate(run_dir: Path, step: int) -> dict:
    config = Config([run_dir / 'config.gin'], commands=[evaluation])
    command = config.function(evaluation, str(run_dir), config)
    return command(step=step, samples_per_prompt=SAMPLES)['test']


def train_and_evaluate(
    folder: Path, method: str, name: str, files: Sequence[str], bindings: Sequence[str], before: dict | None = None
) -> tuple[dict, dict, list[dict]]:
    """Trains a run `name` in a folder.

    Args:
      folder: folder of all runs.
      method: file of configs/objectives.
      name: name of the run.
      files, bindings: its other settings.
      before: evaluation of the start model; None: it is made.

    Returns:
      Its part of `summary.json`, the evaluation of the start model, and the metrics of all steps.
    """
    run_dir = folder / name
    shutil.rmtree(run_dir, ignore_errors=True)
    files = [*files, f'configs/objectives/{method}.gin']
    print(f'\ntraining {run_dir}', flush=True)
    start = time.perf_counter()
    config = Config(files, [f"Run.folder = '{run_dir}'", *bindings])
    if not train(*map(config.build, SETTINGS)):
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    rows = read_metrics(run_dir / 'metrics.jsonl')
    before = before or evaluate(run_dir, 0)
    after = evaluate(run_dir, rows[-1]['step'])
    summary = {
        'success_before': before['success']['mean'],
        'success_after': after['success']['mean'],
        'success_after_interval': [after['success']['low'], after['success']['high']],
        f'pass_at_{SAMPLES}_before': before[f'pass@{SAMPLES}']['mean'],
        f'pass_at_{SAMPLES}_after': after[f'pass@{SAMPLES}']['mean'],
        'entropy_after': rows[-1]['rollout/entropy'],
        'kl_max': max(row['update/kl_max'] for row in rows if row.get('update/kl_max') is not None),
        'seconds': seconds,
    }
    return summary, before, rows


def quickstart(folder: Path, seed: int) -> dict[str, dict]:
    """Runs the whole comparison and returns what goes into `summary.json`."""
    share_programs('cpu')  # where the model is so small, any other device is slower
    start = time.perf_counter()
    model = folder / 'model'
    shutil.rmtree(model, ignore_errors=True)
    print(f'making {model}', flush=True)
    bindings = [f"warm_start.folder = '{model}'", f'warm_start.seed = {seed}']
    Config(['configs/arithmetic_model.gin'], bindings, [warm_start]).function(warm_start)()
    summary, groups, before = {}, {}, None
    for ending, (title, bindings) in RUNS.items():
        groups[title] = {}
        for method in METHODS:
            summary[method + ending], before, groups[title][method] = train_and_evaluate(
                folder,
                method,
                method + ending,
                ['configs/quickstart.gin'],
                [f"Experiment.model = '{model}'", f'Sampling.seed = {seed}', *bindings],
                before,
            )
    (folder / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    draw_runs(groups, [PANELS[0], PANELS[2]]).savefig(folder / 'curves.png', dpi=110)
    print_table(summary)
    print(f'\n{time.perf_counter() - start:.0f} s in all; {folder}/summary.json and {folder}/curves.png are written')
    return summary


def print_table(summary: dict[str, dict]) -> None:
    print(f'\nheld-out problems, {SAMPLES} samples each at temperature 1; intervals are 95 %\n')
    print(
        'method      | success before | after                | pass@8 before | after | entropy | largest KL | seconds'
    )
    print(' | '.join('-' * width for width in (11, 14, 20, 13, 5, 7, 10, 7)))
    for method, row in summary.items():
        low, high = row['success_after_interval']
        print(
            f'{method:11} | {row["success_before"]:14.3f} | {row["success_after"]:.3f} [{low:.3f}, {high:.3f}] | '
            f'{row["pass_at_8_before"]:13.3f} | {row["pass_at_8_after"]:.3f} | {row["entropy_after"]:7.3f} | '
            f'{row["kl_max"]:10.3f} | {row["seconds"]:7.0f}'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--folder',
        type=Path,
        default=Path('runs/quickstart'),
        help='to write to; an earlier comparison in it is replaced',
    )
    parser.add_argument('--seed', type=int, default=0, help='of the model and of the runs')
    arguments = parser.parse_args()
    start_log()
    quickstart(arguments.folder, arguments.seed)


if __name__ == '__main__':
    run_command(main)
