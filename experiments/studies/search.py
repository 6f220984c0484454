"""Tries a short list of memory settings of an experiment on devices that are not there, and keeps the fastest that fit.

Programs are compiled as `plan` does, of which most that do not fit are not compiled. For each size of the mesh's axis
`tensor`, decode slots are tried, most first, and then settings of an update, from the fastest to those that take the
least memory. A larger `tensor` is tried for as long as it makes a step faster.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.plumbing.gin_files import Config
from experiments.studies.plan import PROGRAMS, plan
from experiments.studies.program_cost import SHARE, describe
from troll_jax.experiment import Experiment
from troll_jax.models import decoder as decoders
from troll_jax.settings import Compute, Method, Sampling

TENSOR = (1, 2, 4, 8)
# Of an update: moments on the host or not, then rematerialisation, rows of a micro-batch on each device, head chunk.
UPDATES = {
    False: (
        ('dots', 4, 2048),
        ('attention', 4, 2048),
        ('attention', 2, 2048),
        ('attention', 1, 2048),
        ('full', 1, 2048),
        ('full', 1, 512),
    ),
    True: (('full', 1, 512),),
}
SLOTS = (512, 128, 32)  # for each shard of the batch
LEARNER, SAMPLER = PROGRAMS[:-2], PROGRAMS[-2:]


class Found(NamedTuple):
    """Settings that fit, and what `plan` says of them."""

    topology: str
    bindings: dict[str, Any]  # fields of Compute
    rows: list[dict]
    step_s: float  # a step's bound, if every response has the maximum length


def search(config: Config, topology: str, report: Callable[[str], None] = print) -> Found | None:
    """The fastest settings of Compute that fit; None if none does.

    Args:
      config: experiment; its `Compute.tensor` is the first that is tried.
      topology: as in `describe`.
      report: told of every attempt.

    Raises:
      ValueError: as `plan` does.
    """
    _, devices = describe(topology)
    experiment, sampling, method = (config.build(kind) for kind in (Experiment, Sampling, Method))
    compute = dataclasses.replace(config.build(Compute), devices=devices)
    responses, length = sampling.prompts_per_step * sampling.samples_per_prompt, experiment.max_length
    updates = sampling.prompts_per_step // method.minibatch_prompts

    def attempt(settings: dict[str, Any], programs: tuple[str, ...]) -> list[dict] | None:
        bound = copy.copy(config)
        bound.bindings = config.bindings | {'Compute': config.bindings.get('Compute', {}) | settings}
        rows = plan(bound, topology, programs, only_if_it_may_fit=True)
        needed, memory = (max(row[key] for row in rows) for key in ('needed_gb', 'memory_gb'))
        # XLA computes again what makes an update too large; the sampler's cache takes all that is left, and may.
        fit = all(row['fits'] for row in rows) and needed <= SHARE * memory
        fit = fit and not (programs == LEARNER and any(row['remat'] for row in rows))
        words = ', '.join(f'{name} = {value!r}' for name, value in settings.items())
        verdict = f'{needed:.1f} of {memory:.0f} GB' + ('' if fit else ', does not fit')
        report(f'{topology} {"/".join(row["program"] for row in rows)}: {words}: {verdict}')
        return rows if fit else None

    def with_tensor(tensor: int, best: float) -> Found | None:
        shards = len(devices) // tensor
        mesh = {'data': 1, 'fsdp': shards, 'context': 1, 'tensor': tensor, 'rollout_devices': None}
        rows_of_device = -(-responses // (updates * shards))
        split = dataclasses.replace(compute, **mesh)
        decoder = experiment.decoder_config(split, method.lora)
        try:
            decoders.abstract(decoder, split.mesh)
        except ValueError as error:
            report(f'{topology}: {error}')
            return None
        for offload, candidates in UPDATES.items():
            bindings = mesh | {'offload_optimizer': offload}
            tries = (bindings | {'slots': slots * shards} for slots in SLOTS)
            found = next(((one, rows) for one in tries if (rows := attempt(one, SAMPLER))), None)
            if found is None:
                continue
            bindings, sampler = found
            prefill, decode = sampler
            bindings['slots'] = decode['slots']  # no more than there are responses for
            # The share of the slots that the cache feeds.
            busy = min(1, decode['cached_tokens'] / (decode['slots'] * length))
            seconds = responses * experiment.max_response_length / (busy * decode['tokens_per_second'])
            seconds += sampling.prompts_per_step * experiment.max_prompt_length / prefill['tokens_per_second']
            if seconds >= best:
                return None
            tokens = lambda rows: min(rows, rows_of_device) * length
            names = 'remat', 'micro_batch_tokens', 'head_chunk'
            for values in dict.fromkeys((remat, tokens(rows), chunk) for remat, rows, chunk in candidates):
                settings = mesh | dict(zip(names, values, strict=True)) | bindings
                if rows := attempt(settings, LEARNER):
                    seconds += updates * sum(row['bound_s'] for row in rows)
                    return Found(topology, settings, rows + sampler, seconds)
        return None

    best, sizes = None, [size for size in TENSOR if len(devices) % size == 0]
    for tensor in [size for size in sizes if size >= compute.tensor] or sizes:
        found = with_tensor(tensor, best.step_s if best else math.inf)
        if best and not (found and found.step_s < best.step_s):
            break
        best = found
    if best is None:
        report(f'{topology}: nothing of the list fits')
    return best


COLUMNS = 'devices, model, tensor, remat, micro-batch, head chunk, moments, slots, update needs, update, one step'


def table(rows: list[str]) -> str:
    """The table of these rows, with its header."""
    return '\n'.join([f'| {COLUMNS.replace(", ", " | ")} |', '|' + ' --- |' * len(COLUMNS.split(', ')), *rows, ''])


def row_of(experiment: Experiment, topology: str, found: Found | None) -> str:
    """The table's row of what a search has found: settings and bounds."""
    start = f'| {topology} | {_model(experiment)} |'
    if found is None:
        return f'{start} nothing of the list fits |' + ' |' * (len(COLUMNS.split(', ')) - 3)
    bindings, update = found.bindings, next(row for row in found.rows if row['program'] == 'update')
    cells = [
        *(bindings['tensor'], bindings['remat']),
        *(f'{bindings[name]:,}' for name in ('micro_batch_tokens', 'head_chunk')),
        *('host' if bindings['offload_optimizer'] else 'device', f'{bindings["slots"]:,}'),
        *(f'{update["needed_gb"]:.1f} of {update["memory_gb"]:.0f} GB', f'{update["bound_s"]:.2g} s'),
    ]
    return f'{start} {" | ".join(map(str, cells))} | {found.step_s:,.0f} s |'


