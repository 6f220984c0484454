"""The tables and the figure of `experiments/replay.py`, from what it writes as JSON."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.studies.token_gradients import SILENCED


def report(result: dict) -> str:
    """The tables of the terminal."""
    names = list(result['objectives'])
    width = max(map(len, names)) + 5
    show = lambda value, form: '–' if value is None else format(value, form)
    before = {name: show(value, '.3g') for name, value in result['before'].items()}
    source = ''
    if result['precision']:
        source = f'; π_old is recomputed with weights in {result["precision"]}'
    elif result['run_lag']:
        source = f'; the policy of {result["run_lag"]} steps before sampled it'
    lines = [
        f'rollout of step {result["step"]}{source}. From checkpoint {result["checkpoint"]}: {result["updates"]} '
        f'updates with {result["run_objective"]}, then minibatch {result["updates"] + 1} of {result["minibatches"]}, '
        f'{result["tokens"]:,} tokens',
        f'KL(π̃ ‖ π_old) in nats: {show(result["kl_at_start"], ".2g")} on average before the first update; before the '
        'compared step {kl_mean} on average, p99 {kl_p99}, max {kl_max}. Entropy {entropy}'.format(**before),
    ]
    if result['checkpoint'] != result['step'] + result['lag']:
        lines.append(
            f'WARNING: there is no checkpoint {result["step"]}; the parameters are those of {result["checkpoint"]} '
            'instead'
        )
    if result['skipped_updates']:
        lines.append(f'WARNING: {result["skipped_updates"]} of the updates were skipped, their gradients not finite')
    lines.append(' ' * (width + 40) + "after the optimizer's step".rjust(30) + 'after an equal step'.rjust(20))
    titles = ['gradient', 'cosine', 'affected', 'silenced', 'KL mean', 'KL p99', 'entropy', 'KL mean', 'TV mean', 'ms']
    below = ['norm', 'to 1', 'tokens', 'tokens', '', '', 'change', '', '', '']
    lines += [(' ' * width + _cells(title)).rstrip() for title in (titles, below)]
    for i, name in enumerate(names):
        row = result['objectives'][name]
        values = [
            show(row['gradient_norm'], '.4f'),
            show(result['cosines'][names[0]][name], '.3f'),
            show(row['affected_share'], '.1%'),
            show(row['silenced_share'], '.1%'),
            *[show(row[f'{kl}_after'], '.2g') for kl in ('kl_mean', 'kl_p99')],
            show(_difference(row['entropy_after'], result['before']['entropy']), '+.4f'),
            *[show(row[f'{name}_after_equal_step'], '.2g') for name in ('kl_mean', 'tv_mean')],
            show(row['milliseconds'], '.0f'),
        ]
        lines.append(f'{i + 1:2} {_starred(name, result):{width - 3}}' + _cells(values))
    lines += ['', 'cosines of gradients'.ljust(width) + _cells(range(1, len(names) + 1), 7)]
    for i, name in enumerate(names):
        cosines = [show(result['cosines'][name][other], '.3f') for other in names[: i + 1]]
        lines.append(f'{i + 1:2} {name:{width - 3}}' + _cells(cosines, 7))
    lines += ['', *held_tokens(result, width), '', *token_gradients(result, width)]
    lines += [
        '',
        "* the run's. Tokens have the run's advantages and weights for all: what differs is the objective, its",
        'regularisers and, where a method has its own, the rule for tails.',
    ]
    for name, row in result['objectives'].items():
        if others := [other for other in row['same'] if other != 'run']:
            lines.append(f'{", ".join(others)}: the same as {name} in this')
    for name, row in result['objectives'].items():
        if token := row['first_broken']:
            lines.append(
                '{0}: NOT FINITE at {1} tokens, first at {text!r} after {after!r}: log π̃ {log_prob}, log π_old '
                '{old_log_prob}, advantage {advantage}, loss {loss}, gradient {gradient}'.format(
                    name, row['broken_tokens'], **token
                )
            )
        elif not row['finite']:
            lines.append(f"{name}: NOT FINITE, at no token: it is the model's derivative or the sum that is not")
    return '\n'.join(lines)


def held_tokens(result: dict, width: int) -> list[str]:
    """The share of tokens that each objective constrains, by sign of the advantage and probability under π_old."""
    rows = result['objectives']
    first = rows[next(iter(rows))]['held']
    lines = ['constrained tokens, in % of those with this sign of the advantage and probability p under π_old']
    lines.append(' ' * width + ''.join(f'{sign:>{10 * len(first) // 2}}' for sign in ('A > 0', 'A < 0')))
    lines.append('p up to'.ljust(width) + _cells(name.split('≤ ')[1] for name in first))
    lines.append('tokens'.ljust(width) + _cells(cell['tokens'] for cell in first.values()))
    for i, (name, row) in enumerate(rows.items()):
        shares = ['–' if cell['share'] is None else f'{100 * cell["share"]:.1f}' for cell in row['held'].values()]
        lines.append(f'{i + 1:2} {_starred(name, result):{width - 3}}' + _cells(shares))
    return lines


def token_gradients(result: dict, width: int) -> list[str]:
    """What each objective leaves of the gradient of the tokens that the run's constrains, outward and back."""
    rows = result['objectives']
    lines = [
        "tokens that the run's objective constrains: their gradients by logits over the plain ones, 10 / 50 / 90 %",
        'quantiles. Kept: of the part with the advantage; pull: of the rest, such as a regression; silenced: kept less '
        f'than {SILENCED:.0%};',
        'returns: the share at which a step along both lowers KL(π̃ ‖ π_old)',
    ]
    for group in ('outward', 'back'):
        count = rows[next(iter(rows))]['outside'][group]['tokens']
        lines += ['', f'{group}, {count} tokens'.ljust(width) + _cells(('kept', 'pull', 'silenced', 'returns'), 20)]
        for i, name in enumerate(rows if count else ()):
            found, values = rows[name]['outside'][group], ['–'] * 4
            if found['tokens']:
                values = [' / '.join(f'{x:.2f}' for x in found[key]) for key in ('kept', 'pull')]
                values += [f'{found[key]:.0%}' for key in ('silenced', 'returns')]
            lines.append(f'{i + 1:2} {_starred(name, result):{width - 3}}' + _cells(values, 20))
    return lines


