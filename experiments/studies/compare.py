"""Many short runs that share a model, data and compiled programs, by one process or several."""

import fcntl
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.evaluate import summarise
from experiments.plumbing.claims import claimed
from experiments.plumbing.gin_files import Config
from experiments.studies.compare_report import bounds_shown
from experiments.studies.compare_suites import MISSING, Setting, Suite, bounds_of, read
from experiments.train import training_step
from experiments.warm_start import warm_start
from troll_jax.collect import make_collector
from troll_jax.evaluate import evaluate
from troll_jax.experiment import Experiment
from troll_jax.learn import Learner
from troll_jax.rewards.pool import Grader
from troll_jax.settings import Compute, Method, Sampling, check_together


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
        self.evaluator = sampler(samples_per_prompt=suite.samples)
        self.sampler = cache(
            lambda precision: sampler(
                samples_per_prompt=sampling.samples_per_prompt,
                support_size=sampling.support_size,
                support_mass=sampling.support_mass,
                precision=precision,
            )
        )
        self.learner = lru_cache(8)(self._learner)  # the system limits how much compiled code a process may map

    def _learner(self, method: str, bound: str, lag: int) -> Learner:
        """The learner of a method. The learning rate is part of its optimizer's state: one program for all."""
        settings = read(self.suite.task, method, bound).build(Method)
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

    def run(self, setting: Setting) -> dict:
        """Trains from the start model, and evaluates what comes out."""
        begin = time.perf_counter()
        learner = self.learner(setting.method, setting.bound, setting.lag)
        sampling = replace(
            self.sampling, prompts_per_step=learner.method.minibatch_prompts * setting.staleness, seed=setting.seed
        )
        collect = make_collector(
            self.sampler(setting.precision),
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
                'skipped': mean('skipped'),
                'seconds': round(time.perf_counter() - begin, 1),
            }
            | {name: mean(name) for name in sorted(x.removeprefix('update/') for x in rows[0] if 'constrained' in x)}
            | critic
        )


def run_all(suite: Suite, folder: Path, methods: Sequence[str], seeds: int, processes: int = 1) -> None:
    """Makes the runs of a suite that `results.jsonl` lacks; first those that choose bounds, then those they decide on.

    No process makes a run that another one is at, of this command or of the same one started twice. One that dies
    leaves its run to the others.

    Raises:
      ValueError: settings that contradict each other, before any run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not missing(suite, methods, seeds, read_results(folder / 'results.jsonl')):
        return
    config = Config([suite.task])
    experiment, sampling, compute = (config.build(kind) for kind in (Experiment, Sampling, Compute))
    for method in methods:
        for bound in bounds_of(method) if suite.choosing else ['']:
            settings = read(suite.task, method, bound).build(Method)
            check_together(sampling, settings, compute, experiment.max_length)
    with (folder / 'results.lock').open('w') as locks, claimed(locks, 'start model', wait=True):
        if suite.model and not Path(experiment.model).exists():
            Config([suite.model], commands=[warm_start]).function(warm_start)()
    arguments = suite, folder, methods, seeds, processes
    helpers = [get_context('spawn').Process(target=work, args=arguments) for _ in range(processes - 1)]
    for helper in helpers:
        helper.start()
    work(*arguments)
    for helper in helpers:
        helper.join()


def work(suite: Suite, folder: Path, methods: Sequence[str], seeds: int, processes: int) -> None:
    """Makes the missing runs that no other process is at, until there are none."""
    path = folder / 'results.jsonl'
    left = lambda: time_left(suite, methods, seeds, read_results(path), processes)
    config = Config([suite.task])
    experiment, sampling, compute = (config.build(kind) for kind in (Experiment, Sampling, Compute))
    print(left(), flush=True)
    with (
        (folder / 'results.lock').open('w') as locks,
        compute.grader(experiment.task) as grader,
        jax.set_mesh(compute.mesh),
    ):
        bench = Bench(suite, experiment, sampling, compute, grader)
        while todo := missing(suite, methods, seeds, read_results(path)):
            for wait in (False, True):  # first what nobody is at, then what another process may have left
                for setting in todo:
                    with claimed(locks, setting, wait) as mine:
                        if mine and setting not in finished(read_results(path)):
                            row = bench.run(setting)
                            add_result(path, row)
                            print(f'{setting}: {row["success"]:.3f} in {row["seconds"]} s; {left()}', flush=True)


def missing(suite: Suite, methods: Sequence[str], seeds: int, rows: list[dict]) -> list[Setting]:
    """The runs that can be made: those that choose bounds, or if they are all there, those that are reported."""
    done = finished(rows)
    lacks = lambda bounds, seeds: [setting for setting in suite.runs(bounds, seeds) if setting not in done]
    tried = {method: bounds_of(method) for method in methods if len(bounds_of(method)) > 1}
    return lacks(tried, suite.choosing_seeds()) or lacks(
        {method: bounds_shown(suite, rows, method) for method in methods}, suite.reported_seeds(seeds)
    )


def time_left(suite: Suite, methods: Sequence[str], seeds: int, rows: list[dict], processes: int) -> str:
    """How many runs are missing, at most, and how long they take by the mean of those that were made."""
    todo = missing(suite, methods, seeds, rows)
    runs, seconds = len(todo), [row['seconds'] for row in rows]
    if todo and todo[0].seed in suite.choosing_seeds():
        runs += seeds * len(suite.cells()) * sum(min(len(bounds_of(method)), 2) for method in methods)
    if not seconds:
        return f'{runs} runs to go; the first tells how long they take'
    return f'{runs} runs to go, about {timedelta(seconds=round(runs * np.mean(seconds) / processes))}'


def add_result(path: Path, row: dict) -> None:
    with path.open('ab+') as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.seek(max(file.seek(0, 2) - 1, 0))
        after_a_crash = file.read(1) not in (b'', b'\n')
        file.write(b'\n' * after_a_crash + json.dumps(row, ensure_ascii=False).encode() + b'\n')


def read_results(path: Path) -> list[dict]:
    """The runs of a file. A line that a crash left incomplete is none."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(MISSING | json.loads(line))
        except ValueError:
            continue
    return rows


def finished(rows: list[dict]) -> set[Setting]:
    return {Setting(*(row[name] for name in Setting._fields)) for row in rows}
