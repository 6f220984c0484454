"""A run that is stopped or killed in the middle of a rollout ends at once and loses nothing."""

import json
import os
import re
import subprocess
import sys

import pytest

from .runs import REPOSITORY


@pytest.mark.slow
def test_signals_in_the_middle_of_a_step(tmp_path):
    """Guards a signal that waits for half an hour of sampling or for slow grades, a state that an update has used up, a
    rollout in flight that is learnt from twice or lost; without and with overlap, on one mesh and killed on two. And
    two processes with two meshes that wait for each other forever, or learn what one does not. The command has more.
    """
    command = [sys.executable, '-m', 'tests.faults.interrupt', '--folder', str(tmp_path / 'runs')]
    command += ['--cases', 'rollout', 'overlap', 'split, killed', 'two processes, split']
    flags = re.sub('--xla_force_host_platform_device_count=[0-9]+', '', os.environ['XLA_FLAGS'])  # it sets the number
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(case['seconds'] < 15 for case in found.values()), 'half a minute was left to wait for'
    assert len(found) == 4
