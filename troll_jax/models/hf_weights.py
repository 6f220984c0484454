"""Loads checkpoints, safetensors or GGUF, one tensor at a time and straight onto the mesh; exports safetensors."""

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, PretrainedConfig

from troll_jax.hub import gguf_file, model_of_folder_or_hub, read_json
from troll_jax.models.decoder import DecoderConfig, abstract, cast_shapes
from troll_jax.models.families import Constant, Tensor, decoder_config, family, tensors
from troll_jax.models.gguf import GgufTensor, gguf_config, gguf_tensors, read_gguf
from troll_jax.models.lora import Lora

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
TOKENIZER_FILES = ('tokenizer.model', '*.txt', '*.jinja')  # besides the *.json ones
DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16', 'float16')}
STORED_DTYPES = ('F32', 'BF16', 'F16')  # the same, as safetensors names them
# Stored by old exports of Llama, and determined by config.json. A model computes it, and so does transformers.
DERIVED = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')


def load_config(model: str | Path) -> PretrainedConfig:
    """The Hugging Face config of a model, with a supported architecture.

    Args:
      model: a folder, the id of a model on the hub, or a GGUF file, by its path or as `package:` and a Python package.

    Raises:
      FileNotFoundError: no such folder, file or model, or no config.json in it.
      ValueError: config.json or the file is damaged, or its architecture not supported.
    """
    if file := gguf_file(model):
        return gguf_config(read_gguf(file))
    return _read_config(_local_folder(model, ['*.json']))


