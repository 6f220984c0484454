"""Tokenizers: loading one with the checks that sampling needs, every id that ends a response, one token per character.

Masks are made from lengths, never from token ids, so the padding token may be the end-of-sequence token.
"""

import json
import os
import shutil
from pathlib import Path

from gguf import TokenType
from huggingface_hub import snapshot_download
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from troll_jax.hub import gguf_file, model_of_folder_or_hub, read_json
from troll_jax.models.gguf import Gguf, end_tokens, read_gguf

# Of a model's folder, those that make its tokenizer.
_FILES = ('tokenizer*', 'special_tokens_map.json', 'added_tokens.json', 'vocab.*', 'merges.txt', 'chat_template.*')
PAD, EOS = '<pad>', '<eos>'  # of the character tokenizer
# How text is split before byte pairs are merged, as tokenizer.json of the models says it, by tokenizer.ggml.pre. The
# two regular expressions differ in the digits that are kept together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
PRE_TOKENIZERS = {
    'smollm': lambda: pre_tokenizers.Digits(individual_digits=True),
    'qwen2': lambda: pre_tokenizers.Split(Regex(_SPLIT % ''), 'isolated'),
    'llama-bpe': lambda: pre_tokenizers.Split(Regex(_SPLIT % '{1,3}'), 'isolated'),
}


