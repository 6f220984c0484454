"""Exported folders in both major versions of transformers: each gives the logits and token ids that we compute."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_decoder import FAMILIES, bind, forward, from_zero, some_tokens, tiny_hf_config, tiny_torch_model
from test_gguf import TEXTS, tiny, write_gguf

from troll_jax.data.tasks.arithmetic import CHARACTERS
from troll_jax.data.tokenizer import character_tokenizer, load_tokenizer, save_tokenizer
from troll_jax.models.decoder import abstract
from troll_jax.models.hf_weights import load_config, load_pretrained, save_pretrained

OTHER_VERSION = ['transformers==4.57.*', 'huggingface_hub<1', 'tokenizers<0.23']
OPEN = """
import json, sys, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
root, cases = sys.argv[1], json.loads(sys.argv[2])
out = {}
for name in cases['models']:
    model, info = AutoModelForCausalLM.from_pretrained(f'{root}/{name}', output_loading_info=True)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    with torch.no_grad():
        out[name] = model.float()(torch.tensor(cases['tokens'])).logits.numpy()
np.savez(f'{root}/logits.npz', **out)
ids = {}
for name, texts in cases['texts'].items():
    tokenizer = AutoTokenizer.from_pretrained(f'{root}/{name}')
    chat = tokenizer.apply_chat_template([{'role': 'user', 'content': texts[0]}], tokenize=False)
    ids[name] = [tokenizer(texts)['input_ids'], chat, tokenizer.eos_token_id]
print(json.dumps([transformers.__version__, ids]))
"""


@pytest.fixture(scope='session')
def transformers_4(pytestconfig):
    """A folder with transformers 4 and what it needs, in pytest's cache; all else is of this environment."""
    folder = pytestconfig.cache.mkdir('transformers_4')
    if not (folder / 'transformers').is_dir():
        install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(folder)]
        result = subprocess.run([*install, *OTHER_VERSION], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f'pip cannot install {OTHER_VERSION}: {result.stderr.strip().splitlines()[-1]}')
    return str(folder)


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """Folders of every family and of a GGUF file, with the logits of ours for the same tokens; two tokenizers."""
    root = tmp_path_factory.mktemp('exports')
    tokens, logits = np.asarray(some_tokens(2, 41)), {}

    def save(name, source):
        hf_config = load_config(source)
        config, params = load_pretrained(source, compute_dtype='float32')
        save_pretrained(root / name, params, hf_config, dtype='float32')
        graphdef, _ = abstract(config)
        hidden = forward(graphdef, params, tokens, from_zero(2, 41), np.ones((2, 41), np.int32))
        logits[name] = np.asarray(hidden @ bind(graphdef, params).unembedding.T)

    for architecture in FAMILIES:
        model = tiny_torch_model(tiny_hf_config(architecture=architecture))
        for name, param in model.named_parameters():
            if 'act_fn' in name:  # which transformers 4 reads as bfloat16, whatever the file's dtype
                param.data = param.data.bfloat16().float()
        model.save_pretrained(root / 'source' / architecture)
        save(architecture, root / 'source' / architecture)
    for name, pre in {'qwen3': 'qwen2', 'llama 3.1': 'llama-bpe'}.items():
        file = str(write_gguf(root / f'{name}.gguf', tiny(name), pre=pre))
        save(name, file)
        save_tokenizer(root / name, load_tokenizer(file), file)
    save_tokenizer(root / 'characters', character_tokenizer(CHARACTERS))
    return root, tokens, logits


@pytest.mark.parametrize('version', ['5', pytest.param('4.57', marks=pytest.mark.slow)])
def test_both_versions_open_exports_alike(version, exports, request):
    """Guards RoPE and its scaling, which transformers 4 reads elsewhere, and tokenizers that name classes of 5."""
    root, tokens, logits = exports
    path = request.getfixturevalue('transformers_4') if version == '4.57' else ''
    texts = {name: TEXTS for name in ('qwen3', 'llama 3.1')} | {'characters': ['3*2=6', CHARACTERS]}
    cases = json.dumps({'models': list(logits), 'tokens': tokens.tolist(), 'texts': texts})
    result = subprocess.run(
        [sys.executable, '-c', OPEN, str(root), cases],
        env=os.environ | {'PYTHONPATH': path, 'HF_HUB_OFFLINE': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found, ids = json.loads(result.stdout.splitlines()[-1])
    assert found.startswith(version)
    with np.load(root / 'logits.npz') as theirs:
        for name, expected in logits.items():
            assert np.abs(expected).max() > 1
            np.testing.assert_allclose(theirs[name], expected, atol=1e-4, rtol=0, err_msg=name)
    for name, (of_texts, chat, eos) in ids.items():
        tokenizer = load_tokenizer(str(root / name))
        assert of_texts == tokenizer(texts[name])['input_ids'], name
        assert chat == tokenizer.apply_chat_template([{'role': 'user', 'content': texts[name][0]}], tokenize=False)
        assert eos == tokenizer.eos_token_id