def write_row(folder: str, row: str) -> None:
    """Puts a row into the table that ends README.md of a folder, in the place of that of the same devices and model."""
    path = Path(folder, 'README.md')
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ''
    text += '' if table([]) in text else table([])
    before, rule, rows = text.partition(table([]).splitlines()[1] + '\n')
    key = lambda row: [cell.strip() for cell in row.split('|')[1:3]]
    rows = [other for other in rows.splitlines() if key(other) != key(row)]
    path.write_text(before + rule + '\n'.join(sorted([*rows, row], key=key)) + '\n')


def write_gin(folder: str, experiment: Experiment, topology: str, found: Found | None) -> Path | None:
    """A gin file with the settings, named after the devices and the model; returns its path. None found: no file."""
    model = _model(experiment)
    path = Path(folder, re.sub(r'[^a-z0-9]', '_', f'{topology}_{model}'.lower()) + '.gin')
    if found is None:
        path.unlink(missing_ok=True)
        return None
    lines = [
        f'# {model} on {topology}: memory settings for {experiment.max_prompt_length:,} + '
        f'{experiment.max_response_length:,} tokens or fewer, which `troll plan --search` found.',
        *(f'Compute.{name} = {value!r}' for name, value in found.bindings.items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')
    return path


def _model(experiment: Experiment) -> str:
    return experiment.model.rpartition('/')[2]
