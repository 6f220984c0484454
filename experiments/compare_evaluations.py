"""Compares two evaluations on the same problems, as pairs.

    troll compare_evaluations A B [--step-a N] [--step-b N] [--sets AMC_32 MATH500_1 …]
    troll compare_evaluations 'runs/clip_{seed}' 'runs/troll_{seed}' --seeds 0 1 2

A and B are two files `responses_<step>_<set>_<samples>.jsonl` of `experiments.evaluate`, or the folders that it wrote:
then every set that both have is compared, and the sets' mean. All sets are of one step, by default a folder's latest,
and sampled alike: each with one number of samples, and all with the same options (temperature, top_k, top_p, seed).

The difference of two models on one problem does not vary with how hard the problem is, so the interval of the mean
difference is narrower than what the intervals of the two models by themselves would suggest. It is one over problems:
how much two runs of one method with other seeds differ is not in it, unless there are runs with several seeds. Then the
interval is one over seeds and problems.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.plumbing.command import run_command
from troll_jax.evaluate import Estimate, distinct, estimate, estimate_mean, is_correct, mean_by_problem, over_seeds

# What experiments.evaluate names a set's files: options that are not as by default stand at the end.
_NAME = re.compile(r'(?P<set>[\w-]+?)_(?P<samples>\d+)(?P<options>(_(temperature|top_k|top_p|seed)_[\d.e-]+)*)')


class Successes(NamedTuple):
    """What a file of responses says of n prompts."""

    prompts: list[str]
    answers: list[str]
    success: np.ndarray  # [n], the share of correct samples
    samples: int  # of each


def read_success(file: Path) -> Successes:
    """The successes of a file of `experiments.evaluate`.

    Raises:
      ValueError: a file that experiments.evaluate did not write, or not to its end.
    """
    with file.open(encoding='utf-8') as lines:  # not splitlines, which ends a line at characters that models write
        try:
            rows = [json.loads(line) for line in lines]
            success = [is_correct(np.array(row['rewards'])).mean() for row in rows]
            prompts, answers = [row['prompt'] for row in rows], [row['answer'] for row in rows]
            samples = min(len(row['rewards']) for row in rows) if rows else 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file} is damaged ({error!r}); expected what experiments.evaluate wrote') from error
    if not rows:
        raise ValueError(f'{file} is empty; expected what experiments.evaluate wrote')
    return Successes(prompts, answers, np.array(success), samples)


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


def pair(a: Path, b: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """The shares of correct samples of two files on the same distinct problems, and the samples of each.

    Prompts may differ, as two models have two templates, but not the reference answers and their order.

    Raises:
      ValueError: the problems are not the same.
    """
    of_a, of_b = read_success(a), read_success(b)
    answers_a, answers_b = of_a.answers, of_b.answers
    if answers_a != answers_b:
        row = next((i for i, (x, y) in enumerate(zip(answers_a, answers_b, strict=False)) if x != y), None)
        where = f'the answers of problem {row} differ' if row is not None else 'one has more of them'
        raise ValueError(
            f'{a} and {b} are not of the same problems: {len(answers_a)} and {len(answers_b)}, {where}. Evaluate '
            'both on the same set, with a max_prompt_length that drops no prompt of either.'
        )
    problems = distinct(of_a.prompts, answers_a)
    shares = [mean_by_problem(of.success, problems) for of in (of_a, of_b)]
    return *shares, min(of_a.samples, of_b.samples)


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


def _row(pairs: list[tuple[np.ndarray, np.ndarray, int]]) -> dict[str, Estimate | int]:
    of_a, of_b, samples = zip(*pairs, strict=True)
    differences = [b - a for a, b in zip(of_a, of_b, strict=True)]
    return {
        'problems': sum(map(len, of_a)),
        'a': estimate(*of_a, samples=min(samples)),
        'b': estimate(*of_b, samples=min(samples)),
        'difference': estimate_mean(*differences, samples=min(samples)),
        'b_better': int(sum((x > 0).sum() for x in differences)),
        'a_better': int(sum((x < 0).sum() for x in differences)),
    }


def compare_seeds(comparisons: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """The comparisons of runs with several seeds on the same problems as one: means, and counts over all seeds.

    Raises:
      ValueError: not all are of the same sets.
    """
    if len({frozenset(rows) for rows in comparisons}) > 1:
        raise ValueError(f'the seeds have other sets: {[list(rows) for rows in comparisons]}; choose some with --sets')
    merged = {}
    for name in comparisons[0]:
        rows = [of_seed[name] for of_seed in comparisons]
        merged[name] = {
            key: over_seeds([row[key] for row in rows])
            if isinstance(value, Estimate)
            else sum(row[key] for row in rows)
            for key, value in rows[0].items()
        } | {'problems': rows[0]['problems']}
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('a')
    parser.add_argument('b')
    parser.add_argument('--seeds', nargs='+', help='what {seed} in A and B stands for; several runs')
    parser.add_argument('--step-a', type=int, help='of a folder; the latest by default')
    parser.add_argument('--step-b', type=int)
    parser.add_argument('--sets', nargs='+', help='such as AMC_32; all that both have by default')
    arguments = parser.parse_args()
    both = arguments.a, arguments.b
    if {'{seed}' in name for name in both} != {arguments.seeds is not None}:
        raise ValueError(f'A and B are {both}; expected {{seed}} in both of them with --seeds, and else in neither')
    pairs = [[Path(name.replace('{seed}', seed)) for name in both] for seed in arguments.seeds or ['']]
    rows = [compare(*pair, arguments.step_a, arguments.step_b, arguments.sets) for pair in pairs]
    if pairs[0][1].is_file():  # whose names differ by the seed
        rows = [{Path(arguments.b).stem: row} for found in rows for row in found.values()]
    rows = compare_seeds(rows)
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
