"""Many short runs of one task: where trust regions, and estimators × policy objectives, are compared.

    troll compare [--suite quickstart | smollm2 | regions | rates | …] [--seeds 5] [--methods GRPO/TROLL …]

All start from one model and make as many updates of as many responses. A suite (studies/compare_suites.py) has methods
and, as axes, the learning rate, how many updates are made of one rollout batch (its staleness), how many steps lie
between the policy that samples and the one that learns (its lag), and the precision of the sampler. Where a suite
chooses bounds, its first seeds choose one for each method, and others are reported. Finished runs are lines of
`results.jsonl` in the folder, so that the command resumes where it was stopped. Draws `comparison.png` and writes
`comparison.md` from the lines that are there; `--only-draw` does nothing else. Where there is no warm-started model
yet, it is made first.
"""

import argparse
import logging
from pathlib import Path

from experiments.plumbing.command import run_command
from experiments.studies.compare import read_results, run_all
from experiments.studies.compare_report import draw, ranking, table
from experiments.studies.compare_suites import SUITES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=SUITES, default='quickstart', help='task and settings')
    parser.add_argument('--folder', type=Path, help='of the results; runs/comparison_SUITE by default')
    parser.add_argument('--seeds', type=int, default=5, help='of data and sampling, that are reported')
    parser.add_argument('--methods', nargs='*', help='of the suite; all by default')
    parser.add_argument('--processes', type=int, default=1, help='that make runs at once, on one host')
    parser.add_argument('--only-draw', action='store_true')
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    methods = arguments.methods or suite.methods
    folder = arguments.folder or Path(f'runs/comparison_{arguments.suite}')
    if unknown := set(methods) - set(suite.methods):
        raise ValueError(f'no method {sorted(unknown)}; expected some of {suite.methods}')
    if min(arguments.seeds, arguments.processes) < 1:
        raise ValueError(f'--seeds is {arguments.seeds} and --processes {arguments.processes}; expected at least 1')
    logging.basicConfig(level=logging.WARNING)
    if not arguments.only_draw:
        run_all(suite, folder, methods, arguments.seeds, arguments.processes)
    rows = read_results(folder / 'results.jsonl')
    if not rows:
        raise ValueError(f'no runs in {folder}/results.jsonl; leave out --only-draw, or change --folder')
    shown = suite, rows, methods, arguments.seeds
    draw(*shown).savefig(folder / 'comparison.png', dpi=90)
    (folder / 'comparison.md').write_text(f'{table(*shown)}\n{ranking(*shown)}')
    print(f'{len(rows)} runs in {folder}: comparison.md and comparison.png are written')


if __name__ == '__main__':
    run_command(main)
