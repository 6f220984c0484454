"""Compares two evaluations on the same problems by the paired bootstrap.

    python -m experiments.compare_evaluations A B [--step-a N] [--step-b N] [--sets AMC_32 MATH500_1 …]

A and B are two files `responses_<step>_<set>_<samples>.jsonl` of `experiments.evaluate`, or the folders that it wrote:
then every set that both have is compared, and the sets' mean. All sets are of one step, by default a folder's latest,
and sampled alike: each with one number of samples, and all with the same options (temperature, top_k, top_p, seed).

The difference of two models on one problem does not vary with how hard the problem is, so the interval of the mean
difference is narrower than what the intervals of the two models by themselves would suggest.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.plumbing.command import run_command
from troll_jax.evaluate import Estimate, estimate, is_correct

# What experiments.evaluate names a set's files: options that are not as by default stand at the end.
_NAME = re.compile(r'(?P<set>[\w-]+?)_(?P<samples>\d+)(?P<options>(_(temperature|top_k|top_p|seed)_[\d.e-]+)*)')


def read_success(file: Path) -> tuple[list[str], np.ndarray]:
    """The reference answers of the problems, and of each the share of correct samples [n].

    Raises:
      ValueError: a file that experiments.evaluate did not write, or not to its end.
    """
    with file.open(encoding='utf-8') as lines:  # not splitlines, which ends a line at characters that models write
        try:
            rows = [json.loads(line) for line in lines]
            success = [is_correct(np.array(row['rewards'])).mean() for row in rows]
            answers = [row['answer'] for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file} is damaged ({error!r}); expected what experiments.evaluate wrote') from error
    if not rows:
        raise ValueError(f'{file} is empty; expected what experiments.evaluate wrote')
    return answers, np.array(success)


def find_responses(path: Path, step: int | None = None) -> dict[str, Path]:
    """The files of responses in a folder by `<set>_<samples>` and options, of one step, by default the latest.

    Raises:
      ValueError: there are none.
    """
    found: dict[int, dict[str, Path]] = {}
    for file in sorted(path.glob('responses_*.jsonl')):
        if name := re.fullmatch(r'responses_(\d+)_(.+)\.jsonl', file.name):
            found.setdefault(int(name[1]), {})[name[2]] = file
    if not found or step is not None and step not in found:
        of_step = '' if step is None else f' of step {step}'
        there = f', which has steps {sorted(found)}' if found else ''
        raise ValueError(
            f'no responses{of_step} in {str(path)!r}{there}; expected a folder that experiments.evaluate wrote to'
        )
    return found[max(found) if step is None else step]


def check_alike(names: Sequence[str]) -> None:
    """Raises a ValueError if a set is there twice, or if sets were not sampled alike: their mean would mean nothing."""
    parts = [_NAME.fullmatch(name) for name in names]
    sets = [name if part is None else part['set'] for name, part in zip(names, parts, strict=True)]
    # experiments.evaluate marks sets of the train split by their names.
    options = {
        (part['options'] if part else '', bool(re.search('(^|_)train$', s)))
        for part, s in zip(parts, sets, strict=True)
    }
    if len(set(sets)) < len(sets) or len(options) > 1:
        raise ValueError(
            f'evaluations that were not made alike have no common mean: got {list(names)} (set, samples per prompt, '
            'options); expected each set once, all of one split and with the same options. Choose with --sets.'
        )


def pair(a: Path, b: Path) -> tuple[np.ndarray, np.ndarray]:
    """The shares of correct samples of two files on the same problems.

    Prompts may differ, as two models have two templates, but not the reference answers and their order.

    Raises:
      ValueError: the problems are not the same.
    """
    (answers_a, success_a), (answers_b, success_b) = read_success(a), read_success(b)
    if answers_a != answers_b:
        row = next((i for i, (x, y) in enumerate(zip(answers_a, answers_b, strict=False)) if x != y), None)
        where = f'the answers of problem {row} differ' if row is not None else 'one has more of them'
        raise ValueError(
            f'{a} and {b} are not of the same problems: {len(answers_a)} and {len(answers_b)}, {where}. Evaluate '
            'both on the same set, with a max_prompt_length that drops no prompt of either.'
        )
    return success_a, success_b


def compare(
    a: Path, b: Path, step_a: int | None = None, step_b: int | None = None, sets: Sequence[str] | None = None
) -> dict[str, dict]:
    """Success of A and of B, and B less A, each an `Estimate`: for every set, and for the mean of several.

    Args:
      a, b: files of responses, or folders with them.
      step_a, step_b: steps for folders; None: their latest.
      sets: sets to compare, of those that both folders have, as files are named behind the step: 'AMC_32'; all if None.

    Raises:
      ValueError: no responses, no set that both have, sets that were not sampled alike, or other problems.
    """
    if a.is_file() and b.is_file():
        files = {b.stem: (a, b)}
    else:
        of_a, of_b = find_responses(a, step_a), find_responses(b, step_b)
        common = [name for name in of_a if name in of_b]
        if not common or set(sets or ()) - set(common):
            missing = 'no set' if sets is None else f'not all of {list(sets)}'
            where = [f'{path} has {list(of)}' for path, of in ((a, of_a), (b, of_b))]
            raise ValueError(f'{missing} in common: {where[0]}, {where[1]} (set, samples per prompt, options)')
        check_alike(sets or common)
        files = {name: (of_a[name], of_b[name]) for name in sets or common}
    pairs = {name: pair(*both) for name, both in files.items()}
    rows = {name: _row([both]) for name, both in pairs.items()}
    return rows if len(rows) == 1 else rows | {'mean': _row(list(pairs.values()))}


def _row(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Estimate | int]:
    return {
        'problems': sum(len(a) for a, _ in pairs),
        'a': estimate(*(a for a, _ in pairs)),
        'b': estimate(*(b for _, b in pairs)),
        'difference': estimate(*(b - a for a, b in pairs)),
        'b_better': int(sum((b > a).sum() for a, b in pairs)),
        'a_better': int(sum((a > b).sum() for a, b in pairs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('a', type=Path)
    parser.add_argument('b', type=Path)
    parser.add_argument('--step-a', type=int, help='of a folder; the latest by default')
    parser.add_argument('--step-b', type=int)
    parser.add_argument('--sets', nargs='+', help='such as AMC_32; all that both have by default')
    arguments = parser.parse_args()
    rows = compare(arguments.a, arguments.b, arguments.step_a, arguments.step_b, arguments.sets)
    width = max(map(len, ['set', *rows]))
    print(f'{"set":{width}} | problems | A     | B     | B less A, 95 % interval | B better at | A better at')
    for name, row in rows.items():
        low, high = row['difference'].low, row['difference'].high
        print(
            f'{name:{width}} | {row["problems"]:8} | {row["a"].mean:.3f} | {row["b"].mean:.3f} | '
            f'{row["difference"].mean:+.3f} [{low:+.3f}, {high:+.3f}] | {row["b_better"]:11} | {row["a_better"]:11}'
        )


if __name__ == '__main__':
    run_command(main)
