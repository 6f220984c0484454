"""Import and export of Hugging Face checkpoints: nothing lost, nothing guessed, nothing unsharded."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_decoder import FAMILIES, some_tokens, tiny_hf_config, tiny_torch_model
from transformers import AutoModelForCausalLM, MistralConfig

from troll_jax.models import hf_weights
from troll_jax.models.decoder import abstract
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config, load_pretrained, save_pretrained
from troll_jax.models.rotary import RopeScaling
from troll_jax.sharding import make_mesh


@pytest.fixture
def folder(tmp_path):
    """A tied float32 checkpoint as transformers writes it."""
    tiny_torch_model(tiny_hf_config()).save_pretrained(tmp_path / 'model')
    return tmp_path / 'model'


def stored(folder) -> dict[str, np.ndarray]:
    return {name: values for file in folder.glob('*.safetensors') for name, values in load_file(file).items()}


def read_config(folder) -> dict:
    return json.loads((folder / 'config.json').read_text())


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f'u{values.dtype.itemsize}')


@pytest.mark.parametrize('architecture', FAMILIES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('max_shard_bytes', [5_000_000_000, 10_000])
def test_import_and_export_return_every_bit(architecture, dtype, tied, max_shard_bytes, tmp_path):
    """Guards names, transposes, layer order, rounding, the dtype of the config, and tied heads written twice."""
    hf_config = tiny_hf_config(tied, architecture, dtype=dtype)
    tiny_torch_model(hf_config).to(getattr(torch, dtype)).save_pretrained(
        tmp_path / 'in', max_shard_size=max_shard_bytes
    )
    _, params = load_pretrained(tmp_path / 'in')
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    save_pretrained(tmp_path / 'out', params, load_config(tmp_path / 'in'), max_shard_bytes=max_shard_bytes)

    before, after = stored(tmp_path / 'in'), stored(tmp_path / 'out')
    assert before.keys() == after.keys() and ('lm_head.weight' in after) == (not tied)
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        np.testing.assert_array_equal(bits(before[name]), bits(after[name]), err_msg=name)
    files = sorted(file.name for file in (tmp_path / 'out').glob('*.safetensors'))
    assert (files == ['model.safetensors']) == (max_shard_bytes > 10_000)
    for file in files:
        tensors = load_file(tmp_path / 'out' / file)
        assert sum(values.nbytes for values in tensors.values()) <= max_shard_bytes or len(tensors) == 1


@pytest.mark.parametrize(
    ('architecture', 'max_shard_bytes'), [('Qwen3ForCausalLM', 5_000_000_000), *((name, 10_000) for name in FAMILIES)]
)
def test_export_opens_in_transformers(architecture, max_shard_bytes, tmp_path):
    """Guards the index file, the metadata and the config: the same logits and texts come out, no weight is made up."""
    folder, out = tmp_path / 'in', tmp_path / 'out'
    tiny_torch_model(tiny_hf_config(architecture=architecture)).save_pretrained(folder)
    _, params = load_pretrained(folder)
    save_pretrained(out, params, load_config(folder), max_shard_bytes=max_shard_bytes)
    tokens = torch.tensor(np.asarray(some_tokens(2, 5)))
    original = AutoModelForCausalLM.from_pretrained(folder)
    reopened, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(reopened(tokens).logits, original(tokens).logits)
        texts = [model.generate(tokens, max_new_tokens=7, pad_token_id=0) for model in (reopened, original)]
    assert torch.equal(*texts)
    config, rope = read_config(out), dict(read_config(folder)['rope_parameters'])
    assert config.pop('rope_theta') == rope.pop('rope_theta')  # where transformers 4 looks for them
    assert config.pop('rope_scaling') == (rope if len(rope) > 1 else None)
    assert config == read_config(folder)


def test_export_replaces_an_earlier_one_and_nothing_else(folder, tmp_path):
    """Guards against weights of two exports in one folder, of which the older would be read."""
    _, params = load_pretrained(folder)
    hf_config, out = load_config(folder), tmp_path / 'out'
    out.mkdir()
    (out / 'tokenizer.json').write_text('{}')
    save_pretrained(out, params, hf_config, max_shard_bytes=10_000)
    save_pretrained(out, params, hf_config, dtype='bfloat16')
    assert sorted(file.name for file in out.iterdir()) == ['config.json', 'model.safetensors', 'tokenizer.json']
    assert str(load_config(out).dtype) == 'torch.bfloat16' and str(hf_config.dtype) == 'torch.float32'
    assert {values.dtype.name for values in stored(out).values()} == {'bfloat16'}
    save_pretrained(out, params, hf_config, max_shard_bytes=10_000)
    assert not (out / 'model.safetensors').exists()


def test_export_that_fails_leaves_the_earlier_one(folder, monkeypatch):
    """Guards against a half-written folder: the disk is full while the new weights are written."""
    _, params = load_pretrained(folder)
    before = stored(folder)

    def full(*args, **kwargs):
        raise OSError('no space left on device')

    monkeypatch.setattr(hf_weights, 'save_file', full)
    with pytest.raises(OSError, match='no space'):
        save_pretrained(folder, jax.tree.map(lambda p: 2 * p, params), load_config(folder))
    assert all(np.array_equal(before[name], values) for name, values in stored(folder).items())


def test_sharded_import_equals_unsharded_and_reads_a_shard_at_a_time(tmp_path, monkeypatch):
    """Guards the slices of transposed and stacked tensors, replicas that read again, unsharded copies on the way."""
    hf_config = tiny_hf_config(tied=False, vocab_size=62, num_attention_heads=4, intermediate_size=46)
    tiny_torch_model(hf_config).save_pretrained(tmp_path)
    _, plain = load_pretrained(tmp_path)

    placed, mappings = [], Path('/proc/self/maps')
    device_put = jax.device_put

    def put(values, device):
        placed.append(values)
        assert not mappings.exists() or str(tmp_path) not in mappings.read_text()  # what is mapped counts as memory
        return device_put(values, device)

    monkeypatch.setattr(jax, 'device_put', put)
    mesh = make_mesh(2, 2, 2)
    config, params = load_pretrained(tmp_path, mesh=mesh)

    jax.tree.map(np.testing.assert_array_equal, plain, params)
    for param, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(abstract(config, mesh)[1]), strict=True):
        assert param.sharding.is_equivalent_to(leaf.sharding, param.ndim)
    shapes = {'gate': (3, 17, 23), 'down': (3, 23, 17), 'query': (3, 17, 20), 'key': (3, 17, 10)}
    layers = params['layers']['mlp'] | params['layers']['attention']
    assert {name: layers[name].addressable_shards[0].data.shape for name in shapes} == shapes
    assert params['embedding'].addressable_shards[0].data.shape == (31, 17)
    assert max(values.nbytes for values in placed) == 3 * 17 * 23 * 4
    gates = [values for values in placed if values.shape == shapes['gate']]
    assert len(gates) == 16 and len({id(values) for values in gates}) == 8  # gate and up, each of four shards read once


def test_export_of_sharded_parameters_equals_that_of_whole_ones(tmp_path):
    """Guards the gathering of one layer from its shards."""
    hf_config = tiny_hf_config(tied=False, vocab_size=62, num_attention_heads=4, intermediate_size=46)
    tiny_torch_model(hf_config).save_pretrained(tmp_path / 'in')
    _, params = load_pretrained(tmp_path / 'in', mesh=make_mesh(2, 2, 2))
    save_pretrained(tmp_path / 'out', params, hf_config)
    before, after = stored(tmp_path / 'in'), stored(tmp_path / 'out')
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def rewrite(folder, change) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def test_every_wrong_tensor_is_named(folder):
    """Guards against a partial import: one error lists all that is missing, unknown, misshapen or quantised."""

    def spoil(tensors):
        del tensors['model.layers.1.mlp.up_proj.weight']
        tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(60, np.float32)
        tensors['model.norm.weight'] = np.zeros(35, np.float32)
        tensors['model.layers.2.mlp.down_proj.weight'] = np.zeros((34, 47), np.int8)

    rewrite(folder, spoil)
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    for line in (
        'model.layers.1.mlp.up_proj.weight: missing, expected [47, 34]',
        'model.layers.0.self_attn.q_proj.bias: got [60], expected no such tensor',
        'model.norm.weight: got shape [35], expected [34]',
        "model.layers.2.mlp.down_proj.weight: got I8, expected one of ('F32', 'BF16', 'F16')",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 5


def test_frequencies_that_old_exports_store_are_derived(folder):
    """Guards against Llama checkpoints of 2023 that do not load, and against other tensors that are let through."""
    frequencies = np.ones(4, np.float32)
    names = [f'model.layers.{i}.self_attn.rotary_emb.inv_freq' for i in range(3)] + ['model.rotary_emb.inv_freq']
    before = load_pretrained(folder)[1]
    rewrite(folder, lambda tensors: tensors.update(dict.fromkeys(names, frequencies)))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(folder)[1], before)
    others = ['model.layers.0.self_attn.rotary_emb.scale', 'model.layers.0.mlp.rotary_emb.inv_freq', 'inv_freq']
    rewrite(folder, lambda tensors: tensors.update(dict.fromkeys(others, frequencies)))
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert str(error.value).count('expected no such tensor') == len(others) == len(str(error.value).splitlines()) - 1


def test_tied_head_that_is_stored_must_be_the_embedding(folder):
    """Guards both sides: published Qwen3 checkpoints store the tied head too, but a different one is not tied."""
    rewrite(folder, lambda tensors: tensors.update({'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}))
    assert 'lm_head' not in load_pretrained(folder)[1]
    rewrite(folder, lambda tensors: tensors['lm_head.weight'].__setitem__((60, 33), 1.0))
    with pytest.raises(ValueError, match='lm_head.weight: got other values'):
        load_pretrained(folder)


def test_older_configs_keep_rope_theta_elsewhere(folder):
    """Guards against a default theta for files written before `rope_parameters` existed."""
    config = read_config(folder)
    del config['rope_parameters']
    (folder / 'config.json').write_text(json.dumps(config | {'rope_theta': 12345.0, 'rope_scaling': None}))
    assert load_pretrained(folder)[0].rope_theta == 12345.0


SLIDING = {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 1, 'layer_types': None}


def read_tiny(architecture: str) -> dict:
    return tiny_hf_config(architecture=architecture).to_dict()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention_bias': True}, 'attention_bias: got True, expected False'),
        ({'hidden_act': 'gelu'}, "hidden_act: got 'gelu', expected 'silu'"),
        (
            {'layer_types': ['full_attention', 'sliding_attention', 'full_attention']},
            r"layer_types: got \['full_attention', 'sliding_attention'\], expected \['full_attention'\]",
        ),
        (
            {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 1e4}},
            "rope_type: got 'linear', expected 'default'",
        ),
        (
            {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5, 'rope_theta': 1e4}},
            r'partial_rotary_factor: got 0.5, expected 1.0',
        ),
        (
            {'architectures': ['MambaForCausalLM']},
            rf"got \['MambaForCausalLM'\], expected one of \[{', '.join(repr(name) for name in sorted(FAMILIES))}\]",
        ),
        ({'architectures': None}, 'unsupported architecture: got None'),
        *[
            (read_tiny(name) | changes, message)
            for name, changes, message in [
                ('Qwen2ForCausalLM', SLIDING, r"layer_types: got \['full_attention', 'sliding_attention'\]"),
                ('SmolLM3ForCausalLM', SLIDING, r"layer_types: got \['full_attention', 'sliding_attention'\]"),
                ('SmolLM3ForCausalLM', {'attention_bias': True}, 'attention_bias: got True, expected False'),
                ('LlamaForCausalLM', {'attention_bias': True}, 'attention_bias: got True, expected False'),
                ('LlamaForCausalLM', {'mlp_bias': True}, 'mlp_bias: got True, expected False'),
                ('ApertusForCausalLM', {'hidden_act': 'silu'}, "hidden_act: got 'silu', expected 'xielu'"),
                ('ApertusForCausalLM', {'attention_bias': True}, 'attention_bias: got True, expected False'),
            ]
        ],
    ],
)
def test_models_that_we_do_not_compute_are_refused(folder, changes, message):
    """Guards against a model that loads, and then computes something else than its authors meant."""
    (folder / 'config.json').write_text(json.dumps(read_config(folder) | changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_constants_of_xielu_must_be_ours(tmp_path):
    """Guards against a checkpoint whose activation is another one. One that was rounded, or left out, is the same."""
    tiny_torch_model(tiny_hf_config(architecture='ApertusForCausalLM')).save_pretrained(tmp_path)
    name = 'model.layers.1.mlp.act_fn.'
    _, params = load_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name + 'eps': np.array([-9.98378e-07], np.float32)}))
    rewrite(tmp_path, lambda tensors: tensors.pop('model.layers.2.mlp.act_fn.eps'))
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(tmp_path)[1])
    rewrite(tmp_path, lambda tensors: tensors.update({name + 'beta': np.array(0.6, np.float32)}))
    rewrite(tmp_path, lambda tensors: tensors.update({name + 'eps': np.zeros(2, np.float32)}))
    with pytest.raises(ValueError, match=r'beta: got 0.60\d*, expected 0.5\n.*eps: got F32 \[2\], expected one number'):
        load_pretrained(tmp_path)


# What is published as the number of parameters that are learnt, a tied head counted once.
PUBLISHED = {
    'qwen3-0.6b': 596_049_920,
    'qwen3-1.7b': 1_720_574_976,
    'qwen3-4b': 4_022_468_096,
    'qwen3-8b': 8_190_735_360,
    'qwen3-14b': 14_768_307_200,
    'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-1.5b': 1_543_714_304,
    'qwen2.5-3b': 3_085_938_688,
    'qwen2.5-7b': 7_615_616_512,
    'llama-3.2-3b': 3_212_749_824,
    'llama-3.1-8b': 8_030_261_248,
    'smollm3-3b': 3_075_098_624,
    'apertus-8b': 8_053_338_176,
}


def test_sizes_for_planning_are_those_of_the_models():
    """Guards config.json files that were written by hand, parameters that a family has too many or too few of, and
    `rope_scaling`, which published files have beside `rope_theta`."""
    models = Path(__file__).parent.parent / 'configs/models'
    configs = {
        folder.name: decoder_config(load_config(folder))
        for folder in models.iterdir()
        if folder.is_dir() and folder.name != '__pycache__'
    }
    count = lambda config: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1]))
    assert {name: count(config) for name, config in configs.items()} == PUBLISHED
    assert configs['llama-3.2-3b'].rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert configs['apertus-8b'].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert [i for i, rotates in enumerate(configs['smollm3-3b'].rope_layers) if not rotates] == list(range(3, 36, 4))


def test_unusable_folders_are_named(folder, tmp_path):
    """Guards the messages that a user meets first; a pickle is never opened."""
    with pytest.raises(FileNotFoundError, match="'no/such' is not a folder, and cannot be had from the hub"):
        load_pretrained('no/such')
    with pytest.raises(FileNotFoundError, match=rf"'{tmp_path}/none' is not a folder: '{tmp_path}' has \['model'\]"):
        load_config(str(tmp_path / 'none'))

    weights = folder / 'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f'{weights} is damaged'):
        load_pretrained(folder)

    weights.unlink()
    (folder / 'pytorch_model.bin').write_bytes(b'a pickle')
    with pytest.raises(FileNotFoundError, match='only safetensors are read, convert the .bin files'):
        load_pretrained(folder)

    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': 'model-1.safetensors'}}))
    with pytest.raises(FileNotFoundError, match='model-1.safetensors is named in model.safetensors.index.json'):
        load_pretrained(folder)

    (folder / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is damaged'):
        load_config(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match=f'no config.json in {folder}'):
        load_pretrained(folder)


def test_export_checks_what_it_is_given(folder, tmp_path):
    """Guards against a folder that opens, with weights of another model in it."""
    _, params = load_pretrained(folder)
    with pytest.raises(ValueError, match="got 'int8'"):
        save_pretrained(tmp_path / 'out', params, load_config(folder), dtype='int8')
    with pytest.raises(ValueError, match=r'norm/scale: got nothing, expected \(34,\)'):
        save_pretrained(tmp_path / 'out', {k: v for k, v in params.items() if k != 'norm'}, load_config(folder))
    with pytest.raises(ValueError, match='unsupported architecture'):
        save_pretrained(tmp_path / 'out', params, MistralConfig(architectures=['MistralForCausalLM']))
    assert not (tmp_path / 'out').exists()


def test_hub_ids_go_to_the_hub_for_safe_files_only(folder, monkeypatch, tmp_path):
    """Guards against downloading pickles or code, and against a mesh or dtype that is dropped on this way."""
    asked = []

    def snapshot(model, allow_patterns):
        asked.append((model, allow_patterns))
        return str(shutil.copytree(folder, tmp_path / 'snapshot', dirs_exist_ok=True))

    monkeypatch.setattr(hf_weights, 'snapshot_download', snapshot)
    config, _ = load_pretrained('some/model', compute_dtype='float32', remat='dots')
    assert (config.compute_dtype, config.remat) == ('float32', 'dots')
    assert load_config('some/model').hidden_size == 34
    assert [model for model, _ in asked] == ['some/model'] * 2
    allowed = {pattern for _, patterns in asked for pattern in patterns}
    assert allowed == {'*.safetensors', '*.json', '*.txt', '*.jinja', 'tokenizer.model'}
