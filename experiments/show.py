"""Shows responses of runs side by side, with rewards and constrained tokens, in a terminal or as one HTML page.

    troll show RUN                          # the first and the latest step that were saved
    troll show RUN --step 10 200            # two steps of a run
    troll show RUN RUN2 --html samples.html # two runs: curves, responses to the same prompts

The run may still go on. `Run.save_samples_every` says which steps are saved.
"""

import argparse
import io
import re
from collections.abc import Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from experiments.plot import draw_runs
from experiments.plumbing.command import run_command
from experiments.plumbing.progress import SHOWN
from experiments.plumbing.samples import caption, in_brackets, split
from troll_jax.metrics import read_metrics

# What a terminal would obey instead of showing it, of the same length.
_VISIBLE = {i: 0x2400 + i for i in range(32) if i != 10} | {i: 0xFFFD for i in range(127, 160)}


class Side(NamedTuple):
    """A column: some prompts of a step of a run."""

    run: str
    step: int
    prompts: list[dict]  # as `samples.jsonl` has them

    @property
    def title(self) -> str:
        return f'{self.run}, step {self.step}'


def read_sides(runs: Sequence[str], steps: Sequence[int] | None = None) -> list[Side]:
    """The columns of one or two runs.

    Args:
      runs: one or two folders.
      steps: one step, or two of one run, or one for each of two runs. None: of one run the first and the latest that
        are saved, of two runs the latest that both have, or if there is none the latest of each.

    Raises:
      ValueError: no samples, or none of a step.
    """
    found = []
    for run in runs:
        path = Path(run) / 'samples.jsonl'
        saved = {row['step']: row['prompts'] for row in (read_metrics(path) if path.exists() else [])}
        if not saved:
            raise ValueError(f'{path} has no samples; expected those of a run with Run.save_samples_every above 0')
        found.append(saved)
    if not steps:
        of_all = set.intersection(*map(set, found))
        if len(runs) == 1:
            steps = sorted({min(of_all), max(of_all)})
        else:
            steps = [max(of_all or saved) for saved in found]
    columns = max(len(runs), len(steps))
    sides = []
    for i in range(columns):
        run, saved, step = runs[min(i, len(runs) - 1)], found[min(i, len(runs) - 1)], steps[min(i, len(steps) - 1)]
        if step not in saved:
            raise ValueError(f'{run} has no samples of step {step}; expected one of {", ".join(map(str, saved))}')
        sides.append(Side(run, step, saved[step]))
    return sides


def rows_of(sides: Sequence[Side], count: int | None = None) -> list[tuple[dict | None, ...]]:
    """Rows of prompts, one of each side: first those that all have, then the others as they come; at most `count`."""
    by_text = [{prompt['prompt']: prompt for prompt in side.prompts} for side in sides]
    common = [text for text in by_text[0] if all(text in prompts for prompts in by_text)]
    rows = [tuple(prompts[text] for prompts in by_text) for text in common]
    left = [[prompt for text, prompt in prompts.items() if text not in common] for prompts in by_text]
    return [*rows, *zip_longest(*left)][:count]


def print_samples(sides: Sequence[Side], rows: Sequence[tuple], console: Console) -> None:
    """Prints samples. Constrained tokens have a colour, or without colours are in ⟦brackets⟧."""
    plain = console.no_color or not console.color_system

    def body(response: dict) -> Text:
        text, spans = response['text'].translate(_VISIBLE), response['constrained']
        if plain:
            return Text(in_brackets(text, spans))
        return Text.assemble(*((part, 'black on yellow' if marked else '') for part, marked in split(text, spans)))

    def cell(prompt: dict | None, at: int) -> Group | str:
        if prompt is None or at >= len(prompt['responses']):
            return ''
        response = prompt['responses'][at]
        colour = 'green' if response['advantage'] > 0 else 'red' if response['advantage'] < 0 else 'dim'
        return Group(Text(caption(response).translate(_VISIBLE), colour), body(response))

    def asked(prompt: dict | None) -> Text:
        answer = f'\nanswer {prompt["answer"]}' if prompt and prompt['answer'] else ''
        return Text((prompt['prompt'].strip() + answer).translate(_VISIBLE) if prompt else '', 'bold')

    for row in rows:
        table = Table(expand=True, show_lines=True)
        for side, prompt in zip(sides, row, strict=True):
            update = '' if prompt is None else f', update {prompt["update"]}'
            table.add_column(Text((side.title + update).translate(_VISIBLE)), ratio=1, overflow='fold')
        table.add_row(*(asked(prompt) for prompt in row))
        for at in range(max(len(prompt['responses']) for prompt in row if prompt)):
            table.add_row(*(cell(prompt, at) for prompt in row))
        console.print(table)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #667085; --page: #f6f7f9; --card: #fff; --line: #dfe3e8;
  --mark: #ffd166; --good: #12805c; --bad: #c2413b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --dim: #98a2b3; --page: #12151b; --card: #1b2028;
  --line: #323a46; --mark: #7a5a00; --good: #4cc38a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; } h2 { font-size: .95rem; margin: 0 0 .5rem; }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
