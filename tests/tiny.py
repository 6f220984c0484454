"""Models that are small enough for tests, and whether cuDNN is installed."""

import sysconfig
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, set_seed

from troll_jax.models.decoder import DecoderConfig

CUDNN = list(Path(sysconfig.get_path('purelib')).glob('nvidia/cudnn/lib/libcudnn.so*'))


def decoder_config(vocab_size: int, **sizes) -> DecoderConfig:
    """Two layers in float32, of grouped heads, and no size like another."""
    defaults = {'width': 12, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'head_dim': 6, 'mlp_width': 22}
    defaults |= {'rope_theta': 1e4, 'norm_eps': 1e-6, 'tied_embeddings': False, 'compute_dtype': 'float32'}
    return DecoderConfig(vocab_size=vocab_size, **defaults | sizes)


def save_qwen3(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **sizes) -> str:
    """A folder with random weights as transformers writes it, and its tokenizer; returns its name."""
    defaults = {'vocab_size': len(tokenizer), 'eos_token_id': tokenizer.eos_token_id, 'max_position_embeddings': 64}
    defaults |= {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2}
    defaults |= {'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 8}
    set_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**defaults | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
