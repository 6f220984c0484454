"""Speed of sampling on a CPU: continuous batching, the same engine with static batches, and transformers; one run.

    python -m experiments.benchmarks.rollout [--slots 64] [--repeats 3]

The model is a Qwen3 of 4 layers and width 256 with a vocabulary of 32,768 and random weights, the same in all, in
float32. 64 prompts of 16 to 64 tokens get 8 samples each at temperature 1. Random weights end no response at a useful
rate, so every response gets its length beforehand: log-normal (σ = 1) with a long tail, cut at 192 tokens; in the
second part all have the mean of those. Compared are, by the tokens that were asked for per second,

- ours: all requests in one queue for `--slots` slots, with the record of what was sampled from (64 tokens of every
  distribution) that training needs;
- static: the same engine, given `--slots` requests at a time, so that none can be refilled: a batch takes as long as
  its longest response;
- transformers: `generate` in PyTorch in such batches, with padding on the left and a dynamic cache, no record. It runs
  to the longest response of its batch as well; what it samples past the others' lengths is not counted.

The floor is the time that one pass over the weights and the live cache takes in every decode step (a response's own
tokens, and its prompt's once for all its samples) at the memory bandwidth measured here. Compilation is not counted,
nor is a warm-up of transformers. Times are medians of `--repeats` runs, all kinds in turn; transformers runs once, as
it takes long. The last line of the output is one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from experiments.benchmarks.measure import KEPT, copy_bandwidth, decode_bytes, random_prompts, timed
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.rollout import Sampler
from troll_jax.types import Prompts

PROMPTS, SAMPLES, SHORTEST_PROMPT, LONGEST_PROMPT = 64, 8, 16, 64
MEDIAN, LONGEST = 12, 192  # tokens of a response


def random_model():
    """Our config and parameters, and the PyTorch model that they are of."""
    config = Qwen3Config(
        vocab_size=32_768,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        tie_word_embeddings=True,
        architectures=['Qwen3ForCausalLM'],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return *load_pretrained(folder, compute_dtype='float32'), model


def generate(model, prompts: Prompts, limits: np.ndarray, batch: int) -> None:
    """Samples all responses with transformers, `batch` of them at a time."""
    tokens, lengths = (np.asarray(x) for x in prompts)
    for start in range(0, PROMPTS, batch // SAMPLES):
        some = slice(start, start + batch // SAMPLES)
        width = lengths[some].max()
        rows = np.zeros((len(lengths[some]), width), np.int64)
        mask = np.zeros_like(rows)
        for row, (prompt, length) in enumerate(zip(tokens[some], lengths[some], strict=True)):
            rows[row, width - length :] = prompt[:length]
            mask[row, width - length :] = 1
        with torch.inference_mode():
            model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                max_new_tokens=int(limits[start * SAMPLES : start * SAMPLES + batch].max()),
                num_return_sequences=SAMPLES,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--slots', type=int, default=64, help='a multiple of 8 that divides 512')
    parser.add_argument('--repeats', type=int, default=3)
    arguments = parser.parse_args()

    config, params, model = random_model()
    prompts = random_prompts(PROMPTS, SHORTEST_PROMPT, LONGEST_PROMPT, LONGEST_PROMPT, config.vocab_size)
    normal = np.random.default_rng(1).normal(size=PROMPTS * SAMPLES)
    limits = np.clip(np.round(MEDIAN * np.exp(normal)), 1, LONGEST).astype(np.int32)
    equal = np.full_like(limits, round(limits.mean()))
    keys = jax.random.split(jax.random.key(1), PROMPTS)
    sample = Sampler(
        config,
        samples_per_prompt=SAMPLES,
        max_response_length=LONGEST,
        temperature=1.0,
        stop_tokens=[config.vocab_size],  # never sampled: the lengths are given
        support_size=KEPT,
        support_mass=1 - 1e-5,
        slots=arguments.slots,
    )
    batch = arguments.slots // SAMPLES

    def ours(limits):
        return sample(params, prompts, keys, jnp.asarray(limits))

    def static(limits):
        for start in range(0, PROMPTS, batch):
            some = slice(start, start + batch)
            part = jax.tree.map(lambda x, some=some: x[some], prompts)
            jax.block_until_ready(
                sample(params, part, keys[some], jnp.asarray(limits[start * SAMPLES : (start + batch) * SAMPLES]))
            )

    theirs = lambda limits: generate(model, prompts, limits, arguments.slots)
    kinds = {
        'ours': (ours, limits),
        'static': (static, limits),
        'ours, equal lengths': (ours, equal),
        'transformers': (theirs, limits),
        'transformers, equal lengths': (theirs, equal),
    }
    tokens = int(limits.sum())
    print(f'{len(limits)} responses of {limits.min()} to {limits.max()} tokens, {limits.mean():.1f} on average')
    first = ours(limits)
    np.testing.assert_array_equal(first.response_lengths, limits)
    static(np.ones_like(limits))
    theirs(np.full_like(limits, 2))
    times = {name: [] for name in kinds}
    for repeat in range(arguments.repeats):
        for name, (run, lengths) in kinds.items():
            if repeat == 0 or run is not theirs:
                times[name].append(timed(run, lengths))
                print(f'{name:28} {times[name][-1]:9.2f} s', flush=True)
    rates = {name: int(lengths.sum()) / statistics.median(times[name]) for name, (_, lengths) in kinds.items()}
    steps = int(first.stats.steps)
    floor = decode_bytes(config, params, prompts, limits, steps) / copy_bandwidth()
    for name, rate in rates.items():
        print(f'{name:28} {rate:9.0f} tokens/s')
    print(
        f'{steps} decode steps, {tokens / (steps * arguments.slots):.0%} of the slots in use; floor '
        f'{1e3 * floor / steps:.2f} of {1e3 * tokens / rates["ours"] / steps:.2f} ms per step'
    )
    result = {
        'speedup_vs_static': rates['ours'] / rates['static'],
        'speedup_vs_transformers': rates['ours'] / rates['transformers'],
        'speedup_vs_transformers_equal_lengths': rates['ours, equal lengths'] / rates['transformers, equal lengths'],
        'share_of_floor': floor * rates['ours'] / tokens,
        'tokens_per_second': rates,
        'steps': steps,
        'device': jax.devices()[0].device_kind,
        'cores': os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