def _cells(values: Iterable, size: int = 10) -> str:
    return ''.join(f'{value:>{size}}' for value in values)


def _difference(after: float | None, before: float | None) -> float | None:
    return None if None in (after, before) else after - before


def _starred(name: str, result: dict) -> str:
    return f'{name} *' if name == result['run_objective'] else name


def draw(result: dict) -> Figure:
    """Cosines of all pairs of gradients, affected tokens, what is kept of their gradients, KL after an equal step."""
    names = list(result['objectives'])
    labels = [_starred(name, result) for name in names]
    rows = result['objectives'].values()
    number = lambda value: np.nan if value is None else value
    cosines = np.array([[number(result['cosines'][one][other]) for other in names] for one in names])
    height = 2 + 0.4 * len(names)
    figure = Figure(figsize=(3.2 * height + 3, height), layout='constrained')
    axes = figure.subplots(1, 4, width_ratios=(1.3, 0.8, 0.8, 0.8))
    image = axes[0].imshow(cosines, vmin=-1, vmax=1, cmap='RdBu')
    axes[0].set(title='cosines of gradients', xticks=range(len(names)), yticks=range(len(names)), yticklabels=labels)
    axes[0].set_xticklabels(labels, rotation=45, ha='right', rotation_mode='anchor')
    for (i, j), value in np.ndenumerate(cosines):
        colour = 'white' if abs(value) > 0.6 else 'black'
        text = '–' if np.isnan(value) else f'{value:.2f}'
        axes[0].text(j, i, text, ha='center', va='center', fontsize=7, color=colour)
    figure.colorbar(image, ax=axes[0], shrink=0.7)
    places = np.arange(len(names))
    for offset, name, label in [
        (-0.2, 'affected_share', 'projected or clipped'),
        (0.2, 'silenced_share', f'less than {SILENCED:.0%} of the gradient kept'),
    ]:
        axes[1].barh(places + offset, [row[name] for row in rows], 0.4, label=label)
    axes[1].set(title='share of tokens')
    for offset, colour, group, label in [(-0.15, 'C0', 'outward', 'leads out'), (0.15, 'C1', 'back', 'leads back')]:
        kept = np.array([row['outside'][group].get('kept', [np.nan] * 3) for row in rows])
        axes[2].hlines(places + offset, kept[:, 0], kept[:, 2], color=colour)
        axes[2].plot(kept[:, 1], places + offset, 'o', color=colour, label=label)
    axes[2].set(
        title="kept of the gradient at tokens\nthat the run's objective constrains", xlabel='10, 50, 90 % of them'
    )
    for colour, marker, name in zip(('C0', 'C1', 'C3'), 'oD>', ('mean', 'p99', 'max'), strict=True):
        values = [number(row[f'kl_{name}_after_equal_step']) for row in rows]
        axes[3].plot(values, places, marker, color=colour, label=name, alpha=0.7)
        if value := result['before'][f'kl_{name}']:  # a logarithmic axis has no zero
            axes[3].axvline(value, color=colour, linewidth=1, linestyle=':')
    axes[3].set(title='KL to π_old after an equal step', xlabel='nats per token; dotted: before', xscale='log')
    axes[3].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[3].xaxis.set_major_formatter('{x:g}')
    axes[3].xaxis.set_minor_formatter(NullFormatter())  # its labels would lie over each other
    for axis in axes[1:]:
        axis.set(yticks=places, yticklabels=[], ylim=(len(names) - 0.5, -0.5))  # in the order of the heat map
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure
