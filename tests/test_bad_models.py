"""Bad models and tokenizers: an error that says what is wrong, and nothing that comes with them is run."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
from bad_input import REPOSITORY, cases, damaged, fresh, save_model
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.plumbing.command import run_command
from troll_jax.data.prompts import encode_prompts
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tokenizer import load_tokenizer, stop_token_ids
from troll_jax.hub import version_of
from troll_jax.models.hf_weights import load_pretrained


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp('model'))


def changed(model: Path, tmp_path: Path, file: str, content) -> str:
    """A copy of the model with other fields in a JSON file, or, if `content` is bytes, with another file."""
    folder = fresh(tmp_path)
    shutil.copytree(model, folder)
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        old = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(old | content))
    return str(folder)


SIZES = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads')
FIELDS = [*SIZES, 'intermediate_size', 'max_position_embeddings', 'rms_norm_eps', 'architectures', 'model_type']
never = st.sampled_from([-1, 0, 'x', [], {}, [3], True, [None], 1e400, {'a': None}])


@cases(60)
@given(st.sampled_from([*FIELDS, 'rope_parameters', 'layer_types', 'hidden_act']), never)
@example('rope_parameters', {'rope_type': 'yarn', 'rope_theta': 1.0})
@example('rope_parameters', {'rope_type': 'default', 'rope_theta': 'x'})
@example('rope_parameters', {'rope_type': 'llama3', 'factor': 2})
@example('architectures', ['GPT2LMHeadModel'])
@example('model_type', 'gpt2')
@example('layer_types', ['sliding_attention'])
def test_a_config_that_is_wrong_is_an_error(tmp_path, model, field, value):
    """Guards the many kinds of errors that libraries have for one wrong number, none of which names the file."""
    if field == 'rope_parameters' and value in ({}, {'a': None}):
        return  # all of them have defaults
    with pytest.raises(ValueError, match='config|model|unsupported|weights'):
        load_pretrained(changed(model, tmp_path, 'config.json', {field: value}))


DAMAGED = [b'', b'{', b'[]', b'3', b'null', b'\xff\xfe', b'\0' * 11]


@pytest.mark.parametrize('content', DAMAGED, ids=str)
def test_a_damaged_file_of_a_model_is_an_error(tmp_path, model, content):
    for file, load in [
        ('config.json', load_pretrained),
        ('model.safetensors', load_pretrained),
        ('config.json', load_tokenizer),
        ('tokenizer.json', load_tokenizer),
        ('tokenizer_config.json', load_tokenizer),
        ('generation_config.json', load_tokenizer),
    ]:
        with pytest.raises((ValueError, OSError)):
            load(changed(model, tmp_path, file, content))


FILES = ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'model.safetensors']


@cases(60)
@given(st.sampled_from(FILES), st.data())
def test_a_file_of_a_model_with_a_part_replaced_is_read_or_an_error(tmp_path, model, file, data):
    """Guards errors of transformers, tokenizers, jinja and safetensors that reach the user as they are."""
    folder = changed(model, tmp_path, file, data.draw(damaged((model / file).read_bytes())))
    prompts = Arithmetic(train_size=3).load('train')
    for use in (load_pretrained, lambda folder: encode_prompts(prompts, load_tokenizer(folder), max_length=20)):
        with suppress(SystemExit):
            run_command(lambda use=use: use(folder))


@pytest.mark.parametrize('index', [{}, {'weight_map': 3}, {'weight_map': {'a': 3}}, {'weight_map': {'a': 'b.bin'}}])
def test_an_index_that_is_wrong_is_an_error(tmp_path, model, index):
    folder = Path(changed(model, tmp_path, 'model.safetensors.index.json', index))
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='weight_map'):
        load_pretrained(folder)


@pytest.mark.parametrize(
    'file, content, message',
    [
        ('tokenizer_config.json', {'eos_token': 3}, 'cannot be read'),
        ('tokenizer_config.json', {'auto_map': 'x'}, 'cannot be read'),
        ('tokenizer_config.json', {'eos_token': None}, 'no end-of-sequence token'),
        ('generation_config.json', {'eos_token_id': 'x'}, "is \\['x'\\]; expected ids"),
        ('generation_config.json', {'eos_token_id': [-1]}, 'expected ids'),
        ('chat_template.jinja', b'{% for', 'chat template fails'),
        ('chat_template.jinja', b'{{ 1 / 0 }}', 'chat template fails'),
        ('chat_template.jinja', b'{{ raise_exception("no system") }}', 'no system'),
        ('chat_template.jinja', b'', 'has no tokens'),
    ],
)
def test_a_tokenizer_that_is_wrong_is_an_error(tmp_path, model, file, content, message):
    folder = changed(model, tmp_path, file, content)
    with pytest.raises(ValueError, match=message):
        tokenizer = load_tokenizer(folder)
        encode_prompts(Arithmetic(train_size=3).load('train'), tokenizer, max_length=20)


def test_a_tokenizer_without_template_or_padding(tmp_path, model):
    """Guards padding that is None, which numpy turns into something else."""
    folder = Path(changed(model, tmp_path, 'tokenizer_config.json', {'pad_token': None}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == stop_token_ids(tokenizer, str(folder))[0]
    (folder / 'chat_template.jinja').unlink()
    with pytest.raises(ValueError, match='no chat template'):
        load_tokenizer(str(folder))


def test_code_that_comes_with_a_model_is_never_run(tmp_path, model):
    """Guards against `auto_map`: a module of the model's folder that transformers would import."""
    own = {kind: f'own.{kind}' for kind in ('AutoConfig', 'AutoModelForCausalLM')}
    folder = Path(changed(model, tmp_path, 'config.json', {'auto_map': own}))
    for file in ('own.py', 'tokenization_own.py'):
        (folder / file).write_text(f'open({str(tmp_path / "was_run")!r}, "w")\n')
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    config |= {'auto_map': {'AutoTokenizer': ['own.AutoTokenizer', None]}, 'tokenizer_class': 'AutoTokenizer'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    for load in (load_pretrained, load_tokenizer):
        try:
            load(str(folder))
        except ValueError:
            pass
    assert not (tmp_path / 'was_run').exists()


def test_nothing_unpickles_or_trusts():
    """Guards against a way in which a model, data or a checkpoint runs code on the machine that loads it."""
    pattern = re.compile(
        r'torch\.load|pickle\.loads?\b|Unpickler|allow_pickle\s*=\s*(?!False)|trust_remote_code\s*=\s*(?!False)|joblib|dill'
    )
    found = {
        f'{path.relative_to(REPOSITORY)}: {line.strip()}'
        for folder in ('troll_jax', 'experiments')
        for path in sorted((REPOSITORY / folder).rglob('*.py'))
        for line in path.read_text().splitlines()
        if pattern.search(line)
    }
    # A grading worker gets its function from the process that started it.
    assert found == {'troll_jax/rewards/worker.py: grade = pickle.loads(pickled)'}


def test_the_version_of_a_start_model_is_found(tmp_path, monkeypatch):
    """Guards a record of a run that does not say which of a model's versions on the hub it started from."""
    snapshot = tmp_path / 'models--someone--something/snapshots' / ('ab' * 20)
    snapshot.mkdir(parents=True)
    (snapshot / 'config.json').write_text('{}')
    (tmp_path / 'models--someone--something/refs').mkdir()
    (tmp_path / 'models--someone--something/refs/main').write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    assert version_of('someone/something') == snapshot.name
    assert version_of('someone/else') is None and version_of(str(snapshot)) is None
