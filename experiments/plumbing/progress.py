"""What a run says of itself while it trains, and where everything lies at its end."""

import logging
import math
import time
from collections.abc import Iterator, Mapping

import jax
from tqdm import tqdm

from troll_jax.settings import Run

logger = logging.getLogger(__name__)

SECONDS = 10.0  # between two lines, where there is no terminal for a bar
# Name → metric and its format.
SHOWN = {
    'reward': ('reward/mean', '.3f'),
    'success': ('eval/success', '.3f'),
    'accuracy': ('update/accuracy', '.3f'),
    'KL': ('update/kl_mean', '.2g'),
    'constrained': ('update/constrained_share', '.1%'),
    'tokens/s': ('update/tokens_per_second', ',.0f'),
}


class Progress:
    """A bar in a terminal; elsewhere a line in the log every few seconds. Iterates over the steps to take.

    Args:
      first: steps that were taken before.
      total: the last step.
    """

    def __init__(self, first: int, total: int):
        is_first_process = jax.process_index() == 0
        # None: hidden if there is no terminal
        disable = None if is_first_process else True
        self._bar = tqdm(range(first + 1, total + 1), initial=first, total=total, unit='step', disable=disable)
        self._logs = is_first_process and self._bar.disable
        self._first, self._total, self._begin, self._latest = first, total, time.monotonic(), -math.inf

    def __iter__(self) -> Iterator[int]:
        return iter(self._bar)

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        found = {name: f'{row[key]:{format}}' for name, (key, format) in SHOWN.items() if key in row}
        self._bar.set_postfix(found)
        now = time.monotonic()
        if self._logs and (now >= self._latest + SECONDS or step == self._total):
            self._latest = now
            left = (self._total - step) * (now - self._begin) / (step - self._first)
            numbers = ', '.join(f'{name} {value}' for name, value in found.items())
            logger.info('step %d of %d: %s; %s left', step, self._total, numbers, tqdm.format_interval(left))


def tell_where_to_look(run: Run) -> None:
    """Logs where everything of a run lies, and the commands to look at it."""
    folder = run.folder
    commands = {
        f'evaluate {folder}': 'success on held-out problems',
        f'show {folder} --html samples.html': 'responses, curves and constrained tokens on one page',
        f'plot {folder} --output curves.png': 'curves',
    }
    if not run.save_samples_every:
        del commands[f'show {folder} --html samples.html']
    width = max(map(len, commands))
    lines = [f'  troll {command:{width}}  # {what}' for command, what in commands.items()]
    if 'tensorboard' in run.trackers:
        command = f'tensorboard --logdir {folder}'
        lines.append(f'  {command:{width + len("troll ")}}  # after `pip install tensorboard`')
    logger.info('\n'.join([f'{folder} has metrics.jsonl and all else of the run. To look at it:', *lines]))
