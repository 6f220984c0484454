"""What the tests of sandboxes share: whether bubblewrap works on this machine."""

import shutil
import sys

import pytest

from troll_jax.rewards.sandbox import Bubblewrap
from troll_jax.rewards.worker import CannotGrade


def require_bubblewrap() -> None:
    """Skips where the kernel refuses; fails where bubblewrap is only not installed, which must not look green."""
    if sys.platform != 'linux':
        pytest.skip('bubblewrap is for Linux')
    if shutil.which('bwrap') is None:
        pytest.fail('NOT INSTALLED: isolation of programs cannot be tested; run `apt install bubblewrap`')
    try:
        Bubblewrap().check()
    except CannotGrade as error:
        pytest.skip(f'ISOLATION OF PROGRAMS IS NOT TESTED ON THIS MACHINE: {error}')
