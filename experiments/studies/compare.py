"""Many short runs that share a model, data and compiled programs; and their table and figure."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.evaluate import summarise
from experiments.plumbing.gin_files import Config
from experiments.train import training_step
from experiments.warm_start import warm_start
from troll_jax.collect import make_collector
from troll_jax.evaluate import Estimate, evaluate, over_seeds
from troll_jax.experiment import Experiment
from troll_jax.learn import Learner
from troll_jax.rewards.pool import Grader
from troll_jax.settings import Compute, Method, Sampling

# What an estimator brings with it besides the advantages: ratio and mean over tokens, as its paper has them.
ESTIMATORS = {
    'GRPO': ['Method.advantages = @group_normalised', 'Method.aggregation = @token_mean'],
    'Dr.GRPO': ['Method.advantages = @mean_centred', 'Method.aggregation = @constant_length'],
    'GSPO': [
        'Method.advantages = @group_normalised',
        'Method.aggregation = @sequence_mean',
        'troll.ratio = @sequence_ratio',
        'ppo_clip.ratio = @sequence_ratio',
        'ppo_clip.lower = 3e-4',
        'ppo_clip.upper = 4e-4',
        'ppo_clip.dual = None',
    ],
    'PPO': [
        'Method.aggregation = @token_mean',
        'critic/adamw.learning_rate = 1e-3',  # of a small model, as all learning rates here
        'critic/adamw.b2 = 0.99',
    ],
}
FILES = {'PPO': ('configs/critic.gin',)}
OBJECTIVES = {
    'Clip': ('configs/objectives/clip.gin', []),
    'TROLL': ('configs/objectives/troll.gin', []),
    'Clip + KL': ('configs/objectives/clip_kl.gin', []),
    'TROLL, α = 0': ('configs/objectives/troll.gin', ['troll.alpha = 0.0']),
    'unbounded': ('configs/objectives/importance_weighted.gin', []),
    'DPPO': ('configs/objectives/dppo.gin', []),
}


class Suite(NamedTuple):
    """Runs that are compared: methods × levels of staleness × lags × learning rates × seeds."""

    task: str  # a gin file
    methods: Sequence[str]  # estimator/objective
    updates: int  # of every run, each of minibatch_prompts × samples_per_prompt responses
    learning_rates: Sequence[float]
    staleness: Sequence[int]  # updates per rollout batch
    samples: int  # per held-out problem, at temperature 1
    lags: Sequence[int] = (0,)  # steps between the policy that samples and the one that learns

    def settings(self, methods: Sequence[str], seeds: int) -> Iterator['Setting']:
        """All runs, seed by seed, so that the results are balanced whenever the command is stopped."""
        for seed in range(seeds):
            for method, lag, staleness, rate in product(methods, self.lags, self.staleness, self.learning_rates):
                yield Setting(method, rate, staleness, lag, seed)


SUITES = {
    'quickstart': Suite(
        'configs/quickstart.gin',
        [f'{estimator}/{objective}' for estimator, objective in product(ESTIMATORS, list(OBJECTIVES)[:4])],
        updates=192,
        learning_rates=(2e-4, 5e-4, 1e-3),
        staleness=(2, 8, 32),
        samples=4,
    ),
    'smollm2': Suite(
        'configs/smollm2.gin',
        [f'GRPO/{objective}' for objective in OBJECTIVES],
        updates=48,
        learning_rates=(1e-5,),
        staleness=(4, 16),
        samples=8,
    ),
    'lag': Suite(
        'configs/quickstart.gin',
        [f'GRPO/{objective}' for objective in OBJECTIVES],
        updates=192,
        learning_rates=(5e-4,),
        staleness=(8,),
        lags=(0, 1, 4, 16),
        samples=4,
    ),
    'long': Suite(
        'configs/quickstart.gin',
        [f'GRPO/{objective}' for objective in OBJECTIVES],
        updates=4000,
        learning_rates=(5e-4,),
        staleness=(4,),
        lags=(4,),
        samples=4,
    ),
}
AXES = {'staleness': 'updates per rollout batch', 'lag': 'steps of lag', 'learning_rate': 'learning rate'}


class Setting(NamedTuple):
    """One run."""

    method: str  # of a suite
    learning_rate: float
    staleness: int
    lag: int
    seed: int


def read(task: str, method: str) -> Config:
    """The configuration of a method on a task."""
    estimator, objective = method.split('/')
    file, bindings = OBJECTIVES[objective]
    return Config([task, file, *FILES.get(estimator, ())], [*ESTIMATORS[estimator], *bindings])


class Bench:
    """The start model, the data and the compiled programs, which all runs share."""

    def __init__(self, suite: Suite, experiment: Experiment, sampling: Sampling, compute: Compute, grader: Grader):
        self.suite, self.experiment, self.sampling, self.compute = suite, experiment, sampling, compute
        self.grader = grader
        self.model = experiment.load_model(compute)
        self.prompts, self.held_out = (
            experiment.load_prompts(split, self.model.tokenizer) for split in ('train', 'test')
        )
        self.start = experiment.load_params(compute)
        sampler = partial(self.model.sampler, compute, temperature=sampling.temperature)
        self.sampler = sampler(
            samples_per_prompt=sampling.samples_per_prompt,
            support_size=sampling.support_size,
            support_mass=sampling.support_mass,
        )
        self.evaluator = sampler(samples_per_prompt=suite.samples)

    def learner(self, method: str, lag: int) -> Learner:
        """The learner of a method. The learning rate is part of its optimizer's state: one program for all."""
        settings = read(self.suite.task, method).build(Method)
        adamw = settings.optimizer
        optimizer = lambda: optax.inject_hyperparams(lambda learning_rate: adamw(learning_rate=learning_rate))(0.0)
        return Learner(
            self.model.config,
            replace(self.sampling, lag=lag),
            replace(settings, optimizer=optimizer),
            self.compute,
            max_prompt_length=self.experiment.max_prompt_length,
            max_response_length=self.experiment.max_response_length,
        )

    def run(self, setting: Setting, learner: Learner) -> dict:
        """Trains from the start model, and evaluates what comes out."""
        sampling = replace(
            self.sampling, prompts_per_step=learner.method.minibatch_prompts * setting.staleness, seed=setting.seed
        )
        collect = make_collector(
            self.sampler,
            self.prompts,
            self.grader,
            self.model.tokenizer,
            sampling,
            max_response_length=self.experiment.max_response_length,
            rewards=learner.method.rewards,
            mesh=self.compute.mesh,
        )
        state = learner.init(jax.tree.map(jnp.copy, self.start))
        state.opt_state.hyperparams['learning_rate'] = jnp.float32(setting.learning_rate)
        rows = []
        for _ in range(self.suite.updates // setting.staleness):
            experience = collect(*learner.hand_over(state), int(state.progress.draws))()
            state, row, _ = training_step(learner, state, experience)
            rows.append(row)
        result = evaluate(
            self.evaluator,
            state.policy,
            self.held_out,
            self.grader,
            self.model.tokenizer,
            jax.random.key(setting.seed),
            mesh=self.compute.mesh,
        )
        found = summarise(result)
        mean = lambda name: float(np.mean([row[f'update/{name}'] for row in rows]))
        rewards, last = np.array([row['reward/mean'] for row in rows]), rows[-1].get('critic/explained_variance')
        critic = {} if last is None or not np.isfinite(last) else {'explained_variance': float(last)}
        return (
            setting._asdict()
            | {
                'success': found['success']['mean'],
                'low': found['success']['low'],
                'high': found['success']['high'],
                f'pass@{self.suite.samples}': found[f'pass@{self.suite.samples}']['mean'],
                'response_length': found['response_length'],
                'rewards': [round(float(part.mean()), 4) for part in np.array_split(rewards, min(len(rows), 100))],
                'entropy': float(rows[-1]['rollout/entropy']),
                'kl_mean': mean('kl_mean'),
                'kl_p99': mean('kl_p99'),
                'kl_max': mean('kl_max'),
                'constrained_share': mean('constrained_share'),
                'skipped': mean('skipped'),
            }
            | critic
        )


def run_all(suite: Suite, folder: Path, methods: Sequence[str], seeds: int) -> None:
    """Makes the runs of a suite that `results.jsonl` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'results.jsonl'
    done = {Setting(*(row[name] for name in Setting._fields)) for row in read_results(path)}
    todo = [setting for setting in suite.settings(methods, seeds) if setting not in done]
    if not todo:
        return
    config = Config([suite.task])
    experiment, sampling, compute = (config.build(kind) for kind in (Experiment, Sampling, Compute))
    if experiment.model == 'runs/quickstart/model' and not Path(experiment.model).exists():
        Config(['configs/arithmetic_model.gin'], commands=[warm_start]).function(warm_start)()
    with compute.grader(experiment.task) as grader:
        bench = Bench(suite, experiment, sampling, compute, grader)
        learner = cache(bench.learner)
        with jax.set_mesh(compute.mesh):
            for i, setting in enumerate(todo):
                start = time.perf_counter()
                row = bench.run(setting, learner(setting.method, setting.lag))
                row['seconds'] = round(time.perf_counter() - start, 1)
                with path.open('a') as file:
                    file.write(json.dumps(row, ensure_ascii=False) + '\n')
                print(f'{i + 1}/{len(todo)} {setting} success {row["success"]:.3f} in {row["seconds"]} s', flush=True)


def read_results(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [{'lag': 0} | json.loads(line) for line in lines]


def success_of(rows: list[dict], **fixed) -> Estimate | None:
    """Success of the runs with these settings: the mean of each seed's runs first, then over seeds. None: no run.

    The interval is one over seeds, and over problems as well where the lines have one of them.

    A seed with fewer runs than another was interrupted and does not count: its mean is that of other settings.
    """
    once = {tuple(row[name] for name in Setting._fields): row for row in rows}.values()
    chosen = [row for row in once if all(row[name] == value for name, value in fixed.items())]
    if not chosen:
        return None
    runs = Counter(row['seed'] for row in chosen)
    complete = [seed for seed, count in runs.items() if count == max(runs.values())]
    mean = lambda name, seed: np.mean([row.get(name, row['success']) for row in chosen if row['seed'] == seed])
    if len(complete) == 1 and 'low' not in chosen[0]:
        return Estimate(float(mean('success', *complete)), np.nan, np.nan)
    return over_seeds([Estimate(*(mean(name, seed) for name in ('success', 'low', 'high'))) for seed in complete])


def draw(rows: list[dict]) -> Figure:
    """Success against each axis that varies, over all values of the others; a column per estimator."""
    estimators = [
        estimator for estimator in ESTIMATORS if any(row['method'].startswith(f'{estimator}/') for row in rows)
    ]
    kinds = varying(rows)
    figure = Figure(figsize=(4 * len(estimators), 3.5 * len(kinds)), layout='constrained')
    axes = figure.subplots(len(kinds), len(estimators), sharey=True, squeeze=False)
    for column, estimator in enumerate(estimators):
        for axis, (name, values) in zip(axes[:, column], kinds.items(), strict=True):
            for offset, objective in enumerate(OBJECTIVES):
                found = [success_of(rows, method=f'{estimator}/{objective}', **{name: value}) for value in values]
                points = [(x, interval) for x, interval in enumerate(found) if interval is not None]
                if points:
                    axis.errorbar(
                        [x + 0.04 * (offset - 1.5) for x, _ in points],
                        [interval.mean for _, interval in points],
                        np.transpose([(x.mean - x.low, x.high - x.mean) for _, x in points]),
                        fmt='o-',
                        capsize=3,
                        markersize=4,
                        label=objective,
                    )
            axis.set_xticks(range(len(values)), [f'{value:g}' for value in values])
            axis.set(title=estimator, xlabel=AXES[name], ylim=(0, 1))
            axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel('success on held-out problems')
    return figure


def varying(rows: list[dict]) -> dict[str, list]:
    """The values of each axis that has several; of the learning rate if none has."""
    values = {name: sorted({row[name] for row in rows}) for name in AXES}
    return {name: found for name, found in values.items() if len(found) > 1} or {
        'learning_rate': values['learning_rate']
    }


def table(rows: list[dict]) -> str:
    """Success of every method at every setting, in Markdown."""
    methods = dict.fromkeys(row['method'] for row in rows)
    kinds = varying(rows)
    cells = [dict(zip(kinds, values, strict=True)) for values in product(*kinds.values())]
    lines = [f'| {AXES[name]} | ' + ' | '.join(f'{cell[name]:g}' for cell in cells) + ' | all |' for name in kinds]
    lines.insert(1, '| --- ' * (len(cells) + 2) + '|')
    for method in methods:
        found = [success_of(rows, method=method, **cell) for cell in cells]
        found.append(success_of(rows, method=method))
        shown = [f'{x.mean:.3f} ± {(x.high - x.low) / 2:.3f}' if x is not None else '' for x in found]
        lines.append(f'| {method.replace("/", ", ")} | ' + ' | '.join(shown) + ' |')
    return '\n'.join(lines) + '\n'
