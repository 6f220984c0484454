"""Many short runs of the quickstart's task: estimators × policy objectives, over learning rates and staleness.

    python -m experiments.compare [--folder runs/comparison] [--seeds 5] [--methods GRPO/TROLL GSPO/Clip …]

All start from one warm-started model, make as many updates of as many responses, and differ in method, learning rate
and in how many updates are made of one rollout batch (its staleness). Finished runs are lines of `results.jsonl` in the
folder, so that the command goes on where it was stopped, and several may work on one folder with different `--methods`.
Draws `comparison.png` and writes `comparison.md` from the lines that are there; `--only-draw` does nothing else.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import gin
import jax
import matplotlib
import numpy as np
import optax

import experiments.train  # noqa: F401  registers `train`, whose bindings the files of methods set
from experiments.config import Experiment, parse
from experiments.train import minibatches
from troll_jax.data.prompts import batch_indices
from troll_jax.evaluate import decode_responses, evaluate, grade, sample_responses
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.ops.regularisers import regularised
from troll_jax.optimizer import adamw
from troll_jax.packing import batch_shape
from troll_jax.rewards.pool import Grader
from troll_jax.sharding import fetch, place
from troll_jax.types import Progress, TrainState
from troll_jax.update import make_update

matplotlib.use('Agg')

logger = logging.getLogger(__name__)

TASK = 'configs/quickstart.gin'
UPDATES = 192  # of every run, each of minibatch_prompts × samples_per_prompt responses
LEARNING_RATES = (2e-4, 5e-4, 1e-3)
STALENESS = (2, 8, 32)  # updates per rollout batch
EVALUATION_SAMPLES = 4  # per held-out problem, at temperature 1

# What an estimator brings with it besides the advantages: ratio and mean over tokens, as its paper has them.
ESTIMATORS = {
    'GRPO': ['train.estimator = @group_normalised', 'train.aggregation = @token_mean'],
    'Dr.GRPO': ['train.estimator = @mean_centred', 'train.aggregation = @constant_length'],
    'GSPO': [
        'train.estimator = @group_normalised',
        'train.aggregation = @sequence_mean',
        'troll.ratio = @sequence_ratio',
        'ppo_clip.ratio = @sequence_ratio',
        'ppo_clip.lower = 3e-4',
        'ppo_clip.upper = 4e-4',
        'ppo_clip.dual = None',
    ],
}
OBJECTIVES = {
    'Clip': ('configs/objectives/clip.gin', []),
    'TROLL': ('configs/objectives/troll.gin', []),
    'Clip + KL': ('configs/objectives/clip_kl.gin', []),
    'TROLL, α = 0': ('configs/objectives/troll.gin', ['troll.alpha = 0.0']),
}
METHODS = [f'{estimator}/{objective}' for estimator, objective in product(ESTIMATORS, OBJECTIVES)]


class Setting(NamedTuple):
    """One run."""

    method: str  # of METHODS
    learning_rate: float
    staleness: int
    seed: int


def settings(methods: list[str], seeds: int) -> Iterator[Setting]:
    """All runs, seed by seed, so that what is there when the command is stopped is balanced."""
    for seed in range(seeds):
        for method, staleness, rate in product(methods, STALENESS, LEARNING_RATES):
            yield Setting(method, rate, staleness, seed)


class Bench:
    """What all runs share: the start model, data, and the compiled programs."""

    def __init__(self, experiment: Experiment, grader: Grader):
        self.grader = grader
        self.experiment = experiment
        self.tokenizer = self.experiment.load_tokenizer()
        self.config = self.experiment.decoder_config(self.tokenizer)
        self.prompts, self.held_out = (
            self.experiment.load_prompts(split, self.tokenizer) for split in ('train', 'test')
        )
        _, self.start = load_pretrained(self.experiment.model, mesh=self.experiment.mesh)
        self.bindings = gin.get_bindings('train')

    def programs(self, method: str) -> tuple[dict[str, Any], optax.GradientTransformation, Callable]:
        """The bindings of `train` for a method, an optimizer whose learning rate is part of its state, the update."""
        estimator, objective = method.split('/')
        file, bindings = OBJECTIVES[objective]
        gin.clear_config()
        parse([TASK, file], [*ESTIMATORS[estimator], *bindings])
        bound = {'regularisers': ()} | gin.get_bindings('train')
        of_adamw = gin.get_bindings('adamw')
        rate = of_adamw.pop('learning_rate')
        optimizer = optax.inject_hyperparams(lambda learning_rate: adamw(learning_rate, **of_adamw))(rate)
        update = make_update(
            self.config,
            optimizer,
            objective=regularised(bound['objective'], bound['regularisers']),
            temperature=bound['temperature'],
            tail_rule=bound['tail_rule'],
            max_tokens=bound['max_tokens'],
            mass=bound['mass'],
            head_chunk=bound['head_chunk'],
        )
        return bound, optimizer, update

    def run(self, setting: Setting, bound: dict[str, Any], optimizer, update) -> dict:
        """Trains from the start model, and evaluates what comes out."""
        mesh = self.experiment.mesh
        samples, minibatch = bound['samples_per_prompt'], bound['minibatch_prompts']
        count = minibatch * setting.staleness
        shape = batch_shape(
            minibatch * samples, self.experiment.max_prompt_length + self.experiment.max_response_length
        )
        params = jax.tree.map(lambda x: x.copy(), self.start)
        opt_state = optimizer.init(params)
        opt_state.hyperparams['learning_rate'] = np.float32(setting.learning_rate)
        progress = Progress(np.int32(0), np.int32(0), np.float32(0))
        state = TrainState(place(progress, mesh, ()), params, opt_state)
        sampler = self.sampler(samples, max_tokens=bound['max_tokens'], mass=bound['mass'])
        key = jax.random.key(setting.seed)
        rewards, logs = [], []
        for step in range(UPDATES // setting.staleness):
            indices = batch_indices(len(self.prompts), count, seed=setting.seed, step=step)
            rollout = sample_responses(
                sampler, state.params, self.prompts, indices, jax.random.fold_in(key, step), mesh=mesh
            )
            answers = [self.prompts.answers[i] for i in indices for _ in range(samples)]
            grades = grade(self.grader, decode_responses(rollout, self.tokenizer), answers)
            advantages = np.asarray(jax.vmap(bound['estimator'])(grades.rewards.reshape(count, samples))).reshape(-1)
            learnt = np.ones(len(advantages), bool)
            for batch in minibatches(rollout, advantages, learnt, bound['aggregation'], minibatch * samples, shape):
                state, log = update(state, place(batch, mesh, (None, 'batch')))
                logs.append(log.metrics)
            rewards.append(float(grades.rewards.mean()))
        result = evaluate(
            self.sampler(EVALUATION_SAMPLES), state.params, self.held_out, self.grader, self.tokenizer, key, mesh=mesh
        )
        logs = jax.tree.map(lambda *x: np.array(x), *fetch(logs))
        mask = np.arange(rollout.entropy.shape[1]) < rollout.response_lengths[:, None]
        return setting._asdict() | {
            'success': float(result.rewards.mean()),
            'best_reward': max(rewards),
            'rewards': [round(reward, 4) for reward in rewards],
            'entropy': float(rollout.entropy[mask].mean()),
            'kl_mean': float(logs['kl_mean'].mean()),
            'kl_p99': float(logs['kl_p99'].mean()),
            'kl_max': float(logs['kl_max'].mean()),
            'held_share': float(logs.get('projected_share', logs.get('clipped_share')).mean()),
            'skipped': int(logs['skipped'].sum()),
        }


def run_all(folder: Path, methods: list[str], seeds: int) -> None:
    """Makes the runs that `results.jsonl` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'results.jsonl'
    done = {Setting(*(row[name] for name in Setting._fields)) for row in read_results(path)}
    todo = [setting for setting in settings(methods, seeds) if setting not in done]
    if not todo:
        return
    gin.clear_config()
    parse([TASK])
    experiment = Experiment()
    with Grader(experiment.task.grade, deadline=experiment.task.deadline) as grader:
        bench = Bench(experiment, grader)
        with jax.set_mesh(bench.experiment.mesh):
            programs = cache(bench.programs)
            for i, setting in enumerate(todo):
                start = time.perf_counter()
                row = bench.run(setting, *programs(setting.method))
                row['seconds'] = round(time.perf_counter() - start, 1)
                with path.open('a') as file:
                    file.write(json.dumps(row, ensure_ascii=False) + '\n')
                print(f'{i + 1}/{len(todo)} {setting} success {row["success"]:.3f} in {row["seconds"]} s', flush=True)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=Path('runs/comparison'))
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--methods', nargs='*', default=METHODS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    run_all(arguments.folder, arguments.methods, arguments.seeds)


if __name__ == '__main__':
    main()
