"""Tokenizers: the character tokenizer is exact, templates and end-of-sequence ids are complete or an error says so."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from troll_jax.data.tasks.arithmetic import CHARACTERS
from troll_jax.data.tokenizer import character_tokenizer, load_tokenizer, save_tokenizer, stop_token_ids
from troll_jax.models.hf_weights import load_config, load_pretrained

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}"


def save_words(path, words, **arguments):
    """A tokenizer of whole words with the special tokens in `arguments`."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **arguments).save_pretrained(path)
    return str(path)


@pytest.fixture
def characters(tmp_path):
    path = str(tmp_path / 'characters')
    character_tokenizer(CHARACTERS).save_pretrained(path)
    return path


@pytest.mark.parametrize('text', ['62639#9', '3*2+6*3-3*3=', '', '00', CHARACTERS])
def test_characters_survive_the_round_trip(characters, text):
    """Guards against decoders that put spaces between tokens, which every exact grader then marks wrong."""
    tokenizer = AutoTokenizer.from_pretrained(characters)
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert ids == tokenizer(text)['input_ids']


def test_odd_characters_survive_too(tmp_path):
    odd = ' \n\t"\\é{.'
    character_tokenizer(odd).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in (odd, ' \n ', '. .', 'é {'):
        assert tokenizer.decode(tokenizer(text)['input_ids']) == text


def test_character_ids_are_fixed(characters):
    """Guards against ids that depend on how the vocabulary happens to be stored: checkpoints rely on them."""
    tokenizer = load_tokenizer(characters)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer(CHARACTERS)['input_ids'] == list(range(2, 2 + len(CHARACTERS)))
    assert len(tokenizer) == 2 + len(CHARACTERS)


def test_the_character_template_costs_no_tokens(characters):
    tokenizer = load_tokenizer(characters)
    messages = [{'role': 'user', 'content': '3*2='}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == '3*2='


def test_an_unknown_character_is_an_error(characters):
    """Guards against a prompt that silently loses what the tokenizer does not know."""
    with pytest.raises(Exception, match='UNK'):
        load_tokenizer(characters)('3/2=')


@pytest.mark.parametrize('text', ['', 'aba'])
def test_unusable_characters_are_an_error(text):
    with pytest.raises(ValueError, match='each once'):
        character_tokenizer(text)


def test_every_stop_id_is_found(tmp_path):
    """Guards against a sampler that knows one end-of-sequence id of several and runs on to the length limit."""
    path = save_words(tmp_path, ['?', 'a', '<eos>', '<turn>', '<text>'], eos_token='<eos>', chat_template=TEMPLATE)
    tokenizer = load_tokenizer(path)
    assert stop_token_ids(tokenizer, path) == (2,)
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': 4}))
    assert stop_token_ids(tokenizer, path) == (2, 4)
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [3, 2]}))
    assert stop_token_ids(tokenizer, path) == (2, 3, 4)
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': None}))
    assert stop_token_ids(tokenizer, path) == (2, 3)


def test_no_stop_id_is_an_error(tmp_path):
    path = save_words(tmp_path, ['?', 'a'], chat_template=TEMPLATE)
    with pytest.raises(ValueError, match='names no end-of-sequence token'):
        load_tokenizer(path)


def test_a_missing_pad_token_becomes_a_stop_token(tmp_path):
    path = save_words(tmp_path, ['?', 'a', '<eos>'], eos_token='<eos>', chat_template=TEMPLATE)
    assert load_tokenizer(path).pad_token_id == 2


def test_a_missing_template_is_an_error_and_can_be_borrowed(tmp_path):
    """Guards against a base model prompted with a made-up format, and never stopping at the end of a turn."""
    words = ['?', 'a', '<text>', '<turn>']
    base = save_words(tmp_path / 'base', words, eos_token='<text>')
    (tmp_path / 'base' / 'config.json').write_text(json.dumps({'eos_token_id': 2}))
    chat = save_words(tmp_path / 'chat', words, eos_token='<turn>', chat_template=TEMPLATE)
    with pytest.raises(ValueError, match='no chat template; expected one. Set chat_template_from'):
        load_tokenizer(base)
    tokenizer = load_tokenizer(base, chat_template_from=chat)
    assert tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False) == 'a <turn>'
    assert stop_token_ids(tokenizer, base) == (2, 3)


def test_a_template_of_another_family_is_an_error(tmp_path):
    base = save_words(tmp_path / 'base', ['?', 'a', '<text>'], eos_token='<text>')
    chat = save_words(tmp_path / 'chat', ['?', '<turn>'], eos_token='<turn>', chat_template=TEMPLATE)
    with pytest.raises(ValueError, match="ends a turn with '<turn>'"):
        load_tokenizer(base, chat_template_from=chat)
    with pytest.raises(ValueError, match='no chat template to lend'):
        load_tokenizer(chat, chat_template_from=base)


@pytest.mark.parametrize('name', ['./{}', '{}/model', 'a/b/{}', '../{}', '~/{}'])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    """Guards an error that speaks of repositories and tokens where a folder was meant."""
    (tmp_path / 'tpyo').mkdir()
    monkeypatch.chdir(tmp_path)
    for load in (load_tokenizer, load_config, load_pretrained):
        with pytest.raises(FileNotFoundError, match='is not a folder') as error:
            load(name.format('typo'))
        assert "['tpyo']" in str(error.value) or '..' in name
        assert ('from the hub' in str(error.value)) == (name == '{}/model')


def test_files_of_an_unchanged_tokenizer_are_copied(tmp_path):
    """Guards against files that transformers writes anew, in words that its earlier versions do not know."""
    words = ['<unk>', '<eos>', '<more>', 'hi']
    model = save_words(tmp_path / 'model', words, eos_token='<eos>', unk_token='<unk>', extra_special_tokens=['<more>'])
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / 'model' / name).write_text('{}')
    file = tmp_path / 'model/tokenizer_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'chat_template': TEMPLATE}))
    tokenizer = load_tokenizer(model)
    save_tokenizer(tmp_path / 'copy', tokenizer, model)
    copied = {file.name: file.read_bytes() for file in (tmp_path / 'copy').iterdir()}
    assert copied == {name: (tmp_path / 'model' / name).read_bytes() for name in copied}
    assert copied.keys() == {'tokenizer.json', 'tokenizer_config.json'}

    tokenizer.chat_template += 'more'
    save_tokenizer(tmp_path / 'changed', tokenizer)
    written = json.loads((tmp_path / 'changed/tokenizer_config.json').read_text())
    assert written['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert written['additional_special_tokens'] == ['<more>'] and 'extra_special_tokens' not in written
    reloaded = load_tokenizer(str(tmp_path / 'changed'))
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded('hi <more>')['input_ids'] == [3, 2] == tokenizer('hi <more>')['input_ids']
    assert reloaded.decode([3, 2], skip_special_tokens=True).strip() == 'hi'
