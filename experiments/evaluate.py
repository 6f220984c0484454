"""Evaluates a run, one of its checkpoints, or a model in Hugging Face format.

    troll evaluate RUN_DIR [--step N] ['evaluation.samples_per_prompt = 16' …]
    troll evaluate RUN_DIR math_eval          # other problems than the run's own
    troll evaluate MODEL gsm8k ['binding = value' …]

The first argument is the folder of a run, which needs nothing else; or a folder `…/checkpoints/<step>` of one; or a
folder or bucket with such checkpoints and no configuration, or a model's folder, .gguf file or id on the hub, which
need gin files that say on what: a checkpoint also of which `Experiment.model`. Step 0 is the model that a run started
from.

What is evaluated is `Experiment.validation`, by default the test split of `Experiment.task`. Prints a table and writes,
for every set, `evaluation_<step>_<set>_<samples>.json` and `responses_….jsonl` of that name, and the mean of several
sets as `evaluation_<step>_mean.json`, into the run's folder or `evaluation.folder`.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from experiments.plumbing.command import begin, command_line, files_and_bindings, run_command
from experiments.plumbing.gin_files import Config
from experiments.plumbing.run import check_writable
from experiments.plumbing.validation import make_validation
from troll_jax.checkpoint import Checkpoints
from troll_jax.evaluate import (
    Evaluation,
    estimate,
    estimate_mean,
    is_correct,
    mean_by_problem,
    pass_at_k,
    success,
)
from troll_jax.experiment import Experiment
from troll_jax.hub import gguf_file, is_path, what_is_there
from troll_jax.models import decoder as decoders
from troll_jax.settings import Compute

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """The source of parameters. A model in Hugging Face format is neither a run nor checkpoints."""

    run_dir: Path | None  # with config.gin and model
    checkpoints: str | None  # folder or bucket that has `checkpoints`; of a run its configuration may say otherwise
    step: int | None  # if one checkpoint was named
    name: str  # for files


def find_source(source: str) -> Source:
    """Tells a run, a checkpoint and a model apart by their path."""
    path, step = epath.Path(source), None
    if path.name.isdigit() and path.parent.name == 'checkpoints':
        path, step = path.parent, int(path.name)
    if path.name == 'checkpoints':
        path = path.parent
    is_run, has_checkpoints = (path / 'config.gin').exists(), step is not None or (path / 'checkpoints').is_dir()
    name = re.sub(r'[^\w.-]+', '_', '_'.join(path.parts[-2:])).strip('_')
    run_dir = Path(path) if is_run else None
    return Source(run_dir, str(path) if has_checkpoints else None, step, name)


def check_source(source: str, found: Source, settings: Sequence[str]) -> None:
    """Raises a ValueError for what is neither a run nor a model, and for a model without a word of what to ask it."""
    path = epath.Path(source)
    if found.checkpoints is None and '://' not in source:
        is_model = gguf_file(source) or (path / 'config.json').exists()
        if not is_model and (path.exists() or is_path(source) or source.count('/') > 1):
            raise ValueError(
                f'{source!r} is neither a run (with config.gin), nor checkpoints, nor a model (with config.json, or a '
                f'.gguf file): {what_is_there(source)}'
            )
    if not settings:
        where = '' if path.exists() else f' {source!r} is no folder here, so it would be the id of a model on the hub.'
        raise ValueError(
            'a model, or checkpoints without config.gin, need configurations that say on what to evaluate, such as '
            f'gsm8k; got none.{where}'
        )


def evaluation(
    source: str,
    config: Config,
    /,
    *,
    step: int | None = None,
    split: str = 'test',
    samples_per_prompt: int | None = None,
    temperature: float | None = None,
    slots: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    folder: str | None = None,
) -> dict[str, dict]:
    """Samples responses to every set of `Experiment.validation`, grades them, and writes and returns the estimates.

    Args:
      source: run, checkpoint or model; see the module.
      config: configuration of the run, or gin files that say on what to evaluate.
      step: step of the checkpoint; None is the latest, 0 the model that the run started from.
      split: 'test' or 'train'.
      samples_per_prompt: n, for mean@n and pass@k with k up to n, of every set. None: the number of the set.
      temperature: sampling temperature; None: `Experiment.validation_temperature`.
      slots: decode slots, on all devices together. None: `Compute.slots`.
      top_k, top_p: sample from the most probable tokens only; None: all, or what `Experiment.validation_top_p` says.
      seed: seed of the sampling.
      folder: folder to write to; None is the run's, or `runs/evaluation_<source>`.

    Returns:
      The estimates by the name of the set; of several sets, their mean as 'mean'.

    Raises:
      ValueError: no such checkpoint, or a binding of the command line that nothing here reads.
    """
    found = find_source(source)
    step = found.step if step is None else step
    start, lora = config.build(Experiment), config.get('Method.lora')
    compute = dataclasses.replace(config.build(Compute), rollout_devices=None)  # all devices sample
    checkpoints_in = found.checkpoints
    if found.run_dir is not None:
        checkpoints_in = config.get('Run.checkpoint_folder') or found.run_dir
    config.check_used()
    experiment = start if found.run_dir is None else start.of_run(found.run_dir / 'model')
    model = experiment.load_model(compute, lora)
    out = found.run_dir or f'runs/evaluation_{found.name}' if folder is None else folder
    if jax.process_index() == 0:
        check_writable(out)
    given = {name: x for name, x in (('temperature', temperature), ('top_p', top_p)) if x is not None}

    def sampling(samples: int) -> dict:
        used = experiment.validation_sampling(samples) | given
        return used if used['temperature'] else used | {'top_p': top_p}

    samplers = partial(model.sampler, compute, slots=slots or compute.slots, top_k=top_k)
    validate = make_validation(
        experiment,
        model.tokenizer,
        lambda samples: samplers(samples_per_prompt=samples, **sampling(samples)),
        compute=compute,
        split=split,
        samples_per_prompt=samples_per_prompt,
    )
    with jax.set_mesh(compute.mesh):
        is_model = found.run_dir is None and found.checkpoints is None
        if is_model and step:
            raise ValueError(f'{source} is a model and has no checkpoint of step {step}; leave --step out')
        if is_model or step == 0:
            step, params = 0, start.load_params(compute)
        else:
            with Checkpoints(checkpoints_in, read_only=True) as checkpoints:
                if not checkpoints.steps:
                    raise ValueError(f'no whole checkpoint in {checkpoints.path}; train first, or evaluate --step 0')
                step = checkpoints.steps[-1] if step is None else step
                shapes = decoders.abstract(model.config, compute.mesh)[1]
                params = checkpoints.restore_params(shapes, step, partial(start.load_params, compute, lora))

        # What is not as by default is part of a file's name, so that one evaluation does not overwrite another.
        options = {'temperature': experiment.validation_temperature, 'top_k': top_k}
        options |= {'top_p': experiment.validation_top_p, 'seed': seed} | given
        special = ''.join(f'_{name}_{x}' for name, x in options.items() if x is not None and (name, x) != ('seed', 0))
        summaries = {}

        def done(name: str, result: Evaluation) -> None:  # a set at a time: many take hours
            samples = result.rewards.shape[1]
            if split == 'train':
                name = 'train' if name == 'test' else f'{name}_train'
            settings = options | sampling(samples)
            summaries[name] = {'step': step, 'set': name, 'split': split} | settings | summarise(result)
            write(Path(out), f'{step}_{name}_{samples}{special}', summaries[name], result)

        results = validate(params, jax.random.key(seed), done=done)
    if len(summaries) > 1:
        samples = min(result.rewards.shape[1] for result in results.values())
        mean = estimate(*(success(result) for result in results.values()), samples=samples)
        summaries['mean'] = {'step': step, 'sets': list(summaries), 'split': split, 'success': mean._asdict()} | options
        of_all = [part for part in ('train' if split == 'train' else None, samples_per_prompt) if part is not None]
        write(Path(out), '_'.join(map(str, [step, 'mean', *of_all])) + special, summaries['mean'])
    return summaries


def write(folder: Path, name: str, summary: dict, result: Evaluation | None = None) -> None:
    """Writes a summary, and every response with its reward. With several processes the first one does."""
    if jax.process_index() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'evaluation_{name}.json').write_text(json.dumps(summary, indent=2) + '\n')
    if result is None:
        return
    with (folder / f'responses_{name}.jsonl').open('w', encoding='utf-8') as file:
        for text, answer, responses, rewards in zip(
            result.prompts, result.answers, result.responses, result.rewards.tolist(), strict=True
        ):
            row = {'prompt': text, 'answer': answer, 'responses': responses, 'rewards': rewards}
            file.write(json.dumps(row, ensure_ascii=False) + '\n')


def summarise(result: Evaluation) -> dict:
    """Estimates with 95 % confidence intervals over problems."""
    samples, times = result.rewards.shape[1], np.bincount(result.problems)  # prompts that each problem has
    correct = np.bincount(result.problems, is_correct(result.rewards).sum(axis=1)).astype(int)
    pass_at = lambda k: np.array([pass_at_k(samples * n, c, k) for n, c in zip(times, correct, strict=True)])
    of_problems = estimate(success(result), samples=samples)._asdict()
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        'problems': len(times),
        'prompts': len(result.problems),
        'samples_per_prompt': samples,
        'success': of_problems,
        f'mean@{samples}': of_problems,  # the field's name for it
        **{f'pass@{k}': estimate(pass_at(k), samples=samples)._asdict() for k in ks},
        'reward': estimate_mean(
            mean_by_problem(result.rewards.mean(axis=1), result.problems), samples=samples
        )._asdict(),
        'response_length': float(result.lengths.mean()),
        'truncated_share': float(1 - result.stopped.mean()),
    }


def main() -> None:
    what = 'folder of a run or a checkpoint, or a model; then configurations'
    parser = command_line(__doc__, 'source', what, (Experiment, Compute, evaluation))
    parser.add_argument('--step', type=int, help='of the checkpoint; the latest by default')
    arguments = parser.parse_intermixed_args()
    begin(arguments, level=logging.WARNING)
    logging.getLogger('experiments').setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    source, (files, bindings) = arguments.source, files_and_bindings(arguments.bindings)
    found = find_source(source)
    if found.run_dir is not None:
        files = [found.run_dir / 'config.gin', *files]
    else:
        check_source(source, found, files + bindings)
        bindings += [f'Experiment.model = {source!r}'] if found.checkpoints is None else []
    config = Config(files, bindings, [evaluation])
    named = {} if arguments.step is None else {'step': arguments.step}
    summaries = config.function(evaluation, source, config)(**named)
    if jax.process_index() == 0:
        show(summaries)


def show(summaries: dict[str, dict]) -> None:
    """Prints a table: of several sets a row for each, of one all that is known of it."""
    interval = '{mean:.4f} [{low:.4f}, {high:.4f}]'
    if len(summaries) == 1:
        for key, value in next(iter(summaries.values())).items():
            print(f'{key:20}', interval.format(**value) if isinstance(value, dict) else value)
        return
    width = max(map(len, summaries))
    print(f'{"set":{width}} | step | problems | samples | success, 95 % interval   | pass@k     | length | truncated')
    for name, row in summaries.items():
        head = f'{name:{width}} | {row["step"]:4} |'
        success = interval.format(**row['success'])
        if name == 'mean':
            print(f'{head} {"":8} | {"":7} | {success} |')
            continue
        k, best = [(key[4:], value['mean']) for key, value in row.items() if key.startswith('pass@')][-1]
        print(
            f'{head} {row["problems"]:8} | {row["samples_per_prompt"]:7} | {success} | {k:3} {best:.4f} | '
            f'{row["response_length"]:6.1f} | {row["truncated_share"]:9.3f}'
        )


if __name__ == '__main__':
    run_command(main)
