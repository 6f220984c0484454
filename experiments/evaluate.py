"""Evaluates a run, one of its checkpoints, or a model in Hugging Face format.

    python -m experiments.evaluate RUN_DIR [--step N] ['evaluation.samples_per_prompt = 16' …]
    python -m experiments.evaluate RUN_DIR configs/data/math_eval.gin          # other problems than the run's own
    python -m experiments.evaluate MODEL configs/data/gsm8k.gin ['binding = value' …]

The first argument is the folder of a run, which needs nothing else; or a folder `…/checkpoints/<step>` of one; or a
folder or bucket with such checkpoints and no configuration, or a model's folder or id on the hub, which need gin files
that say on what: a checkpoint also of which `Experiment.model`. Step 0 is the model that a run started from.

What is evaluated is `Experiment.validation`, by default the test split of `Experiment.task`. Prints a table and writes,
for every set, `evaluation_<step>_<set>_<samples>.json` and `responses_….jsonl` of that name, and the mean of several
sets as `evaluation_<step>_mean.json`, into the run's folder or `evaluation.folder`.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gin
import jax
import numpy as np
from etils import epath

import experiments.train  # noqa: F401  registers what a run's config.gin binds
from experiments.command import run_command
from experiments.config import (
    Experiment,
    begin,
    check_bindings_used,
    checkpoint_folder,
    command_line,
    files_and_bindings,
    parse,
    register,
)
from experiments.run_folder import check_writable
from experiments.validation import make_validation
from troll_jax.checkpoint import Checkpoints
from troll_jax.data.prompts import PromptSet
from troll_jax.evaluate import Evaluation, estimate, is_correct, pass_at_k, success
from troll_jax.hub import is_path, what_is_there
from troll_jax.models import decoder as decoders
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.rollout import make_sampler

logger = logging.getLogger(__name__)

SLOTS = 32  # on each device, for a model that no configuration of a training comes with
# What is read of a training besides: how it decodes, and where it keeps its checkpoints.
OF_TRAINING = ('slots', 'prompts_per_step', 'samples_per_prompt', 'gather_weights', 'checkpoint_dir')


class Source(NamedTuple):
    """What there is to evaluate. A model in Hugging Face format is neither a run nor checkpoints."""

    run_dir: Path | None  # with config.gin and model
    checkpoints: str | None  # folder or bucket that has `checkpoints`; of a run its configuration may say otherwise
    step: int | None  # if one checkpoint was named
    name: str  # for files


def find_source(source: str) -> Source:
    """Whether a path is that of a run, of a checkpoint, or of a model."""
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
        is_model = (path / 'config.json').exists()
        if not is_model and (path.exists() or is_path(source) or source.count('/') > 1):
            raise ValueError(
                f'{source!r} is neither a run (with config.gin), nor checkpoints, nor a model (with config.json): '
                f'{what_is_there(source)}'
            )
    if not settings:
        where = '' if path.exists() else f' {source!r} is no folder here, so it would be the id of a model on the hub.'
        raise ValueError(
            'a model, or checkpoints without config.gin, need gin files that say on what to evaluate, such as '
            f'configs/data/gsm8k.gin; got none.{where}'
        )


@register
def evaluation(
    source: str,
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
      source: a run, a checkpoint or a model; see the module.
      step: of the checkpoint; None is the latest, 0 the model that the run started from.
      split: 'test' or 'train'.
      samples_per_prompt: n, for mean@n and pass@k with k up to n, of every set. None: what the set says.
      temperature: of the sampling; by default 0, greedy, for one sample and 1 for several.
      slots: responses that are decoded at a time, on all devices together; fewer save memory. None: as in training.
      top_k, top_p: sample from the most probable tokens only; off by default.
      seed: of the sampling.
      folder: to write to; None is the run's folder, or `runs/evaluation_<source>`.

    Returns:
      The estimates by the name of the set; of several sets, their mean as 'mean'.

    Raises:
      ValueError: no such checkpoint, or a binding of the command line that nothing here reads.
    """
    found = find_source(source)
    step = found.step if step is None else step
    # Tokenizer and sizes are those that a run saved; the model it started from may be gone.
    start = experiment = Experiment()
    if found.run_dir is not None:
        experiment = dataclasses.replace(start, model=str(found.run_dir / 'model'), chat_template_from=None)
    tokenizer = experiment.load_tokenizer()
    config = experiment.decoder_config(tokenizer)
    training = {name: value for name, value in gin.get_bindings('train').items() if name in OF_TRAINING}
    if slots is None:
        of_a_step = training.get('prompts_per_step', 0) * training.get('samples_per_prompt', 0)
        slots = training.get('slots') or of_a_step or SLOTS * experiment.mesh.size
    out = found.run_dir or f'runs/evaluation_{found.name}' if folder is None else folder
    if jax.process_index() == 0:
        check_writable(out)
    temperature_of = lambda samples: float(samples > 1) if temperature is None else temperature

    def sampler_of(samples: int):
        return make_sampler(
            config,
            samples_per_prompt=samples,
            max_response_length=experiment.max_response_length,
            temperature=temperature_of(samples),
            stop_tokens=experiment.stop_tokens(tokenizer),
            max_tokens=1,  # nothing is learnt from these samples
            mass=1.0,
            top_k=top_k,
            top_p=top_p,
            slots=slots,
            gather_weights=training.get('gather_weights', True),
        )

    validate = make_validation(experiment, tokenizer, sampler_of, split=split, samples_per_prompt=samples_per_prompt)
    check_bindings_used(also=[f'train.{name}' for name in OF_TRAINING])
    with jax.set_mesh(experiment.mesh):
        is_model = found.run_dir is None and found.checkpoints is None
        if is_model and step:
            raise ValueError(f'{source} is a model and has no checkpoint of step {step}; leave --step out')
        if is_model or step == 0:
            step, (_, params) = 0, load_pretrained(start.model, mesh=experiment.mesh)
        else:
            where = found.checkpoints if found.run_dir is None else checkpoint_folder(found.run_dir)
            with Checkpoints(where, read_only=True) as checkpoints:
                if not checkpoints.steps:
                    raise ValueError(f'no whole checkpoint in {checkpoints.path}; train first, or evaluate --step 0')
                step = checkpoints.steps[-1] if step is None else step
                params = checkpoints.restore_params(decoders.abstract(config, experiment.mesh)[1], step)

        # What is not as by default is part of a file's name, so that one evaluation does not overwrite another.
        options = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'seed': seed}
        usual = {'temperature': None, 'top_k': None, 'top_p': None, 'seed': 0}
        special = ''.join(f'_{option}_{value}' for option, value in options.items() if value != usual[option])
        summaries = {}

        def done(name: str, result: Evaluation, prompts: PromptSet) -> None:  # a set at a time: many take hours
            samples = result.rewards.shape[1]
            if split == 'train':
                name = 'train' if name == 'test' else f'{name}_train'
            settings = options | {'temperature': temperature_of(samples)}
            summaries[name] = {'step': step, 'set': name, 'split': split} | settings | summarise(result)
            write(Path(out), f'{step}_{name}_{samples}{special}', summaries[name], result, prompts)

        results = validate(params, jax.random.key(seed), done=done)
    if len(summaries) > 1:
        mean = estimate(*(success(result) for result, _ in results.values()))
        common = {'split': split, 'top_k': top_k, 'top_p': top_p, 'seed': seed}
        summaries['mean'] = {'step': step, 'sets': list(summaries), 'success': mean._asdict()} | common
        write(
            Path(out),
            f'{step}_mean{"" if split == "test" else f"_{split}"}'
            f'{"" if samples_per_prompt is None else f"_{samples_per_prompt}"}{special}',
            summaries['mean'],
        )
    return summaries


