"""Many short runs of one task: estimators × policy objectives, over learning rates and staleness.

    troll compare [--suite quickstart | smollm2 | lag | long] [--seeds 5] [--methods GRPO/TROLL GSPO/Clip …]

All start from one model, make as many updates of as many responses, and differ in method, learning rate, in how many
updates are made of one rollout batch (its staleness), and in how many steps lie between the policy that samples and the
one that learns (its lag). Finished runs are lines of `results.jsonl` in the
folder, so that the command resumes where it was stopped. Draws `comparison.png` and writes `comparison.md` from the
lines that are there; `--only-draw` does nothing else. Where there is no warm-started model yet, it is made first.
"""

import argparse
import logging
from pathlib import Path

from experiments.plumbing.command import run_command
from experiments.studies.compare import SUITES, draw, read_results, run_all, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=SUITES, default='quickstart', help='task and settings')
    parser.add_argument('--folder', type=Path, help='of the results; runs/comparison_SUITE by default')
    parser.add_argument('--seeds', type=int, default=5, help='of data and sampling, from 0')
    parser.add_argument('--methods', nargs='*', help='estimator/objective; all of the suite by default')
    parser.add_argument('--only-draw', action='store_true')
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    methods = arguments.methods or suite.methods
    folder = arguments.folder or Path(f'runs/comparison_{arguments.suite}')
    if unknown := set(methods) - set(suite.methods):
        raise ValueError(f'no method {sorted(unknown)}; expected some of {suite.methods}')
    logging.basicConfig(level=logging.WARNING)
    if not arguments.only_draw:
        run_all(suite, folder, methods, arguments.seeds)
    rows = read_results(folder / 'results.jsonl')
    if not rows:
        raise ValueError(f'no runs in {folder}/results.jsonl; leave out --only-draw, or change --folder')
    figure = draw(rows)
    figure.savefig(folder / 'comparison.png', dpi=90)
    (folder / 'comparison.md').write_text(table(rows))
    print(f'{len(rows)} runs in {folder}: comparison.md and comparison.png are written')


if __name__ == '__main__':
    run_command(main)
