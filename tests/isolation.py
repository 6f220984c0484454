"""Shared by the tests of sandboxes: bubblewrap works on this machine, or it does not."""

import os
import sys

import pytest

from troll_jax.rewards.sandbox import Bubblewrap
from troll_jax.rewards.worker import CannotGrade

UNTESTED = 'cannot be tested here'  # `conftest.py` looks for these words


def require_bubblewrap() -> None:
    """Skips where programs cannot be isolated; fails there if `TROLL_TEST_EVERYTHING` is set, as in CI."""
    give_up = pytest.fail if os.environ.get('TROLL_TEST_EVERYTHING') else pytest.skip
    if sys.platform != 'linux':
        give_up(f'the isolation of programs {UNTESTED}: bubblewrap is for Linux')
    try:
        Bubblewrap().check()
    except CannotGrade as error:
        give_up(f'the isolation of programs {UNTESTED}: {error}')
