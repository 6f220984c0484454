"""Measures one GPU or TPU, in minutes: its ceilings, exactness, decoding, the update, its parts, a whole step.

    python -m experiments.benchmarks.device --out results [--minutes 15] [--only ceilings decode …] [--profile]

Needs neither a network nor a model nor data: weights are random. The parts, in this order:

- ceilings: bandwidth of a copy (read and written) and rate of a bfloat16 product of random numbers;
- numerics: projection, head and one gradient in float32 against the same on this machine's CPU (the projection in
  float64); and the KL between sampler and trainer in bfloat16 and float32, in nats per token;
- decode: Qwen3-0.6B's shape with GSM8K's lengths and 64 to 512 slots, against reading weights and cache once a step;
- update: the same shape with rows of 2,560 packed tokens: TROLL, Clip, and TROLL with XLA's attention; rates, and peak
  memory as measured and as planned for the same program;
- attention: one layer of the same shape, by each kernel: time and error, cuDNN's also with offsets instead of a mask;
- head: loss and gradient of 8,192 tokens without any layer: TROLL, Clip, and Clip with plain logits;
- projection: alone, against reading and writing its distributions once;
- step: prompts to new parameters, and where its seconds go.

Each part is a process of its own with its share of the time that is left, so that one that fails or hangs stops no
other. Where memory is short a part takes a smaller size, and says which. On a CPU all sizes are tiny: that shows that
it works, and measures nothing. `--out` gets results.json and each part's log, and with `--profile` traces for Perfetto.
The last line of the output is one line of JSON; the status is 1 if a part failed or a number was wrong.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.plumbing.command import run_command

# Part, see `device_parts.py` → its share of the time that it and the parts behind it have.
# On an H200 with nothing compiled yet a process needs 12 s before it measures, and one size of decode 80 s.
SHARES = {
    'ceilings': 1.0,
    'numerics': 3.0,
    'decode': 5.0,
    'update': 3.0,
    'attention': 1.0,
    'head': 2.0,
    'projection': 1.0,
    'step': 3.0,
}


def run_parts(names: Sequence[str], out: Path, seconds: float, profile: bool) -> Iterator[dict[str, Any]]:
    """Runs parts in processes of their own and yields their measurements, and a row for each that failed."""
    end = time.monotonic() + seconds
    for i, name in enumerate(names):
        shares = [SHARES[left] for left in names[i:]]
        limit = (end - time.monotonic()) * shares[0] / sum(shares)
        if limit < 1:
            yield {'part': name, 'what': name, 'failed': 'no time was left; raise --minutes, or choose parts by --only'}
            continue
        found, log = out / f'{name}.jsonl', out / f'{name}.log'
        found.unlink(missing_ok=True)
        command = [sys.executable, '-m', 'experiments.benchmarks.device_parts', name, '--out', str(out)]
        failed, begin = None, time.monotonic()
        with log.open('w') as file:
            try:
                result = subprocess.run(
                    command + ['--profile'] * profile,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                )
                if result.returncode:
                    failed = f'status {result.returncode}: {last_error(log)} (all of it in {log.name})'
            except subprocess.TimeoutExpired:
                failed = f'ended after {limit:.0f} s; raise --minutes, or choose parts by --only'
        yield from map(json.loads, found.read_text().splitlines() if found.exists() else ())
        if failed:
            yield {'part': name, 'what': name, 'failed': failed}
        print(f'{name}: {time.monotonic() - begin:.0f} s{", " + failed if failed else ""}', file=sys.stderr, flush=True)


def last_error(log: Path) -> str:
    """The line of a log that most likely says why a process ended."""
    lines = [line.strip() for line in log.read_text(errors='replace').splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r'[\w.]*(Error|Exception)\b', line)]
    return ([*lines[-1:], *errors[-1:]] or ['nothing was printed'])[-1][:500]


def describe_machine(seconds: float) -> dict[str, Any]:
    """The device, its clocks and versions. By a process of its own: one that has touched a device keeps it from others.

    Raises:
      ValueError: JAX finds no device, or not in this time.
    """
    code = 'import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))'
    try:
        result = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f'JAX found no device in {seconds:.0f} s; does another process hold it?') from None
    if result.returncode:
        raise ValueError('JAX finds no device, and says above why; install its build for this one, e.g. "jax[cuda13]"')
    kind, device, count = json.loads(result.stdout.splitlines()[-1])
    if kind == 'cpu':
        print('No GPU or TPU: all sizes are tiny, and figures mean nothing.', file=sys.stderr)
    packages = {name: version(name) for name in ('jax', 'jaxlib', 'flax', 'optax')}
    machine = {'device': device, 'platform': kind, 'devices': count, 'cores': os.cpu_count()}
    return machine | {'date': time.strftime('%Y-%m-%d'), 'python': platform.python_version()} | packages


def print_table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Markdown, as docs/accelerators.md keeps it."""
    print(', '.join(f'{name} {value}' for name, value in machine.items()), '\n')
    print('| what | figures |\n| --- | --- |')
    for row in rows:
        figures = {name: x for name, x in row.items() if name not in ('part', 'what')}
        number = lambda x: f'{x:.4g}' if isinstance(x, float) else str(x)
        print(f'| {row["what"]} |', ', '.join(f'{name} {number(x)}' for name, x in figures.items()), '|')


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='a folder for results.json, logs and traces')
    parser.add_argument('--minutes', type=float, default=15.0, help='that all parts together may take')
    parser.add_argument('--only', nargs='+', default=[], help=f'some of {", ".join(SHARES)}')
    parser.add_argument('--profile', action='store_true', help='writes a trace of one call of decode, update and step')
    arguments = parser.parse_args()
    chosen = ','.join(arguments.only).split(',') if arguments.only else list(SHARES)
    if unknown := set(chosen) - set(SHARES):
        parser.error(f'no part {", ".join(sorted(unknown))}; expected some of {", ".join(SHARES)}')
    arguments.out.mkdir(parents=True, exist_ok=True)
    if 'XLA_CLIENT_MEM_FRACTION' not in os.environ:  # another name for the same
        os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')  # of a GPU, as in docs/multi_host.md
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.abspath('.jax_cache'))  # for a second try
    platforms = os.environ.get('JAX_PLATFORMS')
    if platforms and 'cpu' not in platforms.split(','):
        os.environ['JAX_PLATFORMS'] = f'{platforms},cpu'  # on which the references are made
    result = {'machine': describe_machine(60 * arguments.minutes), 'rows': []}
    left = 60 * arguments.minutes - (time.monotonic() - begin)
    for row in run_parts([name for name in SHARES if name in chosen], arguments.out, left, arguments.profile):
        result['rows'].append(row)
        (arguments.out / 'results.json').write_text(json.dumps(result, indent=1))
    print_table(**result)
    print(json.dumps(result))
    sys.exit(any('failed' in row or not row.get('passed', row.get('finite', True)) for row in result['rows']))


if __name__ == '__main__':
    run_command(main)
