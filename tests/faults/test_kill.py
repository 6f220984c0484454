"""A run that is killed at any moment loses nothing."""

import json
import os
import subprocess
import sys

import pytest

from .runs import REPOSITORY


@pytest.mark.slow
def test_kill_at_random_moments_changes_nothing(tmp_path):
    """Guards against half a checkpoint that is taken for a whole one, a start that goes on from an older one or from
    nothing, lines of numbers that come twice, and workers that outlive their run. Twenty kills: `python -m
    tests.faults.kill`; here one of each kind, with one device.
    """
    command = [sys.executable, '-m', 'tests.faults.kill', '--times', '3', '--folder', str(tmp_path / 'runs')]
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['kills'] == 3 and set(result['moments'].values()) == {1}
