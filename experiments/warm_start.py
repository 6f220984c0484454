"""Builds the small model of the quickstart and teaches it, by supervised learning, to answer some problems.

    python -m experiments.warm_start configs/arithmetic_model.gin ['warm_start.seed = 1' …]

The result is a folder in Hugging Face format like any other model: config, safetensors, tokenizer with chat template.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3Config

from experiments.plumbing.command import read_command_line, run_command
from experiments.plumbing.run import check_writable
from troll_jax.data.prompts import PromptSet, batch_indices, encode_prompts
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic, demonstration
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.evaluate import evaluate
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.head import logits
from troll_jax.models.hf_weights import save_pretrained
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import make_sampler
from troll_jax.sharding import make_mesh

logger = logging.getLogger(__name__)


def warm_start(
    folder: str,
    task: Arithmetic,
    *,
    width: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    mlp_width: int = 192,
    worked_share: float = 0.25,
    learning_rate: float = 3e-3,
    batch: int = 128,
    accuracy: float = 0.95,
    mixed_steps: int = 150,
    max_steps: int = 2000,
    seed: int = 0,
) -> None:
    """Trains a new model on demonstrations and saves it.

    First all demonstrations are worked, until the model gets nearly all of a batch right; then some of them only give
    the answer. The model that comes out knows how to work a problem and seldom does: reinforcement learning has
    something to find out, and something to build on.

    Args:
      folder: folder to write the model to.
      task: task whose training problems are demonstrated.
      width, layers, heads, kv_heads, head_dim, mlp_width: sizes of the model.
      worked_share: share of demonstrations in the second part that show the running values before the answer.
      learning_rate: rate after a linear warm-up of 50 steps; falls to zero in the second part.
      batch: demonstrations per step.
      accuracy: share of a batch's worked answers that must be right, from beginning to end, for the first part to end.
      mixed_steps: optimizer steps of the second part.
      max_steps: limit of optimizer steps of the first part.
      seed: seed of weights, data order and demonstrations.

    Raises:
      ValueError: a number that makes no sense.
      RuntimeError: the first part has not ended after `max_steps`.
    """
    above_zero = {'width': width, 'layers': layers, 'heads': heads, 'kv_heads': kv_heads, 'head_dim': head_dim}
    above_zero |= {'mlp_width': mlp_width, 'batch': batch, 'learning_rate': learning_rate, 'max_steps': max_steps}
    for name, value in above_zero.items():
        check_range(name, value, is_positive, 'above 0')
    for name, value in {'mixed_steps': mixed_steps, 'seed': seed}.items():
        check_range(name, value, is_not_negative, 'at least 0')
    for name, share in {'worked_share': worked_share, 'accuracy': accuracy}.items():
        check_range(name, share, lambda x: 0 <= x <= 1, 'a share, from 0 to 1')
    check_writable(folder)
    tokenizer = character_tokenizer(CHARACTERS)
    prompt_room, response_room = 2 * task.operands, task.operands + 2
    hf_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp_width,
        max_position_embeddings=prompt_room + response_room,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=['Qwen3ForCausalLM'],
        dtype='float32',
    )
    config = decoder_config(hf_config, compute_dtype='float32')
    graphdef, _ = decoders.abstract(config)
    params = decoders.init(config, jax.random.key(seed))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, tokens, mask, rate):
        """Returns the share of the batch's answers that are right from beginning to end, too."""

        def loss(params):
            rows, length = tokens.shape
            positions = jnp.broadcast_to(jnp.arange(length - 1, dtype=jnp.int32), (rows, length - 1))
            decoder = decoders.bind(graphdef, params)
            hidden = decoder(tokens[:, :-1], positions, jnp.ones_like(positions))
            scores = logits(hidden, decoder.unembedding, temperature=1.0, dtype=config.compute_dtype)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
            right = jnp.all((jnp.argmax(scores, axis=-1) == tokens[:, 1:]) | ~mask[:, 1:], axis=1)
            return jnp.sum(losses * mask[:, 1:]) / jnp.sum(mask[:, 1:]), jnp.mean(right)

        gradients, right = jax.grad(loss, has_aux=True)(params)
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        return jax.tree.map(lambda p, change: p - rate * change, params, changes), opt_state, right

    sequences = {worked: _demonstrations(task, tokenizer, worked) for worked in (True, False)}

    def demonstrations(step: int, share: float) -> list[np.ndarray]:
        rows = batch_indices(len(sequences[True][0]), batch, seed=seed, step=step)
        worked = np.random.default_rng([seed, step]).random(batch)[:, None] < share
        return [np.where(worked, sequences[True][i][rows], sequences[False][i][rows]) for i in range(2)]

    opt_state = optimizer.init(params)
    right = 0.0
    progress = tqdm(range(max_steps), unit='step', desc='learning to work', disable=None)
    for step in progress:
        rate = learning_rate * min(1.0, step / 50)
        params, opt_state, right = update(params, opt_state, *demonstrations(step, share=1.0), rate)
        if step % 10 == 0:
            progress.set_postfix(right=f'{float(right):.2f}')
            if right >= accuracy:
                break
    else:
        raise RuntimeError(
            f'after {max_steps} steps {float(right):.0%} of the worked answers were right; expected {accuracy:.0%}. '
            'Raise max_steps, or change learning_rate or the sizes of the model.'
        )
    for i in tqdm(range(mixed_steps), unit='step', desc='answering', disable=None):
        rate = learning_rate * (1 - i / mixed_steps)
        params, opt_state, _ = update(params, opt_state, *demonstrations(step + 1 + i, share=worked_share), rate)

    save_pretrained(folder, params, hf_config)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    held_out = encode_prompts(task.load('test'), tokenizer, max_length=prompt_room)
    _report(config, params, held_out, tokenizer, task, response_room)


def _demonstrations(task: Arithmetic, tokenizer, worked: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, S] of problem, demonstration and end of sequence; and which of them are to be learnt."""
    problems = task.problems('train')
    texts = [problem + demonstration(problem, worked) + tokenizer.eos_token for problem in problems]
    encoded = tokenizer(texts, padding='max_length', max_length=3 * task.operands + 2, return_tensors='np')
    tokens = encoded['input_ids'].astype(np.int32)
    positions = np.arange(tokens.shape[1])
    return tokens, encoded['attention_mask'].astype(bool) & (positions >= 2 * task.operands)


def _report(config, params, held_out: PromptSet, tokenizer, task: Arithmetic, response_room: int) -> None:
    sampler = make_sampler(
        config,
        samples_per_prompt=1,
        max_response_length=response_room,
        temperature=1.0,
        stop_tokens=[tokenizer.eos_token_id],
        support_size=1,
        support_mass=1.0,
    )
    with Grader(task.grade, deadline=task.deadline) as grader:
        result = evaluate(sampler, params, held_out, grader, tokenizer, jax.random.key(0), mesh=make_mesh())
    rewards = result.rewards[:, 0]
    worked = np.array([len(responses[0]) > 2 for responses in result.responses])
    logger.info(
        'success %.3f on held-out problems; %.0f %% of the answers are worked, %.3f of those and %.3f of the bare ones '
        'are right',
        rewards.mean(),
        100 * worked.mean(),
        rewards[worked].mean() if worked.any() else 0.0,
        rewards[~worked].mean() if not worked.all() else 0.0,
    )


def main() -> None:
    config = read_command_line(__doc__, [warm_start])
    command = config.function(warm_start)
    config.check_used()
    command()
    logger.info('saved %s', command.keywords['folder'])


if __name__ == '__main__':
    run_command(main)