def load_pretrained(
    model: str | Path,
    *,
    mesh: Mesh | None = None,
    compute_dtype: str = 'bfloat16',
    remat: str | None = None,
    dtype: str | None = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Loads a model: its config and float32 parameters, laid out over `mesh` as `abstract` says.

    A process reads the shards of its own devices, one by one. Its host memory never has more than one shard of one
    parameter (of all its layers), and one tensor as it is stored; of a GGUF file, also this tensor in float32.

    Args:
      model: as in `load_config`.
      dtype: dtype of the matrices, as `cast_weights` gives them; None: float32.

    Raises:
      FileNotFoundError: no such folder, file or model, no config.json, no safetensors in it.
      ValueError: the architecture is not supported, a file is damaged, tensors are missing, unknown or of a wrong
        shape, or the mesh does not divide the model.
    """
    if source := gguf_file(model):
        hf_config = gguf_config(read_gguf(source))
        stored = gguf_tensors(read_gguf(source), hf_config)
    else:
        source = _local_folder(model, ['*.safetensors', '*.json', *TOKENIZER_FILES])
        hf_config = _read_config(source)
        stored = _stored_tensors(source)
    config = decoder_config(hf_config, compute_dtype=compute_dtype, remat=remat)
    shapes = abstract(config, mesh)[1]
    shapes = flatten_dict(shapes if dtype is None else cast_shapes(shapes, dtype))
    table = tensors(hf_config)
    _check_constants(source, stored, family(hf_config.architectures).constants, config.layers)
    _check_stored(source, stored, table, shapes, config)
    return config, unflatten_dict({tensor.path: _read(stored, tensor, shapes[tensor.path]) for tensor in table})


def save_pretrained(
    folder: str | Path,
    params: dict[str, Any],
    hf_config: PretrainedConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Exports a model: config.json and weights that transformers 4.57 and 5 open unchanged.

    Everything is written beside its final place first, so that a run that dies leaves no half-written file; weights
    of an earlier export are replaced. With several processes each must call this, and the first one writes.

    Args:
      folder: created if it is not there; other files in it (a tokenizer) stay.
      dtype: dtype of the weights; by default that of `hf_config`, float32 if it names none.
      max_shard_bytes: weights larger than this are split into files of at most this size (or one tensor).

    Raises:
      ValueError: `params` are not those of `hf_config`, or an unknown dtype.
    """
    dtype = dtype or str(hf_config.dtype or 'float32').removeprefix('torch.')
    if dtype not in DTYPES:
        raise ValueError(f'dtype must be one of {tuple(DTYPES)}; got {dtype!r}')
    flat = flatten_dict(params)
    config = decoder_config(hf_config)
    _check_params(flat, flatten_dict(abstract(config)[1]))
    exports = _exports(flat, hf_config, config.layers, DTYPES[dtype])
    shards = split_state_dict_into_shards_factory(
        exports,
        get_storage_size=lambda export: export.size,
        filename_pattern='model{suffix}.safetensors',
        max_shard_size=max_shard_bytes,
    )

    first = jax.process_index() == 0
    folder = Path(folder)
    staging = folder / '.export'
    if first:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    for file, names in shards.filename_to_tensors.items():
        arrays = {name: exports[name].fetch() for name in names}
        if first:
            save_file(arrays, staging / file, metadata={'format': 'pt'})
        del arrays  # before the next shard is fetched
    if not first:
        return

    saved_config = copy.deepcopy(hf_config)
    saved_config.dtype = dtype
    described = json.loads(saved_config.to_json_string())
    # transformers 4 does not know rope_parameters, and would take its own defaults for these two.
    rope = dict(described['rope_parameters'])
    described['rope_theta'] = rope.pop('rope_theta')
    described['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
    (staging / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + '\n')
    if shards.is_sharded:
        index = {'metadata': shards.metadata, 'weight_map': shards.tensor_to_filename}
        (staging / INDEX).write_text(json.dumps(index, indent=2))
    # Old weights go first: a run that dies between these lines leaves a folder that does not open, not a mixture.
    for old in [folder / INDEX, *folder.glob('model*.safetensors')]:
        old.unlink(missing_ok=True)
    for file in sorted(staging.iterdir()):
        os.replace(file, folder / file.name)
    staging.rmdir()


def save_adapters(
    folder: str | Path, params: dict[str, Any], hf_config: PretrainedConfig, lora: Lora, base: str
) -> None:
    """Exports the adapters among a decoder's parameters, in float32, as PEFT opens them beside the model `base`.

    With several processes each must call this, and the first one writes.
    """
    flat, layers = flatten_dict(params), decoder_config(hf_config).layers
    arrays, targets = {}, set()
    for tensor in tensors(hf_config):
        for factor, name in (('a', 'lora_A'), ('b', 'lora_B')):
            if (param := flat.get((*tensor.path[:-1], 'lora', tensor.path[-1], factor))) is not None:
                targets.add(tensor.name.split('.')[-2])
                for i, key in enumerate(_names(tensor, layers)):
                    key = f'base_model.model.{key.removesuffix("weight")}{name}.weight'
                    arrays[key] = _fetch(param, tensor, i, DTYPES['float32'])
    if jax.process_index() > 0:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(arrays, Path(folder) / 'adapter_model.safetensors', metadata={'format': 'pt'})
    described = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': lora.rank}
    described |= {'lora_alpha': lora.alpha, 'target_modules': sorted(targets), 'bias': 'none', 'lora_dropout': 0.0}
    (Path(folder) / 'adapter_config.json').write_text(json.dumps(described, indent=2) + '\n')


def _local_folder(model: str | Path, patterns: list[str]) -> Path:
    """The folder itself, or one with these files from the hub (never a pickle, never code)."""
    if Path(model).is_dir():
        return Path(model)
    with model_of_folder_or_hub(str(model)):
        return Path(snapshot_download(str(model), allow_patterns=patterns))


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f'no {CONFIG} in {folder}; got {sorted(file.name for file in folder.iterdir())}')
    config = read_json(folder / CONFIG)
    architectures, kind = config.get('architectures'), config.get('model_type')
    family(architectures)  # before transformers meets a model that it may not know
    if kind != (expected := architectures[0].removesuffix('ForCausalLM').lower()):
        raise ValueError(f'{folder / CONFIG}: model_type is {kind!r}; expected {expected!r} with {architectures[0]}')
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds: each field has checks of its own
        raise ValueError(
            f'{folder / CONFIG} does not describe a {kind} model: {error} Correct it, or download it again.'
        ) from error


class _Stored(NamedTuple):
    """A tensor in a file, of which nothing is read before it is indexed.

    A file stays mapped for as long as it is open, and counts as memory of the process as far as it has been read.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it

    def __getitem__(self, index: Any) -> np.ndarray:
        with safe_open(self.file, framework='numpy') as opened:
            return opened.get_slice(self.name)[index]


Stored = _Stored | GgufTensor


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """All tensors of a checkpoint by name."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get('weight_map')
        if not isinstance(names, dict) or not all(str(x).endswith('.safetensors') for x in names.values()):
            raise ValueError(f'weight_map of {folder / INDEX} is {str(names)[:80]}; expected tensors → *.safetensors')
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        there = sorted(file.name for file in folder.iterdir())
        hint = '; only safetensors are read, convert the .bin files' if any(n.endswith('.bin') for n in there) else ''
        raise FileNotFoundError(f'neither {WEIGHTS} nor {INDEX} in {folder}; got {there}{hint}')
    stored = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f'{file} is named in {INDEX}, but is not there')
        try:
            with safe_open(file, framework='numpy') as opened:
                for name in opened.keys():
                    tensor = opened.get_slice(name)
                    stored[name] = _Stored(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(f'{file} is damaged: {error}; copy or download it again') from error
    return stored


def _names(tensor: Tensor | Constant, layers: int) -> list[str]:
    """The checkpoint's names of it: one, or one per layer."""
    return [tensor.name.format(layer=i) for i in range(layers)] if '{layer}' in tensor.name else [tensor.name]


def _check_constants(source: Path, stored: dict[str, Stored], constants: tuple[Constant, ...], layers: int) -> None:
    """Takes our constants out of `stored`, if they have the values that we compute with, up to bfloat16."""
    problems = []
    for constant in constants:
        for name in _names(constant, layers):
            found = stored.pop(name, None)
            if found is None:
                continue
            if math.prod(found.shape) != 1 or found.dtype not in STORED_DTYPES:
                problems.append(f'{name}: got {found.dtype} {list(found.shape)}, expected one number')
            elif not np.isclose(value := float(np.squeeze(found[...])), constant.value, rtol=2**-8, atol=0):
                problems.append(f'{name}: got {value}, expected {constant.value}')
    if problems:
        raise ValueError(f'the model in {source} is another variant:\n  ' + '\n  '.join(problems))


def _check_stored(
    source: Path,
    stored: dict[str, Stored],
    table: tuple[Tensor, ...],
    shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct],
    config: DecoderConfig,
) -> None:
    """Compares names, shapes and dtypes in the files' headers with those that the config implies."""
    expected = {}
    for tensor in table:
        shape = list(shapes[tensor.path].shape)
        shape = shape[1:] if '{layer}' in tensor.name else shape
        expected |= dict.fromkeys(_names(tensor, config.layers), shape[::-1] if tensor.transposed else shape)
    found = {name: tensor for name, tensor in stored.items() if not DERIVED.fullmatch(name)}
    problems = []
    # A tied head may be stored all the same (Qwen3-0.6B does it). It is of no use, unless it is another one.
    if config.tied_embeddings and 'lm_head.weight' in found:
        head, embedding = found.pop('lm_head.weight'), found.get('model.embed_tokens.weight')
        if embedding is not None and not _equal(head, embedding):
            problems.append('lm_head.weight: got other values than model.embed_tokens.weight, expected tied embeddings')
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f'{name}: missing, expected {expected[name]}')
        elif name not in expected:
            problems.append(f'{name}: got {list(found[name].shape)}, expected no such tensor')
        elif list(found[name].shape) != expected[name]:
            problems.append(f'{name}: got shape {list(found[name].shape)}, expected {expected[name]}')
        elif found[name].dtype not in STORED_DTYPES:
            problems.append(f'{name}: got {found[name].dtype}, expected one of {STORED_DTYPES}')
    if problems:
        raise ValueError(f'the weights in {source} are not those of its config:\n  ' + '\n  '.join(problems))


