"""Tries a short list of memory settings of an experiment on devices that are not there, and keeps the fastest that fit.

Programs are compiled as `plan` does. For each size of the mesh's axis `tensor`, updates are tried by bisection: the
list goes from the fastest settings to those that take the least memory. Then decode slots, most first. A larger
`tensor` is tried for as long as it makes a step faster.
"""

import copy
import functools
import re
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.plumbing.gin_files import Config
from experiments.studies.plan import PROGRAMS, plan
from experiments.studies.program_cost import describe
from troll_jax.experiment import Experiment
from troll_jax.settings import Method, Sampling

TENSOR = (1, 2, 4, 8)
# Of an update: rematerialisation, rows of a micro-batch on each device, head chunk, moments on the host or not.
UPDATES = (
    (None, 4, 2048, False),
    ('dots', 4, 2048, False),
    ('full', 4, 2048, False),
    ('full', 2, 2048, False),
    ('full', 1, 2048, False),
    ('full', 1, 512, False),
    ('full', 1, 512, True),
)
SLOTS = (512, 128, 32)  # for each shard of the batch
LEARNER, SAMPLER = PROGRAMS[:-2], PROGRAMS[-2:]
SHARE = 0.92  # of a device's memory that a run may take: what is left is the runtime's


class Found(NamedTuple):
    """Settings that fit, and what `plan` says of them."""

    topology: str
    bindings: dict[str, Any]  # fields of Compute
    rows: list[dict]
    step_s: float  # a step's bound, if every response has the maximum length


def search(config: Config, topology: str, report: Callable[[str], None] = print) -> Found | None:
    """The fastest settings of Compute that fit; None if none does.

    Args:
      config: experiment.
      topology: as in `describe`.
      report: told of every attempt.

    Raises:
      ValueError: as `plan` does.
    """
    _, devices = describe(topology)
    experiment, sampling, method = (config.build(kind) for kind in (Experiment, Sampling, Method))
    responses, length = sampling.prompts_per_step * sampling.samples_per_prompt, experiment.max_length
    updates = sampling.prompts_per_step // method.minibatch_prompts

    def attempt(settings: dict[str, Any], programs: tuple[str, ...]) -> list[dict] | None:
        bound = copy.copy(config)
        bound.bindings = config.bindings | {'Compute': config.bindings.get('Compute', {}) | settings}
        rows = plan(bound, topology, programs)
        needed, memory = (max(row[key] for row in rows) for key in ('needed_gb', 'memory_gb'))
        # XLA computes again what makes an update too large; the sampler's cache takes all that is left, and may.
        fit = needed <= SHARE * memory and not (programs == LEARNER and any(row['remat'] for row in rows))
        words = ', '.join(f'{name} = {value!r}' for name, value in settings.items())
        verdict = f'{needed:.1f} of {memory:.0f} GB' + ('' if fit else ', does not fit')
        report(f'{topology} {"/".join(row["program"] for row in rows)}: {words}: {verdict}')
        return rows if fit else None

    def with_tensor(tensor: int) -> Found | None:
        shards = len(devices) // tensor
        mesh = {'data': 1, 'fsdp': shards, 'context': 1, 'tensor': tensor, 'rollout_devices': None}
        rows_of_device = -(-responses // (updates * shards))
        candidates = []
        for remat, rows, head_chunk, offload in UPDATES:
            settings = {'remat': remat, 'micro_batch_tokens': min(rows, rows_of_device) * length}
            settings |= {'head_chunk': head_chunk, 'offload_optimizer': offload}
            candidates += [settings] if settings not in candidates else []
        update = functools.cache(lambda i: attempt(mesh | candidates[i], LEARNER))
        i = bisect_left(range(len(candidates)), True, key=lambda i: update(i) is not None)
        for slots in SLOTS if i < len(candidates) else ():
            bindings = mesh | candidates[i] | {'slots': slots * shards}
            if (sampler := attempt(bindings, SAMPLER)) is None:
                continue
            prefill, decode = sampler
            # The share of the slots that the cache feeds.
            busy = min(1, decode['cached_tokens'] / (decode['slots'] * length))
            step = updates * sum(row['bound_s'] for row in update(i))
            step += responses * experiment.max_response_length / (busy * decode['tokens_per_second'])
            step += sampling.prompts_per_step * experiment.max_prompt_length / prefill['tokens_per_second']
            return Found(topology, bindings, update(i) + sampler, step)
        return None

    best = None
    for tensor in [size for size in TENSOR if len(devices) % size == 0]:
        found = with_tensor(tensor)
        if best and not (found and found.step_s < best.step_s):
            break
        best = found
    if best is None:
        report(f'{topology}: nothing of the list fits')
    return best


def print_recipes(experiment: Experiment, found: list[Found]) -> None:
    """A row of settings and bounds for each topology."""
    columns = 'devices, model, tensor, remat, micro-batch, head chunk, moments, slots, update needs, update, '
    columns += 'one step'
    print('|', columns.replace(', ', ' | '), '|')
    print('|', ' | '.join(['---'] * (columns.count(',') + 1)), '|')
    for topology, bindings, rows, step in found:
        update = next(row for row in rows if row['program'] == 'update')
        print(
            f'| {topology} | {experiment.model.rpartition("/")[2]} | {bindings["tensor"]} | {bindings["remat"]} | '
            f'{bindings["micro_batch_tokens"]:,} | {bindings["head_chunk"]:,} | '
            f'{"host" if bindings["offload_optimizer"] else "device"} | {bindings["slots"]:,} | '
            f'{update["needed_gb"]:.1f} of {update["memory_gb"]:.0f} GB | {update["bound_s"]:.2g} s | '
            f'{step:,.0f} s |'
        )


def write_gin(folder: str, experiment: Experiment, found: Found) -> Path:
    """A gin file with the settings, named after the devices and the model; returns its path."""
    model = experiment.model.rpartition('/')[2]
    words = f'{found.topology}_{model}'.lower()
    path = Path(folder, re.sub(r'[^a-z0-9]', '_', words) + '.gin')
    lines = [
        f'# {model} on {found.topology}: memory settings for {experiment.max_prompt_length:,} + '
        f'{experiment.max_response_length:,} tokens or fewer, which `troll plan --search` found.',
        *(f'Compute.{name} = {value!r}' for name, value in found.bindings.items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')
    return path
