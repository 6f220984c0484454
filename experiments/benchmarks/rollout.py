"""Speed of sampling: continuous batching, the same engine with static batches, and transformers; one run.

    python -m experiments.benchmarks.rollout [--slots 64] [--median 12] [--longest 192] [--kept 64] [--repeats 3]

The model is a Qwen3 of 4 layers and width 256 with a vocabulary of 32,768 and random weights, the same in all, float32
on a CPU; with `--model FOLDER` it has the sizes of that folder's config.json. 64 prompts of 16 to 64 tokens get 8
samples each at temperature 1. Random weights end no response at a useful rate, so every response gets its length
beforehand: log-normal (σ = 1) with a long tail, cut at `--longest`; in the second part all have the mean of those.
Compared are, by the tokens that were asked for per second,

- ours: all requests in one queue for `--slots` slots, with the record of what was sampled from (`--kept` tokens of
  every distribution) that training needs;
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
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from experiments.benchmarks.measure import copy_bandwidth, decode_bytes, random_prompts
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_pretrained
from troll_jax.rollout import Sampler
from troll_jax.types import Prompts

PROMPTS, SAMPLES, SHORTEST_PROMPT, LONGEST_PROMPT = 64, 8, 16, 64


def hf_config(folder: str | None):
    if folder is not None:
        return AutoConfig.from_pretrained(folder)
    return Qwen3Config(
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


def random_model(config, with_torch: bool):
    """Our config and parameters; and the PyTorch model that they are of, or None."""
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    if not with_torch:
        ours = decoders.with_best_kernels(decoder_config(config, compute_dtype=dtype), jax.devices()[0])
        return ours, decoders.init(ours, jax.random.key(0)), None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours, params = load_pretrained(folder, compute_dtype=dtype)
        return decoders.with_best_kernels(ours, jax.devices()[0]), params, model


def work(vocab_size: int, median: float, longest: int) -> tuple[Prompts, np.ndarray]:
    """Prompts, and the length [64 · 8] of every response."""
    prompts = random_prompts(PROMPTS, SHORTEST_PROMPT, LONGEST_PROMPT, LONGEST_PROMPT, vocab_size)
    normal = np.random.default_rng(1).normal(size=PROMPTS * SAMPLES)
    limits = np.clip(np.round(median * np.exp(normal)), 1, longest)
    return prompts, limits.astype(np.int32)


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
    parser.add_argument('--model', help='a folder whose config.json gives the sizes')
    parser.add_argument('--slots', type=int, default=64, help='a multiple of 8 that divides 512')
    parser.add_argument('--median', type=float, default=12, help='tokens of a response')
    parser.add_argument('--longest', type=int, default=192, help='tokens of a response')
    parser.add_argument('--kept', type=int, default=64, help='tokens that are recorded of every distribution')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--without-transformers', action='store_true')
    arguments = parser.parse_args()

    config, params, model = random_model(hf_config(arguments.model), not arguments.without_transformers)
    prompts, limits = work(config.vocab_size, arguments.median, arguments.longest)
    keys = jax.random.split(jax.random.key(1), PROMPTS)
    sample = Sampler(
        config,
        samples_per_prompt=SAMPLES,
        max_response_length=arguments.longest,
        temperature=1.0,
        stop_tokens=[config.vocab_size],  # never sampled: the lengths are given
        support_size=arguments.kept,
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

    equal = np.full_like(limits, round(limits.mean()))
    tokens = int(limits.sum())
    print(f'{len(limits)} responses of {limits.min()} to {limits.max()} tokens, {limits.mean():.1f} on average')
    first = ours(limits)
    np.testing.assert_array_equal(first.response_lengths, limits)
    static(np.ones_like(limits))
    programs = (sample.begin, sample.prefill, sample.decode)
    compiled = sum(program._cache_size() for program in programs)
    kinds = {
        'ours': (lambda: ours(limits), limits),
        'static': (lambda: static(limits), limits),
        'ours, equal lengths': (lambda: ours(equal), equal),
    }
    if model is not None:
        generate(model, prompts, np.full_like(limits, 2), arguments.slots)
        kinds |= {
            'transformers': (lambda: generate(model, prompts, limits, arguments.slots), limits),
            'transformers, equal lengths': (lambda: generate(model, prompts, equal, arguments.slots), equal),
        }
    times = {name: [] for name in kinds}
    for repeat in range(arguments.repeats):
        for name, (run, _) in kinds.items():
            if repeat and name.startswith('transformers'):
                continue
            begin = time.perf_counter()
            result = jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
            if name == 'ours':
                spent = result.stats
            print(f'{name:28} {times[name][-1]:9.2f} s', flush=True)
    rates = {name: int(lengths.sum()) / statistics.median(times[name]) for name, (_, lengths) in kinds.items()}
    result = {'speedup_vs_static': rates['ours'] / rates['static']}
    if model is not None:
        ours_equal, theirs_equal = rates['ours, equal lengths'], rates['transformers, equal lengths']
        result['speedup_vs_transformers'] = rates['ours'] / rates['transformers']
        result['speedup_vs_transformers_equal_lengths'] = ours_equal / theirs_equal
    steps = int(spent.steps)
    floor = decode_bytes(config, params, prompts, limits, steps) / copy_bandwidth()
    result['share_of_floor'] = floor * rates['ours'] / tokens
    for name, rate in rates.items():
        print(f'{name:28} {rate:9.0f} tokens/s')
    print(
        f'{steps} decode steps, {tokens / (steps * arguments.slots):.0%} of the slots in use; floor '
        f'{1e3 * floor / steps:.2f} of {1e3 * tokens / rates["ours"] / steps:.2f} ms per step'
    )
    result |= {
        'tokens_per_second': rates,
        'steps': steps,
        'prefill_seconds': spent.prefill_seconds,
        'decode_seconds': spent.decode_seconds,
        'compiled_after_warm_up': sum(program._cache_size() for program in programs) - compiled,
        'device': jax.devices()[0].device_kind,
        'cores': os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