def load_tokenizer(model: str, *, chat_template_from: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template, an end-of-sequence token and a padding token.

    Args:
        model: a folder in Hugging Face format, an id on the hub, or a GGUF file by its path or as 'package:' and a
            Python package. Code that comes with a model is never run.
        chat_template_from: another model, whose chat template to use, for a base model that has none. The token that
            ends a turn comes with it and becomes the tokenizer's end-of-sequence token; `stop_token_ids` still finds
            the base model's own in its configuration files.

    Raises:
        FileNotFoundError: no such model.
        ValueError: files that cannot be read, no chat template, no end-of-sequence token, or the borrowed one is not in
            the vocabulary.
    """
    tokenizer = _from_pretrained(model)
    if chat_template_from is not None:
        donor = _from_pretrained(chat_template_from)
        if donor.chat_template is None:
            raise ValueError(
                f'{chat_template_from!r} has no chat template to lend; set chat_template_from to one that has.'
            )
        if donor.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f'The chat template of {chat_template_from!r} ends a turn with {donor.eos_token!r}, which {model!r} '
                'does not know; expected a model with the same special tokens. Change chat_template_from.'
            )
        tokenizer.chat_template, tokenizer.eos_token = donor.chat_template, donor.eos_token
    if tokenizer.chat_template is None:
        raise ValueError(
            f'The tokenizer of {model!r} has no chat template; expected one. Set chat_template_from to a model of the '
            'same family that has (usually its Instruct version).'
        )
    stops = stop_token_ids(tokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stops[0])
    return tokenizer


def save_tokenizer(folder: str | Path, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> None:
    """Writes the files of a tokenizer, which transformers 4.57 and 5 read, or all that read its source's.

    Args:
        folder: created if it is not there; other files in it stay.
        tokenizer: tokenizer to write.
        model: the model, as in `load_tokenizer`, whose tokenizer it is unchanged: its files are copied as they are. Of
            one that was made or changed here, None; a GGUF file has none to copy.

    Raises:
        FileNotFoundError: no such model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None and not gguf_file(model):
        with model_of_folder_or_hub(model):
            source = Path(model if os.path.isdir(model) else snapshot_download(model, allow_patterns=list(_FILES)))
        for file in (file for pattern in _FILES for file in source.glob(pattern) if file.is_file()):
            shutil.copyfile(file, folder / file.name)
        return
    tokenizer.save_pretrained(folder)
    file = folder / 'tokenizer_config.json'
    config = read_json(file)
    # Names of transformers 5 in place of which both versions read older ones.
    if config['tokenizer_class'] == 'TokenizersBackend':
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    if isinstance(config.get('extra_special_tokens'), list):
        config['additional_special_tokens'] = config.pop('extra_special_tokens')
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: str) -> tuple[int, ...]:
    """Every id that ends a response, ascending: of generation_config.json, config.json and the tokenizer.

    The three often differ: a chat model stops at the end of a turn and at the end of a text. A sampler that knows only
    one of them runs on to the length limit.

    Raises:
        ValueError: there is none.
    """
    found = {tokenizer.eos_token_id}
    for name in ('generation_config.json', 'config.json'):
        ids = _read_file_of(model, name).get('eos_token_id')
        ids = ids if isinstance(ids, list) else [ids]
        if not all(i is None or (type(i) is int and i >= 0) for i in ids):
            raise ValueError(f'eos_token_id in {name} of {model!r} is {ids}; expected ids, from 0. Correct that file.')
        found.update(ids)
    found.discard(None)
    if not found:
        raise ValueError(
            f'{model!r} names no end-of-sequence token in generation_config.json, config.json or its tokenizer; '
            'expected at least one, or no response would end. Set eos_token in tokenizer_config.json.'
        )
    return tuple(sorted(found))


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer in Hugging Face format with one token per character, for a tiny model's own language.

    Ids: padding 0, end of sequence 1, then `characters` in their order. Its chat template renders the contents of the
    messages, the end of sequence behind those of the assistant, and not one token more. Text with any other character
    is an error, not an unknown token.

    Raises:
        ValueError: no characters, or one of them twice.
    """
    if not characters or len(set(characters)) < len(characters):
        raise ValueError(f'Got the characters {characters!r}; expected at least one, and each once.')
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    )


def _read_file_of(model: str, name: str) -> dict:
    """A file of a model as a dictionary, empty if the model lacks it; of a GGUF file, what stands for these files."""
    if file := gguf_file(model):
        return {'eos_token_id': end_tokens(read_gguf(file))}
    if os.path.isdir(model):
        path = os.path.join(model, name)
        path = path if os.path.exists(path) else None
    else:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else read_json(Path(path))


def _from_pretrained(model: str) -> PreTrainedTokenizerBase:
    if file := gguf_file(model):
        return _of_gguf(read_gguf(file))
    with model_of_folder_or_hub(model):
        try:
            return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except Exception as error:  # of many kinds: files are read as they come
            if isinstance(error, OSError) and not os.path.isdir(model):
                raise  # not on the hub
            raise ValueError(
                f'The tokenizer of {model!r} cannot be read ({type(error).__name__}: {error}); expected tokenizer.json '
                'and tokenizer_config.json in Hugging Face format. Copy or download them again.'
            ) from error


def _of_gguf(model: Gguf) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the metadata of a GGUF file."""
    prefix = 'tokenizer.ggml.'
    found = {key.removeprefix(prefix): x for key, x in model.metadata.items() if key.startswith(prefix)}
    kind, pre = found.get('model'), found.get('pre')
    if kind != 'gpt2' or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{model.file}: the tokenizer is {kind!r} with the pre-tokenizer {pre!r}; expected 'gpt2' with one of "
            f'{sorted(PRE_TOKENIZERS)}'
        )
    try:
        tokens = list(zip(found['tokens'], found['token_type'], strict=True))
        vocabulary = {token: i for i, (token, kind) in enumerate(tokens) if kind != TokenType.UNUSED}
        merges = [tuple(merge.split(' ')) for merge in found['merges']]
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == 'llama-bpe'))
        if pre == 'qwen2':
            backend.normalizer = normalizers.NFC()
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == 'smollm')
        backend.pre_tokenizer = pre_tokenizers.Sequence([PRE_TOKENIZERS[pre](), to_bytes])
        backend.decoder = decoders.ByteLevel()
        whole = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
        backend.add_tokens(
            [AddedToken(token, special=whole[kind], normalized=False) for token, kind in tokens if kind in whole]
        )
        names = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
        ids = {f'{name}_token': found.get(f'{key}_token_id') for name, key in names.items()}
        special = {name: tokens[i][0] for name, i in ids.items() if i is not None}
        if found.get('add_bos_token', pre == 'llama-bpe'):
            bos = special['bos_token']
            backend.post_processor = processors.TemplateProcessing(
                single=f'{bos} $A', pair=f'{bos} $A {bos}:1 $B:1', special_tokens=[(bos, ids['bos_token'])]
            )
        template = model.metadata.get('tokenizer.chat_template')
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=template, **special
        )
    except Exception as error:  # of many kinds, as no field has been checked
        raise ValueError(
            f'{model.file}: the tokenizer cannot be read ({type(error).__name__}: {error}); convert the model again'
        ) from error
