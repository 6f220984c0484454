"""What a run says of itself: few lines, the right numbers, and commands that exist."""

import importlib
import logging
import re

from experiments.plumbing.progress import Progress, tell_where_to_look
from troll_jax.settings import Run


def test_without_a_terminal_there_are_a_few_lines(caplog):
    """Guards a log with a line for each of a million steps, one without the last, and a resumed run's numbers."""
    row = {'reward/mean': 0.25, 'update/kl_mean': 0.001, 'update/constrained_share': 0.05}
    with caplog.at_level(logging.INFO):
        progress = Progress(3, 9)
        for step in progress:
            progress.show(step, row | {'update/tokens_per_second': 1234.0 * step})
    first, last = caplog.messages
    assert re.fullmatch(
        r'step 4 of 9: reward 0.250, KL 0.001, constrained 5.0%, tokens/s 4,936; 0\d:\d\d left', first
    ), first
    assert last.startswith('step 9 of 9: ') and last.endswith('; 00:00 left')


def test_the_commands_at_the_end_exist(caplog):
    """Guards a command that was renamed, and one for files that the run has not."""
    with caplog.at_level(logging.INFO):
        tell_where_to_look(Run(folder='runs/a', steps=1))
        tell_where_to_look(Run(folder='runs/a', steps=1, save_samples_every=0, trackers=()))
    whole, bare = caplog.messages
    commands = re.findall(r'troll (\w+) runs/a', whole)
    assert commands == ['evaluate', 'show', 'plot']
    assert all(callable(importlib.import_module(f'experiments.{command}').main) for command in commands)
    assert 'tensorboard --logdir runs/a' in whole and 'show' not in bare and 'tensorboard' not in bare
