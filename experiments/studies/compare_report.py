"""Tables and figures of `troll compare`: success by cell, and methods in order with differences by seed."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from experiments.studies.compare_suites import AXES, ESTIMATORS, Suite, bounds_of
from troll_jax.evaluate import Estimate, over_seeds


def by_seed(rows: list[dict], cells: Sequence[dict], seeds: Sequence[int], **fixed) -> dict[int, dict[str, float]]:
    """The means over cells of the seeds that have a run in each; a seed without one of them is left out.

    Of `success`, its interval over problems (`low`, `high`; the success itself where the runs have none),
    `constrained_share` and `kl_mean`.
    """
    named = lambda row: (row['seed'], *(row[name] for name in AXES))
    runs = {named(row): row for row in rows if all(row[name] == value for name, value in fixed.items())}
    mean = lambda chosen, name, other=None: float(np.mean([row.get(name, row.get(other, np.nan)) for row in chosen]))
    found = {}
    for seed in seeds:
        chosen = [runs.get(named(cell | {'seed': seed})) for cell in cells]
        if None not in chosen:
            found[seed] = {name: mean(chosen, name, 'success') for name in ('success', 'low', 'high')}
            found[seed] |= {name: mean(chosen, name) for name in ('constrained_share', 'kl_mean')}
    return found


def estimate(found: dict[int, dict[str, float]]) -> Estimate:
    """Success over seeds, for other seeds and, where the runs have intervals over problems, other problems."""
    return _over([Estimate(x['success'], x['low'], x['high']) for x in found.values()])


def less(found: dict[int, dict[str, float]], reference: dict[int, dict[str, float]]) -> Estimate:
    """The mean difference in success, paired by seed; the interval is Student's over seeds, on the same problems."""
    differences = [x['success'] - reference[seed]['success'] for seed, x in found.items() if seed in reference]
    return _over([Estimate(x, x, x) for x in differences])


def _over(estimates: list[Estimate]) -> Estimate:
    """Over seeds; of one seed without an interval of its own there is none."""
    known = len(estimates) > 1 or estimates[0].low < estimates[0].high
    return over_seeds(estimates) if known else Estimate(estimates[0].mean, np.nan, np.nan)


def best_bound(suite: Suite, rows: list[dict], method: str) -> str:
    """The bound with the highest success over all cells of the seeds that choose; the file's own if none is higher."""
    seeds = suite.choosing_seeds()
    found = {x: by_seed(rows, suite.cells(), seeds, method=method, bound=x) for x in bounds_of(method) if seeds}
    complete = {bound: estimate(x).mean for bound, x in found.items() if len(x) == len(seeds)}
    return max(complete, key=complete.get, default='')


def bounds_shown(suite: Suite, rows: list[dict], method: str) -> list[str]:
    """The file's own bound, and the one that was chosen."""
    return list(dict.fromkeys(['', best_bound(suite, rows, method)]))


def table(suite: Suite, rows: list[dict], methods: Sequence[str], seeds: int) -> str:
    """Success of every method at every cell, in Markdown; where a seed is missing, how many are there."""
    cells, reported = suite.cells(), suite.reported_seeds(seeds)
    kinds = [name for name in AXES if len({cell[name] for cell in cells}) > 1] or ['learning_rate']
    lines = [f'| {AXES[name]} | ' + ' | '.join(str(cell[name]) for cell in cells) + ' | all |' for name in kinds]
    lines.insert(1, '| --- ' * (len(cells) + 2) + '|')
    for method in methods:
        for bound in bounds_shown(suite, rows, method):
            found = [
                by_seed(rows, part, reported, method=method, bound=bound) for part in [*([x] for x in cells), cells]
            ]
            lines.append(f'| {_title(method, bound)} | ' + ' | '.join(_shown(x, seeds) for x in found) + ' |')
    return '\n'.join(lines) + '\n'


