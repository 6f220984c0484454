"""Evaluates a checkpoint of a run. Needs nothing but the run's folder.

    python -m experiments.evaluate RUN_DIR [--step N] ['evaluation.samples_per_prompt = 16' …]

Step 0 is the model that the run started from. Prints a table and writes `evaluation_<step>_<split>_<samples>.json` and
`responses_….jsonl` of that name into the run's folder.
"""

import dataclasses
import json
import logging
from pathlib import Path

import gin
import jax
import numpy as np

import experiments.train  # noqa: F401  registers what a run's config.gin binds
from experiments.config import Experiment, begin, checkpoint_folder, command_line, parse, register, run_command
from troll_jax.checkpoint import Checkpoints
from troll_jax.evaluate import Evaluation, estimate, evaluate, pass_at_k
from troll_jax.models import decoder as decoders
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import make_sampler

logger = logging.getLogger(__name__)


@register
def evaluation(
    run_dir: str,
    step: int | None = None,
    split: str = 'test',
    samples_per_prompt: int = 1,
    temperature: float | None = None,
    slots: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> dict:
    """Restores a checkpoint, samples responses to a split, grades them, and writes and returns the estimates.

    Args:
      run_dir: folder of the run.
      step: of the checkpoint; None is the latest, 0 the model that the run started from.
      split: 'test' or 'train'.
      samples_per_prompt: n, for mean@n and pass@k with k up to n.
      temperature: of the sampling; by default 0, greedy, for one sample and 1 for several.
      slots: responses that are decoded at a time, on all devices together; fewer save memory. None: as in training.
      top_k, top_p: sample from the most probable tokens only; off by default.
      seed: of the sampling.

    Raises:
      ValueError: not a run's folder, or no such checkpoint.
    """
    run_dir = Path(run_dir)
    if temperature is None:
        temperature = 0.0 if samples_per_prompt == 1 else 1.0
    # Tokenizer and sizes are those that the run saved; the model it started from may be gone.
    start = Experiment()
    experiment = dataclasses.replace(start, model=str(run_dir / 'model'), chat_template_from=None)
    tokenizer = experiment.load_tokenizer()
    config = experiment.decoder_config(tokenizer)
    prompts = experiment.load_prompts(split, tokenizer)
    settings = {'slots': None, 'gather_weights': True} | gin.get_bindings('train')
    settings['slots'] = settings['slots'] or settings['prompts_per_step'] * settings['samples_per_prompt']
    sampler = make_sampler(
        config,
        samples_per_prompt=samples_per_prompt,
        max_response_length=experiment.max_response_length,
        temperature=temperature,
        stop_tokens=experiment.stop_tokens(tokenizer),
        max_tokens=1,  # nothing is learnt from these samples
        mass=1.0,
        top_k=top_k,
        top_p=top_p,
        slots=settings['slots'] if slots is None else slots,
        gather_weights=settings['gather_weights'],
    )
    with jax.set_mesh(experiment.mesh), Grader(experiment.task.grade, deadline=experiment.task.deadline) as grader:
        grader.start()
        if step == 0:
            _, params = load_pretrained(start.model, mesh=experiment.mesh)
        else:
            with Checkpoints(checkpoint_folder(run_dir), read_only=True) as checkpoints:
                if not checkpoints.steps:
                    raise ValueError(f'no whole checkpoint in {checkpoints.path}; train first, or evaluate --step 0')
                step = checkpoints.steps[-1] if step is None else step
                params = checkpoints.restore_params(decoders.abstract(config, experiment.mesh)[1], step)
        result = evaluate(
            sampler,
            params,
            prompts,
            grader,
            tokenizer,
            jax.random.key(seed),
            mesh=experiment.mesh,
        )
    options = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'seed': seed}
    summary = {'step': step, 'split': split} | options | summarise(result)
    # What is not as by default is part of the name, so that one evaluation does not overwrite another.
    usual = {'temperature': 0.0 if samples_per_prompt == 1 else 1.0, 'top_k': None, 'top_p': None, 'seed': 0}
    special = [f'_{option}_{value}' for option, value in options.items() if value != usual[option]]
    name = f'{step}_{split}_{samples_per_prompt}' + ''.join(special)
    if jax.process_index() > 0:
        return summary
    (run_dir / f'evaluation_{name}.json').write_text(json.dumps(summary, indent=2) + '\n')
    with (run_dir / f'responses_{name}.jsonl').open('w') as file:
        for text, answer, responses, rewards in zip(
            prompts.texts, prompts.answers, result.responses, result.rewards.tolist(), strict=True
        ):
            row = {'prompt': text, 'answer': answer, 'responses': responses, 'rewards': rewards}
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
    return summary


def summarise(result: Evaluation) -> dict:
    """Estimates with 95 % confidence intervals over problems."""
    problems, samples = result.rewards.shape
    correct = (result.rewards >= 1).sum(axis=1)
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        'problems': problems,
        'samples_per_prompt': samples,
        'success': estimate(correct / samples)._asdict(),
        f'mean@{samples}': estimate(result.rewards.mean(axis=1))._asdict(),
        **{f'pass@{k}': estimate(np.array([pass_at_k(samples, c, k) for c in correct]))._asdict() for k in ks},
        'response_length': float(result.lengths.mean()),
        'truncated_share': float(1 - result.stopped.mean()),
    }


def main() -> None:
    parser = command_line(__doc__, 'run_dir', help='folder of a run')
    parser.add_argument('--step', type=int, help='of the checkpoint; the latest by default')
    arguments = parser.parse_intermixed_args()
    begin(arguments, level=logging.WARNING)
    parse([Path(arguments.run_dir) / 'config.gin'], arguments.bindings)
    step = {} if arguments.step is None else {'step': arguments.step}
    summary = evaluation(arguments.run_dir, **step)
    for name, value in summary.items() if jax.process_index() == 0 else ():
        print(f'{name:20}', '{mean:.4f}  [{low:.4f}, {high:.4f}]'.format(**value) if isinstance(value, dict) else value)


if __name__ == '__main__':
    run_command(main)
