"""Many short runs of the quickstart's task: estimators × policy objectives, over learning rates and staleness.

    python -m experiments.compare [--folder runs/comparison] [--seeds 5] [--methods GRPO/TROLL GSPO/Clip …]

All start from one warm-started model, make as many updates of as many responses, and differ in method, learning rate
and in how many updates are made of one rollout batch (its staleness). Finished runs are lines of `results.jsonl` in the
folder, so that the command goes on where it was stopped. Draws `comparison.png` and writes `comparison.md` from the
lines that are there; `--only-draw` does nothing else. Where there is no warm-started model yet, it is made first.
"""

import argparse
import inspect
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy import stats

import experiments.train  # noqa: F401  registers `train`, whose bindings the files of methods set
from experiments import quickstart
from experiments.command import run_command
from experiments.config import Experiment, parse
from troll_jax.collect import make_collector
from troll_jax.evaluate import evaluate, success
from troll_jax.learn import Learner, make_learner
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.optimizer import adamw
from troll_jax.packing import batch_shape
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.terms import task_reward
from troll_jax.rollout import make_sampler

MODEL = Path('runs/quickstart/model')  # of the task
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
    'PPO': [
        'train.aggregation = @token_mean',
        'critic_adamw.learning_rate = 1e-3',  # of a small model, as all learning rates here
        'critic_adamw.b2 = 0.99',
    ],
}
FILES = {'PPO': ('configs/critic.gin',)}
OBJECTIVES = {
    'Clip': ('configs/objectives/clip.gin', []),
    'TROLL': ('configs/objectives/troll.gin', []),
    'Clip + KL': ('configs/objectives/clip_kl.gin', []),
    'TROLL, α = 0': ('configs/objectives/troll.gin', ['troll.alpha = 0.0']),
}
LEARNER_SETTINGS = set(inspect.signature(make_learner).parameters) - {'optimizer'}
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


def read(method: str) -> None:
    """Makes gin know a method alone. What gin makes reads its bindings when it is called: they must be there then."""
    estimator, objective = method.split('/')
    file, bindings = OBJECTIVES[objective]
    gin.clear_config()
    parse([TASK, file, *FILES.get(estimator, ())], [*ESTIMATORS[estimator], *bindings])