def _equal(one: Stored, other: Stored, rows: int = 4096) -> bool:
    """True if two stored tensors are the same, comparing a few rows at a time."""
    if one.shape != other.shape:
        return False
    count = one.shape[0]
    blocks = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def _read(stored: dict[str, Stored], tensor: Tensor, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One of our parameters, each shard of it read from the files by itself and put on its device."""
    stacked = '{layer}' in tensor.name

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return stored[name][index[::-1]].T if tensor.transposed else stored[name][index]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        sizes = [len(range(size)[along]) for size, along in zip(leaf.shape, index, strict=True)]
        values = np.empty(sizes, leaf.dtype)
        if stacked:
            for i, layer in enumerate(range(leaf.shape[0])[index[0]]):
                values[i] = part(tensor.name.format(layer=layer), index[1:])
        else:
            values[:] = part(tensor.name, index)
        return values

    if leaf.sharding is None:
        return jax.device_put(read((slice(None),) * len(leaf.shape)))
    # Devices that hold the same shard (replicas) share one reading of it.
    holders: dict[str, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(str(index), []).append((device, index))
    shards = []
    for group in holders.values():
        values = read(group[0][1])
        shards += [jax.device_put(values, device) for device, _ in group]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _check_params(flat: dict[tuple[str, ...], jax.Array], shapes: dict[tuple[str, ...], jax.ShapeDtypeStruct]) -> None:
    got = {path: param.shape for path, param in flat.items()}
    expected = {path: leaf.shape for path, leaf in shapes.items()}
    problems = [
        f'{"/".join(path)}: got {got.get(path, "nothing")}, expected {expected.get(path, "nothing")}'
        for path in sorted(got.keys() | expected.keys())
        if got.get(path) != expected.get(path)
    ]
    if problems:
        raise ValueError('the parameters are not those of the config:\n  ' + '\n  '.join(problems))


class _Export(NamedTuple):
    """A tensor of a checkpoint that is to be written."""

    size: int  # bytes
    fetch: Callable[[], np.ndarray]


def _exports(
    flat: dict[tuple[str, ...], jax.Array], hf_config: PretrainedConfig, layers: int, dtype: np.dtype
) -> dict[str, _Export]:
    exports = {}
    for tensor in tensors(hf_config):
        param, names = flat[tensor.path], _names(tensor, layers)
        size = param.size // len(names) * dtype.itemsize
        exports |= {name: _Export(size, partial(_fetch, param, tensor, i, dtype)) for i, name in enumerate(names)}
    for constant in family(hf_config.architectures).constants:
        export = _Export(dtype.itemsize, partial(np.asarray, constant.value, dtype))
        exports |= dict.fromkeys(_names(constant, layers), export)
    return exports


@jax.jit
def _take_layer(stacked: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _fetch(param: jax.Array, tensor: Tensor, layer: int, dtype: np.dtype) -> np.ndarray:
    """One tensor as the checkpoint has it, in this host's memory."""
    if '{layer}' in tensor.name:
        param = _take_layer(param, layer)
    here = param.is_fully_addressable
    values = np.asarray(param) if here else multihost_utils.process_allgather(param, tiled=True)
    return np.asarray(values.T if tensor.transposed else values, dtype=dtype, order='C')
