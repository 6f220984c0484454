"""Shared by the tests of bad input: a small model, and how hypothesis draws.

MORE_BAD_INPUT=10 in the environment draws ten times as many cases, and others at every run.
"""

import os
from pathlib import Path

import jax
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from troll_jax.data.tasks.arithmetic import CHARACTERS
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import save_pretrained

REPOSITORY = Path(__file__).parent.parent

MORE = int(os.environ.get('MORE_BAD_INPUT', 1))


def cases(number: int) -> settings:
    return settings(
        max_examples=number * MORE,
        derandomize=MORE == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def save_model(folder: Path) -> Path:
    """A model whose config names no end of a sequence, and the tokenizer of the arithmetic task, which does."""
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    hf_config = Qwen3Config(
        vocab_size=17,
        intermediate_size=8,
        max_position_embeddings=8,
        architectures=['Qwen3ForCausalLM'],
        dtype='float32',
        **sizes,
    )
    save_pretrained(folder, decoders.init(decoder_config(hf_config), jax.random.key(0)), hf_config)
    character_tokenizer(CHARACTERS).save_pretrained(folder)
    return folder


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a part of it replaced: a file that is cut, torn, or has something else in its middle."""
    ends = st.tuples(st.integers(0, len(content)), st.integers(0, len(content))).map(sorted)
    return st.builds(lambda at, by: content[: at[0]] + by + content[at[1] :], ends, st.binary(max_size=7))


def fresh(folder: Path) -> Path:
    """A name in a folder that is not taken: hypothesis has one temporary folder for all of its cases."""
    return folder / str(len(list(folder.iterdir())))