class Bench:
    """What all runs share: the start model, the data, and the compiled programs."""

    def __init__(self, experiment: Experiment, grader: Grader):
        self.experiment, self.grader = experiment, grader
        self.tokenizer = experiment.load_tokenizer()
        self.config = experiment.decoder_config(self.tokenizer)
        self.prompts, self.held_out = (experiment.load_prompts(split, self.tokenizer) for split in ('train', 'test'))
        _, self.start = load_pretrained(experiment.model, mesh=experiment.mesh)
        bound = gin.get_bindings('train')
        self.samples, self.minibatch = bound['samples_per_prompt'], bound['minibatch_prompts']
        sampler = partial(
            make_sampler,
            self.config,
            max_response_length=experiment.max_response_length,
            stop_tokens=experiment.stop_tokens(self.tokenizer),
            temperature=bound['temperature'],
        )
        self.sampler = sampler(samples_per_prompt=self.samples, max_tokens=bound['max_tokens'], mass=bound['mass'])
        self.evaluator = sampler(samples_per_prompt=EVALUATION_SAMPLES, max_tokens=1, mass=1.0)

    def learner(self, method: str) -> Learner:
        """The learner of a method. The learning rate is part of its optimizer's state: one program for all."""
        read(method)
        of_adamw = gin.get_bindings('adamw')
        rate = of_adamw.pop('learning_rate')
        experiment = self.experiment
        room = experiment.max_prompt_length + experiment.max_response_length
        responses = self.minibatch * self.samples
        settings = {name: value for name, value in gin.get_bindings('train').items() if name in LEARNER_SETTINGS}
        return make_learner(
            self.config,
            optax.inject_hyperparams(lambda learning_rate: adamw(learning_rate, **of_adamw))(rate),
            batch_shape(responses, room),
            minibatch=responses,
            max_response_length=experiment.max_response_length,
            mesh=experiment.mesh,
            **settings,
        )

    def run(self, setting: Setting, learner: Learner) -> dict:
        """Trains from the start model, and evaluates what comes out."""
        collect = make_collector(
            self.sampler,
            self.prompts,
            self.grader,
            self.tokenizer,
            prompts_per_step=self.minibatch * setting.staleness,
            max_response_length=self.experiment.max_response_length,
            rewards=[('task', 1.0, task_reward)],
            seed=setting.seed,
            mesh=self.experiment.mesh,
        )
        state = learner.start(jax.tree.map(jnp.copy, self.start))
        state.opt_state.hyperparams['learning_rate'] = jnp.float32(setting.learning_rate)
        rows = []
        for _ in range(UPDATES // setting.staleness):
            experience = collect(state.params, int(state.progress.draws))
            state, metrics, _ = learner.learn(state, experience)
            rows.append(experience.logs | metrics)
        result = evaluate(
            self.evaluator,
            state.params,
            self.held_out,
            self.grader,
            self.tokenizer,
            jax.random.key(setting.seed),
            mesh=self.experiment.mesh,
        )
        mean = lambda name: float(np.mean([row[f'update/{name}'] for row in rows]))
        last = rows[-1].get('critic/explained_variance')
        critic = {} if last is None or not np.isfinite(last) else {'explained_variance': float(last)}
        held = 'projected_share' if 'update/projected_share' in rows[0] else 'clipped_share'
        return (
            setting._asdict()
            | {
                'success': float(success(result).mean()),
                'rewards': [round(float(row['reward/mean']), 4) for row in rows],
                'entropy': float(rows[-1]['rollout/entropy']),
                'kl_mean': mean('kl_mean'),
                'kl_p99': mean('kl_p99'),
                'kl_max': mean('kl_max'),
                'held_share': mean(held),
                'skipped': mean('skipped'),
            }
            | critic
        )


def run_all(folder: Path, methods: list[str], seeds: int) -> None:
    """Makes the runs that `results.jsonl` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'results.jsonl'
    done = {Setting(*(row[name] for name in Setting._fields)) for row in read_results(path)}
    todo = [setting for setting in settings(methods, seeds) if setting not in done]
    if not todo:
        return
    if not MODEL.exists():
        quickstart.run('experiments.warm_start', 'configs/arithmetic_model.gin')
    gin.clear_config()
    parse([TASK])
    experiment = Experiment()
    with Grader(experiment.task.grade, deadline=experiment.task.deadline) as grader:
        bench = Bench(experiment, grader)
        learner = cache(bench.learner)
        with jax.set_mesh(experiment.mesh):
            for i, setting in enumerate(todo):
                start = time.perf_counter()
                of_method = learner(setting.method)
                read(setting.method)
                row = bench.run(setting, of_method)
                row['seconds'] = round(time.perf_counter() - start, 1)
                with path.open('a') as file:
                    file.write(json.dumps(row, ensure_ascii=False) + '\n')
                print(f'{i + 1}/{len(todo)} {setting} success {row["success"]:.3f} in {row["seconds"]} s', flush=True)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95 % interval by Student's t."""

    mean: float
    half: float


def success_of(rows: list[dict], **fixed) -> Interval | None:
    """Success of the runs with these settings: the mean of each seed's runs first, then over seeds. None: no run.

    A seed with fewer runs than another was interrupted and does not count: its mean is that of other settings.
    """
    once = {tuple(row[name] for name in Setting._fields): row for row in rows}.values()
    chosen = [row for row in once if all(row[name] == value for name, value in fixed.items())]
    if not chosen:
        return None
    runs = Counter(row['seed'] for row in chosen)
    complete = [seed for seed, count in runs.items() if count == max(runs.values())]
    by_seed = [np.mean([row['success'] for row in chosen if row['seed'] == seed]) for seed in complete]
    n = len(by_seed)
    half = stats.t.ppf(0.975, n - 1) * np.std(by_seed, ddof=1) / n**0.5 if n > 1 else float('nan')
    return Interval(float(np.mean(by_seed)), float(half))


def draw(rows: list[dict]) -> Figure:
    """Success against learning rate, over all levels of staleness, and the other way round; a column per estimator."""
    figure = Figure(figsize=(16, 7), layout='constrained')
    axes = figure.subplots(2, len(ESTIMATORS), sharey=True)
    for column, estimator in enumerate(ESTIMATORS):
        for axis, name, values in zip(
            axes[:, column], ('learning_rate', 'staleness'), (LEARNING_RATES, STALENESS), strict=True
        ):
            for offset, objective in enumerate(OBJECTIVES):
                found = [success_of(rows, method=f'{estimator}/{objective}', **{name: value}) for value in values]
                points = [(x, interval) for x, interval in enumerate(found) if interval is not None]
                if points:
                    axis.errorbar(
                        [x + 0.04 * (offset - 1.5) for x, _ in points],
                        [interval.mean for _, interval in points],
                        [interval.half for _, interval in points],
                        fmt='o-',
                        capsize=3,
                        markersize=4,
                        label=objective,
                    )
            axis.set_xticks(range(len(values)), [f'{value:g}' for value in values])
            label = {'learning_rate': 'learning rate', 'staleness': 'updates per rollout batch'}[name]
            axis.set(title=estimator, xlabel=label, ylim=(0, 1))
            axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel('success on held-out problems')
    return figure


def table(rows: list[dict]) -> str:
    """Success of every method at every setting, in Markdown."""
    cells = list(product(STALENESS, LEARNING_RATES))
    lines = [
        '| updates per rollout batch | ' + ' | '.join(str(staleness) for staleness, _ in cells) + ' | all |',
        '| --- ' * (len(cells) + 2) + '|',
        '| learning rate | ' + ' | '.join(f'{rate:g}' for _, rate in cells) + ' | |',
    ]
    for method in METHODS:
        found = [success_of(rows, method=method, staleness=s, learning_rate=rate) for s, rate in cells]
        found.append(success_of(rows, method=method))
        shown = [f'{x.mean:.3f} ± {x.half:.3f}' if x is not None else '' for x in found]
        lines.append(f'| {method.replace("/", ", ")} | ' + ' | '.join(shown) + ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, default=Path('runs/comparison'))
    parser.add_argument('--seeds', type=int, default=5, help='of data and sampling, from 0')
    parser.add_argument('--methods', nargs='*', default=METHODS, help='estimator/objective')
    parser.add_argument('--only-draw', action='store_true')
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(METHODS):
        raise ValueError(f'no method {sorted(unknown)}; expected some of {METHODS}')
    logging.basicConfig(level=logging.WARNING)
    if not arguments.only_draw:
        run_all(arguments.folder, arguments.methods, arguments.seeds)
    rows = read_results(arguments.folder / 'results.jsonl')
    if not rows:
        raise ValueError(f'no runs in {arguments.folder}/results.jsonl; leave out --only-draw, or change --folder')
    figure = draw(rows)
    figure.savefig(arguments.folder / 'comparison.png', dpi=90)
    (arguments.folder / 'comparison.md').write_text(table(rows))
    print(f'{len(rows)} runs in {arguments.folder}: comparison.md and comparison.png are written')


if __name__ == '__main__':
    run_command(main)