def ranking(suite: Suite, rows: list[dict], methods: Sequence[str], seeds: int) -> str:
    """Methods by their mean success over all cells, in Markdown, at the bounds of their files and at the chosen ones.

    Differences are to the suite's first method, at its own bound or at the chosen one likewise.
    """
    own, chosen = dict.fromkeys(methods, ''), {method: best_bound(suite, rows, method) for method in methods}
    seeds_of = partial(by_seed, rows, suite.cells(), suite.reported_seeds(seeds))
    bounds = [own, chosen] if suite.choosing else [own]
    found = [{method: seeds_of(method=method, bound=bound) for method, bound in of.items()} for of in bounds]
    there = {method: min(len(of[method]) for of in found) for method in methods}
    complete = [method for method, count in there.items() if count == seeds]
    first = suite.methods[0]

    def cells(of: dict, method: str) -> list[str]:
        difference = _interval(less(of[method], of[first]), '+') if first in complete and method != first else ''
        means = [np.mean([x[name] for x in of[method].values()]) for name in ('constrained_share', 'kl_mean')]
        return [_interval(estimate(of[method])), difference, *(f'{x:.3f}'.replace('nan', '') for x in means)]

    titles = ['success', f'less {first}', 'tokens held', 'mean KL']
    header = ['method', *titles, 'chosen bound', *titles][: 5 * len(bounds)]
    cells_of_all = [header, ['---'] * len(header)]
    for method in sorted(complete, key=lambda method: -estimate(found[-1][method]).mean):
        bound = f'`{chosen[method]}`' if chosen[method] else 'its own'
        both = [cell for of in found for cell in (bound, *cells(of, method))]
        cells_of_all.append([_title(method, ''), *both[1:]])
    lacking = [f'{_title(method, "")} ({count} of {seeds} seeds)' for method, count in there.items() if count < seeds]
    lines = [f'| {" | ".join(row)} |' for row in cells_of_all]
    return '\n'.join([*lines, *([f'\nIncomplete: {", ".join(lacking)}.'] if lacking else [])]) + '\n'


def _title(method: str, bound: str) -> str:
    return method.replace('/', ', ') + (f' (`{bound}`)' if bound else '')


def _interval(x: Estimate, sign: str = '') -> str:
    return f'{x.mean:{sign}.3f}' + ('' if np.isnan(x.low) else f' ± {(x.high - x.low) / 2:.3f}')


def _shown(found: dict, seeds: int) -> str:
    return _interval(estimate(found)) if len(found) == seeds else f'{len(found)} of {seeds} seeds'


def draw(suite: Suite, rows: list[dict], methods: Sequence[str], seeds: int) -> Figure:
    """Success against each axis that varies, over all values of the others; a column per estimator.

    With methods that are files: one line for each, at its own bound and at the chosen one.
    """
    of = lambda cells, method, bound: by_seed(rows, cells, suite.reported_seeds(seeds), method=method, bound=bound)
    estimators = [x for x in ESTIMATORS if any(method.startswith(f'{x}/') for method in methods)]
    if not estimators:
        found = {_title(m, b): of(suite.cells(), m, b) for m in methods for b in bounds_shown(suite, rows, m)}
        complete = sorted((estimate(x), name) for name, x in found.items() if len(x) == seeds)
        figure = Figure(figsize=(8, 1 + 0.22 * len(complete)), layout='constrained')
        axis = figure.subplots()
        means = np.array([x for x, _ in complete]).reshape(-1, 3)  # mean, low, high
        sides = np.abs(means[:, 1:] - means[:, :1]).T
        axis.errorbar(means[:, 0], range(len(complete)), xerr=sides, fmt='o', capsize=3)
        axis.set_yticks(range(len(complete)), [name for _, name in complete], fontsize=8)
        axis.set(xlabel='success on held-out problems', xlim=(0, 1))
        axis.grid(alpha=0.3)
        return figure
    values = {name: list(dict.fromkeys(cell[name] for cell in suite.cells())) for name in AXES}
    kinds = {name: x for name, x in values.items() if len(x) > 1} or {'learning_rate': values['learning_rate']}
    figure = Figure(figsize=(4 * len(estimators), 3.5 * len(kinds)), layout='constrained')
    axes = figure.subplots(len(kinds), len(estimators), sharey=True, squeeze=False)
    for column, estimator in enumerate(estimators):
        for axis, (name, levels) in zip(axes[:, column], kinds.items(), strict=True):
            for offset, method in enumerate(x for x in methods if x.startswith(f'{estimator}/')):
                parts = [[cell for cell in suite.cells() if cell[name] == level] for level in levels]
                found = [of(part, method, '') for part in parts]
                points = [(x, estimate(y)) for x, y in enumerate(found) if len(y) == seeds]
                if points:
                    axis.errorbar(
                        [x + 0.04 * (offset - 1.5) for x, _ in points],
                        [interval.mean for _, interval in points],
                        np.transpose([(x.mean - x.low, x.high - x.mean) for _, x in points]),
                        fmt='o-',
                        capsize=3,
                        markersize=4,
                        label=method.split('/')[1],
                    )
            axis.set_xticks(range(len(levels)), map(str, levels))
            axis.set(title=estimator, xlabel=AXES[name], ylim=(0, 1))
            axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel('success on held-out problems')
    return figure
