"""The quickstart: compares TROLL and Clip in minutes, on a CPU and without a network.

    python -m experiments.quickstart [--folder runs/quickstart] [--seed 0]

Makes a small model that solves some problems, trains it with TROLL and with PPO's clip, and evaluates both on problems
that neither has seen. Every step is a command of its own, the same that a large model takes, and is printed. Writes
`summary.json` and `curves.png` into the folder.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from experiments.plot import plot_runs
from experiments.plumbing.command import run_command
from troll_jax.metrics import read_metrics

METHODS = ('troll', 'clip')
SAMPLES = 8  # per held-out problem


def run(*command: str) -> float:
    """Runs a module of this repository and returns the seconds it took. If it fails, this ends with its status."""
    print(f'\n$ python -m {shlex.join(command)}', flush=True)
    start = time.perf_counter()
    # The commands share most of their programs; what one has compiled need not be compiled again by the next.
    defaults = {'JAX_COMPILATION_CACHE_DIR': os.path.abspath('.jax_cache'), 'JAX_PLATFORMS': 'cpu'}
    if status := subprocess.run([sys.executable, '-m', *command], env=defaults | os.environ).returncode:
        # Its own words are above, unless it was killed, such as for memory.
        sys.exit(status if status > 0 else f'error: {command[0]} was killed by signal {-status}')
    return time.perf_counter() - start


def evaluate(run_dir: Path, step: int) -> dict:
    run('experiments.evaluate', str(run_dir), '--step', str(step), f'evaluation.samples_per_prompt = {SAMPLES}')
    return json.loads((run_dir / f'evaluation_{step}_test_{SAMPLES}.json').read_text())


def quickstart(folder: Path, seed: int) -> dict[str, dict]:
    """Runs the whole comparison and returns what goes into `summary.json`."""
    start = time.perf_counter()
    for name in ('model', *METHODS):
        shutil.rmtree(folder / name, ignore_errors=True)
    model = folder / 'model'
    run(
        'experiments.warm_start',
        'configs/arithmetic_model.gin',
        f"warm_start.folder = '{model}'",
        f'warm_start.seed = {seed}',
    )
    summary, rows, before = {}, {}, None
    for method in METHODS:
        run_dir = folder / method
        seconds = run(
            'experiments.train',
            f'configs/quickstart_{method}.gin',
            f"Run.folder = '{run_dir}'",
            f"Experiment.model = '{model}'",
            f'Sampling.seed = {seed}',
        )
        rows[method] = read_metrics(run_dir / 'metrics.jsonl')
        before = before or evaluate(run_dir, 0)
        after = evaluate(run_dir, rows[method][-1]['step'])
        summary[method] = {
            'success_before': before['success']['mean'],
            'success_after': after['success']['mean'],
            'success_after_interval': [after['success']['low'], after['success']['high']],
            'pass_at_8_before': before['pass@8']['mean'],
            'pass_at_8_after': after['pass@8']['mean'],
            'entropy_after': rows[method][-1]['rollout/entropy'],
            'kl_max': max(row['update/kl_max'] for row in rows[method] if row.get('update/kl_max') is not None),
            'seconds': seconds,
        }
    (folder / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    plot_runs(rows, folder / 'curves.png')
    print_table(summary)
    print(f'\n{time.perf_counter() - start:.0f} s in all; {folder}/summary.json and {folder}/curves.png are written')
    return summary


def print_table(summary: dict[str, dict]) -> None:
    print(f'\nheld-out problems, {SAMPLES} samples each at temperature 1; intervals are 95 %\n')
    print('method | success before | after                | pass@8 before | after | entropy | largest KL | seconds')
    print('------ | -------------- | -------------------- | ------------- | ----- | ------- | ---------- | -------')
    for method, row in summary.items():
        low, high = row['success_after_interval']
        print(
            f'{method:6} | {row["success_before"]:14.3f} | {row["success_after"]:.3f} [{low:.3f}, {high:.3f}] | '
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
    parser.add_argument('--seed', type=int, default=0, help='of the model and of both runs')
    arguments = parser.parse_args()
    quickstart(arguments.folder, arguments.seed)


if __name__ == '__main__':
    run_command(main)
