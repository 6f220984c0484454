"""Trains a language model from verifiable rewards. Start here: `train` is the whole algorithm.

    troll train quickstart troll ['Run.steps = 20' 'troll.bound = 0.1' …]
    troll train quickstart gspo    # a task, then a method

Five frozen dataclasses are its settings (troll_jax/experiment.py, troll_jax/settings.py). Experiment, Sampling and
Method decide what is learnt; Compute and Run never do, so they may change when a run resumes. A notebook builds the
five values and calls `train`. A run's folder: docs/watching_a_run.md; several hosts: docs/multi_host.md.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax

from experiments.plumbing.command import read_command_line, run_command
from experiments.plumbing.names import SETTINGS
from experiments.plumbing.progress import tell_where_to_look
from experiments.plumbing.run import Interrupted, TrainingRun, warn_of_noise
from experiments.plumbing.trace import trace_programs
from experiments.plumbing.validation import make_validation, metrics_of
from troll_jax.collect import Experience, make_collector
from troll_jax.data.prompts import draw_indices
from troll_jax.experiment import Experiment
from troll_jax.learn import Learner, Updated, summarise
from troll_jax.rewards.terms import read_rows
from troll_jax.settings import Compute, Method, Run, Sampling, check_together
from troll_jax.types import TrainState


def train(experiment: Experiment, sampling: Sampling, method: Method, compute: Compute, run: Run) -> bool:
    """Repeats: sample and grade, score, assign advantages, update by minibatches. False if a signal interrupts it.

    Args:
      experiment: model, task, lengths and validation sets.
      sampling: prompts per step, samples per prompt, temperature, seed, and the support that is recorded.
      method: rewards, advantages, loss, regularisers, critic, optimizer and minibatch size.
      compute: mesh, kernels and memory budgets.
      run: folder, number of steps, evaluation, checkpoints and logging.

    Raises:
      ValueError: settings that contradict each other, before any weight is loaded.
    """
    check_together(sampling, method, compute, experiment.max_length)
    training = TrainingRun((experiment, sampling, method), compute, run)
    model = experiment.load_model(compute, method.lora)  # tokenizer and sizes; no weights yet
    prompts = experiment.load_prompts('train', model.tokenizer, keep_rows=read_rows(method.rewards))
    # An error if there are too few.
    draw_indices(prompts, sampling.prompts_per_step, seed=sampling.seed, draw=0, level=sampling.level)

    samplers = cache(partial(model.sampler, compute))
    sampler = samplers(
        samples_per_prompt=sampling.samples_per_prompt,
        temperature=sampling.temperature,
        support_size=sampling.support_size,
        support_mass=sampling.support_mass,
        precision=sampling.precision,
    )
    greedy_sampler = samplers(samples_per_prompt=1, temperature=0.0, top_p=None, precision=sampling.precision)
    learner = Learner(
        model.config,
        sampling,
        method,
        compute,
        max_prompt_length=experiment.max_prompt_length,
        max_response_length=experiment.max_response_length,
    )
    sampling_of = experiment.validation_sampling
    sampler_of = lambda count: samplers(samples_per_prompt=count, precision=None, **sampling_of(count))
    evaluate = None
    if run.evaluate_every:
        evaluate = make_validation(experiment, model.tokenizer, sampler_of, compute=compute, trained_on=prompts)
    with training, ThreadPoolExecutor(1) as sampling_thread, compute.grader(experiment.task) as grader:
        grader.start()
        trace_programs(sampler, learner, sampling, method, prompts)
        validate = lambda params: metrics_of(evaluate(params, jax.random.key(sampling.seed), grader))
        state = training.start(learner, model, prompts.content, validate)
        collect = make_collector(
            sampler,
            prompts,
            grader,
            model.tokenizer,
            sampling,
            max_response_length=experiment.max_response_length,
            rewards=method.rewards,
            mesh=compute.rollout_mesh,
            learner_mesh=compute.mesh,
            greedy_sampler=greedy_sampler if method.needs_greedy_reward else None,
            sampling_thread=sampling_thread if compute.overlap and compute.rollout_devices else None,
            check=training.check_signals,
        )
        ahead = None
        for step in training.steps():
            # B groups of G graded responses by the current policy, or an earlier one. Dynamic sampling happens here.
            draws = int(state.progress.draws)
            experience = (ahead or collect(*learner.hand_over(state), draws))()
            ahead = None
            if compute.overlap and step < run.steps:  # graded while the update runs; on devices of its own sampled too
                ahead = collect(*learner.hand_over(state, ahead=True), draws + experience.draws)
            state, row, updates = training_step(learner, state, experience, partial(training.save_rollout, step))
            if method.old_policy == 'rollout':
                warn_of_noise(row)
            if ahead and jax.process_count() > 1:  # what follows is for all devices, also those that sample
                ahead.end_rollout(everywhere=Interrupted)
            training.record(step, state, row, updates, experience)
    return not training.interrupted


def training_step(
    learner: Learner, state: TrainState, experience: Experience, save=lambda batches: None
) -> tuple[TrainState, dict[str, float], list[Updated]]:
    """One step of the algorithm on one rollout batch: the new state, metrics, and those of each update.

    Args:
      learner: pieces of the step.
      state: state before it, which is consumed.
      experience: graded responses, by `learner.sampling_params(state)`.
      save: is given the minibatches before the first update.
    """
    begin, step, method = time.perf_counter(), int(state.progress.step), learner.method
    # Forward passes before any parameter changes: recomputed π_old, the reference model, the critic.
    scored = learner.score(state, learner.pack(experience.rollout, experience.graded))
    # Advantages per group of samples; or per token, by GAE. Whitened over the rollout batch if the method asks for it.
    batches, metrics = learner.assign_advantages(scored, experience)
    save(batches)
    state = learner.keep_policy(state)  # for Sampling.lag
    # One optimizer step per minibatch. All but the first are off-policy: here the trust region acts.
    updates, scored = [], None  # a minibatch leaves the devices after its update
    while batches:
        state, updated = learner.update(state, batches.pop(0), critic_only=step < method.critic_warmup_steps)
        updates.append(updated)
    state = learner.end_step(state, experience.draws)  # progress; the policy becomes the reference when that is due

    row = experience.metrics | summarise(updates, learner.lag) | metrics
    seconds = time.perf_counter() - begin
    tokens = int(experience.rollout.response_lengths.sum())
    return state, row | {'update/tokens_per_second': tokens / seconds, 'seconds/update': seconds}, updates


def main() -> None:
    config = read_command_line(__doc__)
    settings = [config.build(kind) for kind in SETTINGS]
    config.check_used()
    train(*settings)
    tell_where_to_look(settings[-1])


if __name__ == '__main__':
    run_command(main)
