"""Does a long run stay as it began?

    python -m tests.faults.soak [--steps 2000] [--checkpoint-every 5] [--folder DIR]

Trains a tiny random model, with evaluation, tables and checkpoints. The last line is one of JSON: host memory (RSS)
after a tenth of the steps and at the end, its growth per step by a straight line through the second half, programs that
were compiled after a tenth of the steps, and by the same two steps threads, open files, children, and what lies in the
run's folder; and the most that arrays on the device took up in the first and in the second half.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from experiments.plumbing.gin_files import Config
from experiments.plumbing.names import SETTINGS as KINDS
from experiments.train import train
from tests.tiny import save_qwen3
from troll_jax.data.tasks.arithmetic import CHARACTERS
from troll_jax.data.tokenizer import character_tokenizer

SETTINGS = [
    'Arithmetic.operands = 2',
    'Arithmetic.train_size = 60',
    'Arithmetic.test_size = 16',
    'Experiment.max_prompt_length = 4',
    'Experiment.max_response_length = 3',
    'Sampling.prompts_per_step = 8',
    'Sampling.samples_per_prompt = 4',
    'Method.minibatch_prompts = 4',
    'Compute.head_chunk = 40',
    'Sampling.support_size = 8',
    'Run.evaluate_every = 5',
    "Method.rewards = [('task', 1.0, @task_reward), ('length', 1.0, @soft_overlong)]",  # so that there is a gradient
    'soft_overlong.share = 1.0',
    'Run.table_every = 5',
    'Run.checkpoint_every = 5',
]


def write_model(folder: Path, **sizes) -> None:
    """A policy that is far from certain: its samples differ, and so do their rewards."""
    save_qwen3(folder, character_tokenizer(CHARACTERS), initializer_range=0.5, **sizes)


def sample(run_dir: Path, compiled: list) -> dict[str, int]:
    """Memory, files and processes of this process and its run now."""
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    children = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
    files = [path for path in run_dir.rglob('*') if path.is_file()]
    checkpoints = run_dir / 'checkpoints'
    size = lambda folder: sum(path.stat().st_size for path in files if folder in path.parents)
    return {
        'arrays_mb': sum(array.nbytes for array in jax.live_arrays()) / 2**20,
        'rss_mb': int(status['VmRSS'].split()[0]) / 1024,
        'compiled': len(compiled),
        'threads': int(status['Threads']),
        'open_files': len(os.listdir('/proc/self/fd')),
        'children': len(children),
        'files': sum(checkpoints not in path.parents for path in files),
        'checkpoints': len(os.listdir(checkpoints)) if checkpoints.exists() else 0,
        'checkpoints_mb': size(checkpoints) / 2**20,
        'metrics_mb': (run_dir / 'metrics.jsonl').stat().st_size / 2**20,
    }


def watch(run_dir: Path, compiled: list, done: threading.Event, samples: dict[int, dict]) -> None:
    """Takes a sample now and then, under the number of steps so far."""
    path = run_dir / 'metrics.jsonl'
    while not done.wait(1.0):
        try:
            samples[path.read_bytes().count(b'\n')] = sample(run_dir, compiled)
        except FileNotFoundError:  # the run has not begun, or a checkpoint is just being removed
            continue


def summarise(samples: dict[int, dict], steps: int) -> dict:
    """Raises a ValueError if there are too few samples to say anything."""
    kept = sorted(step for step in samples if step > steps / 10)
    half = [step for step in kept if step > steps / 2]
    if len(half) < 5:
        raise ValueError(f'{steps} steps were over too soon to be watched; raise --steps')
    first, last = samples[kept[0]], samples[kept[-1]]
    rss = [samples[step]['rss_mb'] for step in half]
    most = lambda name, steps: round(max(samples[step][name] for step in steps), 3)
    return {
        'steps': steps,
        'rss_mb': [round(first['rss_mb']), round(last['rss_mb'])],
        'rss_kb_per_step': round(1024 * float(np.polyfit(half, rss, 1)[0]), 2),
        'most_arrays_mb': [most('arrays_mb', set(kept) - set(half)), most('arrays_mb', half)],
        'compiled_after_warm_up': last['compiled'] - first['compiled'],
        **{name: [first[name], last[name]] for name in ('threads', 'open_files', 'children', 'files')},
        'most_checkpoints': most('checkpoints', kept),
        'most_checkpoints_mb': most('checkpoints_mb', kept),
        'metrics_kb_per_step': round(1024 * (last['metrics_mb'] - first['metrics_mb']) / (kept[-1] - kept[0]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=2000)
    parser.add_argument('--checkpoint-every', type=int, default=5)
    parser.add_argument('--folder', type=Path, help='to write to, which must not exist; a temporary one by default')
    arguments = parser.parse_args()
    compiled, samples, done = [], {}, threading.Event()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / 'soak'
        folder.mkdir(parents=True)
        write_model(folder / 'model')
        run_dir = folder / 'run'
        names = [f'Experiment.model = {str(folder / "model")!r}', f'Run.folder = {str(run_dir)!r}']
        names += [f'Run.steps = {arguments.steps}', f'Run.checkpoint_every = {arguments.checkpoint_every}']
        config = Config(['quickstart', 'troll'], [*SETTINGS, *names])
        watcher = threading.Thread(target=watch, args=(run_dir, compiled, done, samples))
        watcher.start()
        begin = time.monotonic()
        try:
            train(*map(config.build, KINDS))
        finally:
            done.set()
            watcher.join()
        seconds = time.monotonic() - begin
    for step in sorted(samples)[:: max(1, len(samples) // 10)]:
        print(step, json.dumps({name: round(value, 2) for name, value in samples[step].items()}))
    print(json.dumps(summarise(samples, arguments.steps) | {'seconds': round(seconds)}))


if __name__ == '__main__':
    main()