small, th, .dim { color: var(--dim); font-weight: normal; }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; }
section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem;
  margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; height: auto; fill: currentColor; }
.prompt { border-left: 3px solid var(--dim); padding-left: .8rem; margin-bottom: .8rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem; }
article { border-left: 3px solid var(--line); padding-left: .8rem; margin-bottom: .9rem; }
.good { border-color: var(--good); } .bad { border-color: var(--bad); }
"""


def page(sides: Sequence[Side], rows: Sequence[tuple], metrics: dict[str, list[dict]]) -> str:
    """One HTML page that needs nothing else: last numbers, curves, samples.

    Args:
      sides: columns.
      rows: their prompts, see `rows_of`.
      metrics: name → rows of `metrics.jsonl` of each run.
    """
    runs = ' and '.join(dict.fromkeys(side.run for side in sides))
    parts = [f'<h1>{escape(runs)}</h1>', _numbers(metrics), f'<figure>{_curves(metrics)}</figure>']
    parts.append(
        '<p class="dim">A <mark>marked</mark> token was constrained (projected or clipped) by the one update of its '
        'step that its response is in. Without a lag the first update of a step is at the policy that sampled, where '
        'next to nothing is. Lines at the left: green, an advantage above zero; red, below.</p>'
    )
    for row in rows:
        parts.append(f'<section class="sides">{"".join(map(_column, sides, row))}</section>')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{escape(runs)}</title><style>{_STYLE}</style><body>{"".join(parts)}</body></html>\n'
    )


def _column(side: Side, prompt: dict | None) -> str:
    if prompt is None:
        return '<div></div>'
    responses = []
    for response in prompt['responses']:
        advantage = response['advantage']
        kind = 'good' if advantage > 0 else 'bad' if advantage < 0 else ''
        text = ''.join(
            f'<mark>{escape(part)}</mark>' if marked else escape(part)
            for part, marked in split(response['text'], response['constrained'])
        )
        responses.append(
            f'<article class="{kind}"><small>{escape(caption(response))}</small><pre>{text}</pre></article>'
        )
    answer = f'<small>answer {escape(prompt["answer"])}</small>' if prompt['answer'] else ''
    return (
        f'<div><h2>{escape(side.title)} <small>update {prompt["update"]:d}</small></h2><div class="prompt">{answer}'
        f'<pre>{escape(prompt["prompt"].strip())}</pre></div>{"".join(responses)}</div>'
    )


def _numbers(metrics: dict[str, list[dict]]) -> str:
    """A table of each run's latest numbers."""
    latest = {run: {key: x for row in rows for key, x in row.items() if x is not None} for run, rows in metrics.items()}
    shown = {name: column for name, column in SHOWN.items() if any(column[0] in row for row in latest.values())}
    head = ''.join(f'<th>{name}' for name in ('run', 'step', *shown))
    body = ''
    for run, row in latest.items():
        cells = (f'{row[key]:{format}}' if key in row else '' for key, format in shown.values())
        body += f'<tr><td>{escape(run)}<td>{row.get("step", 0):d}' + ''.join(f'<td>{cell}' for cell in cells)
    return f'<table><tr>{head}{body}</table>'


def _curves(metrics: dict[str, list[dict]]) -> str:
    """The curves as SVG, in the colour of the page's text."""
    file = io.StringIO()
    draw_runs({'': metrics}).savefig(file, format='svg', transparent=True)
    svg = file.getvalue()
    return re.sub('#000000', 'currentColor', svg[svg.index('<svg') :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run; at most two')
    parser.add_argument('--step', type=int, nargs='+', help='one step, or one for each of two columns')
    parser.add_argument('--prompts', type=int, help='prompts to show; all that were saved by default')
    parser.add_argument('--html', help='file to write a page to, instead of printing')
    arguments = parser.parse_intermixed_args()
    for what, given in (('runs', arguments.runs), ('steps', arguments.step or [])):
        if len(given) > 2:
            raise ValueError(f'got {len(given)} {what}; expected at most two, which stand side by side')
    if arguments.prompts is not None and arguments.prompts < 1:
        raise ValueError(f'--prompts must be at least 1; got {arguments.prompts}')
    sides = read_sides(arguments.runs, arguments.step)
    rows = rows_of(sides, arguments.prompts)
    if arguments.html is None:
        print_samples(sides, rows, Console())
        return
    metrics = {run: read_metrics(Path(run) / 'metrics.jsonl') for run in arguments.runs}
    Path(arguments.html).write_text(page(sides, rows, metrics), encoding='utf-8')
    print(f'wrote {arguments.html}')


if __name__ == '__main__':
    run_command(main)