def write(
    folder: Path, name: str, summary: dict, result: Evaluation | None = None, prompts: PromptSet | None = None
) -> None:
    """Writes a summary, and every response with its reward. With several processes the first one does."""
    if jax.process_index() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'evaluation_{name}.json').write_text(json.dumps(summary, indent=2) + '\n')
    if result is None:
        return
    with (folder / f'responses_{name}.jsonl').open('w', encoding='utf-8') as file:
        for text, answer, responses, rewards in zip(
            prompts.texts, prompts.answers, result.responses, result.rewards.tolist(), strict=True
        ):
            row = {'prompt': text, 'answer': answer, 'responses': responses, 'rewards': rewards}
            file.write(json.dumps(row, ensure_ascii=False) + '\n')


def summarise(result: Evaluation) -> dict:
    """Estimates with 95 % confidence intervals over problems."""
    problems, samples = result.rewards.shape
    correct = is_correct(result.rewards).sum(axis=1)
    of_problems = estimate(success(result))._asdict()
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        'problems': problems,
        'samples_per_prompt': samples,
        'success': of_problems,
        f'mean@{samples}': of_problems,  # the field's name for it
        **{f'pass@{k}': estimate(np.array([pass_at_k(samples, c, k) for c in correct]))._asdict() for k in ks},
        'reward': estimate(result.rewards.mean(axis=1))._asdict(),
        'response_length': float(result.lengths.mean()),
        'truncated_share': float(1 - result.stopped.mean()),
    }


def main() -> None:
    parser = command_line(__doc__, 'config', help='folder of a run or a checkpoint, or a model; then gin files')
    parser.add_argument('--step', type=int, help='of the checkpoint; the latest by default')
    arguments = parser.parse_intermixed_args()
    begin(arguments, level=logging.WARNING)
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns that checkpoints that are only read are only read
    logging.getLogger('experiments').setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    (source, *files), bindings = files_and_bindings(arguments)
    found = find_source(source)
    if found.run_dir is not None:
        files = [found.run_dir / 'config.gin', *files]
    else:
        check_source(source, found, files + bindings)
        bindings += [f'Experiment.model = {source!r}'] if found.checkpoints is None else []
    parse(files, bindings)
    summaries = evaluation(source, **({} if arguments.step is None else {'step': arguments.step}))
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
