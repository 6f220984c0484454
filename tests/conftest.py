"""Eight CPU devices for every test, so that what is sharded is tested as it is used."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# These tests spend their time on compilation: cheap code is as good here, and a cache serves programs that recur.
flags = ['--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0']
if tuple(map(int, version('jaxlib').split('.')[:3])) < (0, 11, 1):
    flags.append('--xla_cpu_use_fusion_emitters=false')  # compiles in two thirds of the time; later XLA has no choice
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *flags])
# XLA's threads. By default there are as many as devices, if these are more than cores; then a device that is in two
# collectives at a time takes the thread of another, and all wait for ever.
os.environ['NPROC'] = '32'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(Path(__file__).parent.parent / '.jax_cache')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'

import jax  # noqa: E402
import pytest  # noqa: E402
from documents import YOUR_OWN, blocks  # noqa: E402
from isolation import UNTESTED  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tracing makes many objects that live on. With the default of 700 the collector takes a sixth of the time and more.
gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope='session')
def model(tmp_path_factory) -> str:
    """A model of the quickstart's kind, after two steps of its warm start."""
    from experiments.warm_start import warm_start
    from troll_jax.data.tasks.arithmetic import Arithmetic

    folder = str(tmp_path_factory.mktemp('model'))
    task = Arithmetic(operands=2, train_size=60, test_size=16)
    sizes = {'width': 16, 'layers': 2, 'heads': 2, 'kv_heads': 1, 'head_dim': 8, 'mlp_width': 24, 'batch': 8}
    warm_start(folder, task, **sizes, accuracy=0.0, mixed_steps=2)
    return folder


@pytest.fixture(scope='module', autouse=True)
def room_for_programs() -> Iterator[None]:
    """Linux lets a process map 65,530 parts of memory, of which each program takes some: beyond, XLA crashes."""
    yield
    maps = Path('/proc/self/maps')
    if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def own_files(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the Python files of docs/your_own.md, whose modules are forgotten afterwards."""
    monkeypatch.setattr(sys, 'path', [*sys.path])
    names = [code.partition('\n')[0].removeprefix('# ') for code in blocks(YOUR_OWN, 'python')]
    for name, code in zip(names, blocks(YOUR_OWN, 'python'), strict=True):
        (tmp_path / name).write_text(code)
    yield tmp_path
    for name in names:
        sys.modules.pop(name.removesuffix('.py'), None)


def pytest_terminal_summary(terminalreporter):
    """One line about tests that this machine cannot run, which must not look green, and how to get them."""
    reasons = [
        str(report.longrepr[2]).removeprefix('Skipped: ') for report in terminalreporter.stats.get('skipped', [])
    ]
    if untested := [' '.join(reason.split()) for reason in reasons if UNTESTED in reason]:
        kinds = '; '.join({reason.split(':')[0]: reason for reason in untested}.values())
        terminalreporter.write_line(f'NOT TESTED (tests that were skipped: {len(untested)}): {kinds}', yellow=True)
