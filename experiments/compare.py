"""Many short runs of the quickstart's task: estimators × policy objectives, over learning rates and staleness.

    python -m experiments.compare [--folder runs/comparison] [--seeds 5] [--methods GRPO/TROLL GSPO/Clip …]

All start from one warm-started model, make as many updates of as many responses, and differ in method, learning rate
and in how many updates are made of one rollout batch (its staleness). Finished runs are lines of `results.jsonl` in the
folder, so that the command resumes where it was stopped. Draws `comparison.png` and writes `comparison.md` from the
lines that are there; `--only-draw` does nothing else. Where there is no warm-started model yet, it is made first.
"""

import argparse
import logging
from pathlib import Path

from experiments.plumbing.command import run_command
from experiments.studies.compare import METHODS, draw, read_results, run_all, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=Path('runs/comparison'))
    parser.add_argument('--seeds', type=int, default=5, help='of data and sampling, from 0')
    parser.add_argument('--methods', nargs='*', default=METHODS, help='estimator/objective')
    parser.add_argument('--only-draw', action='store_true')
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(METHODS):
        raise ValueError(f'no method {sorted(unknown)}; expected some of {METHODS}')
    logging.basicConfig(level=logging.WARNING)
    if not arguments.only_draw:
        run_all(arguments.folder, arguments.methods, arguments.seeds)
    rows = read_results(arguments.folder / 'results.jsonl')
    if not rows:
        raise ValueError(f'no runs in {arguments.folder}/results.jsonl; leave out --only-draw, or change --folder')
    figure = draw(rows)
    figure.savefig(arguments.folder / 'comparison.png', dpi=90)
    (arguments.folder / 'comparison.md').write_text(table(rows))
    print(f'{len(rows)} runs in {arguments.folder}: comparison.md and comparison.png are written')


if __name__ == '__main__':
    run_command(main)
