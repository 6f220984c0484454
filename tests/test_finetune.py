"""Supervised fine-tuning: which tokens are learnt, the gradient, and whole runs up to the exported model."""

import functools
import json
import sys
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from faults.runs import everything
from loop import assert_same, without_times
from safetensors.numpy import load_file
from test_chat_templates import CHATML, FAMILIES, Family, prompt, save
from transformers import AutoModelForCausalLM, AutoTokenizer
from updates import CONFIG, all_log_probs, policy_params

import experiments.finetune
from experiments.export import export
from experiments.finetune import finetune
from troll_jax.data.chats import Chat, encode_chats
from troll_jax.data.tasks.interface import load_rows, locate
from troll_jax.data.tokenizer import load_tokenizer, stop_token_ids
from troll_jax.finetune import Finetuning, SupervisedLearner
from troll_jax.metrics import read_metrics
from troll_jax.models import decoder as decoders
from troll_jax.models.lora import Lora
from troll_jax.optimizer import adamw
from troll_jax.settings import Compute, Run


def says(*contents: str) -> list[dict[str, str]]:
    """A conversation of a user and the assistant, in turns."""
    return [{'role': ['user', 'assistant'][i % 2], 'content': content} for i, content in enumerate(contents)]


TWO_TURNS = says('Hi', 'Be kind', 'there', 'brief')


def encode(path: str, columns: dict, **settings) -> list[list[Chat]]:
    tokenizer = load_tokenizer(path)
    settings = {'max_length': 61, 'stop_tokens': stop_token_ids(tokenizer, path), 'where': 'row {}'.format} | settings
    return encode_chats(datasets.Dataset.from_dict(columns), tokenizer, **settings)


def texts(path: str, chat: Chat) -> tuple[str, list[str]]:
    """All tokens of a chat, and each stretch of learnt ones; a word of the vocabulary is a token."""
    tokens = np.array(AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(chat.tokens))
    ends = np.flatnonzero(np.diff(chat.learnt, prepend=False, append=False))
    stretches = [' '.join(tokens[a:b]) for a, b in ends.reshape(-1, 2)]
    return ' '.join(tokens), stretches


@pytest.mark.parametrize('name', FAMILIES)
def test_the_assistants_words_and_their_end_are_learnt(tmp_path, name):
    """Guards against losing the end of a turn, so that responses never end, learning the user's words or the header of
    a turn, and a prompt of other tokens than sampling has."""
    family = FAMILIES[name]
    path = save(tmp_path / 'model', family)
    ((chat,),) = encode(path, {'messages': [TWO_TURNS]})
    whole, learnt = texts(path, chat)
    assert learnt == [f'Be kind {family.eos}', f'brief {family.eos}']
    assert whole.index('Be kind') < whole.index('there') < whole.index('brief')
    tokens = prompt(load_tokenizer(path), 'Hi')
    assert chat.tokens[: len(tokens)].tolist() == tokens and chat.learnt.argmax() == len(tokens)


THINKING = (
    CHATML.replace('SYSTEM', '')
    .replace('THINK', '')
    .replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}")
)


def test_a_template_that_changes_earlier_turns(tmp_path, caplog):
    """Guards against thoughts in earlier turns, which the model never sees there (Qwen3), and turns that are lost."""
    path = save(tmp_path / 'model', Family(FAMILIES['Qwen3'].special, THINKING, eos='<|im_end|>', pad='<|endoftext|>'))
    thoughtful = says('Hi', '<think>brief</think>kind', 'there', '<think>brief</think>Be')
    ((one, two),) = encode(path, {'messages': [thoughtful]})
    assert texts(path, one)[1] == ['<think> brief </think> kind <|im_end|>']
    whole, learnt = texts(path, two)
    assert learnt == ['<think> brief </think> Be <|im_end|>'] and whole.count('<think>') == 1
    assert '1 conversations make several chats' in caplog.text


def test_templates_that_do_not_fit_are_errors(tmp_path):
    """Guards against learning to answer another prompt than the sampler's, and responses that never end."""
    path = save(tmp_path / 'other', FAMILIES['SmolLM3'])
    with pytest.raises(ValueError, match=r"ends a prompt with .*</think>\\n' and renders .* in row 0: .*Be kind"):
        encode(path, {'messages': [TWO_TURNS]}, template_arguments={'enable_thinking': False})
    endless = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    path = save(tmp_path / 'endless', Family(['<|im_end|>'], endless, eos='<|im_end|>', pad='<|im_end|>'))
    with pytest.raises(ValueError, match=r"ends a turn of the assistant with 'Be kind \\n', in row 0; expected one of"):
        encode(path, {'messages': [TWO_TURNS]})


def test_prompts_and_completions(tmp_path):
    """Guards the other forms of rows: words are a user's and the assistant's, and a prompt's own turns are not
    learnt."""
    path = save(tmp_path / 'model', FAMILIES['Qwen2.5'])
    expected = encode(path, {'messages': [says('Hi', 'Be kind')]})
    assert_same(encode(path, {'prompt': ['Hi'], 'completion': ['Be kind']}), expected)
    ((chat,),) = encode(path, {'prompt': [TWO_TURNS[:3]], 'completion': [TWO_TURNS[3:]]})
    assert texts(path, chat)[1] == ['brief <|im_end|>'] and 'Be kind' in texts(path, chat)[0]


def test_long_chats_are_dropped(tmp_path, caplog):
    """Guards against dropping unseen, or losing the place of the rows that are left."""
    path = save(tmp_path / 'model', FAMILIES['Qwen3'])
    columns = {'messages': [says('Hi', 'Be brief Be brief'), says('Hi', 'Be kind'), says('Hi there ' * 5, 'Be')]}
    long, whole, longest = (of_row[0] for of_row in encode(path, columns))
    size = len(whole.tokens)
    kept = encode(path, columns, max_length=size)
    assert [len(of_row) for of_row in kept] == [0, 1, 0] and size < len(long.tokens) < len(longest.tokens)
    said = f'2 of 3 chats are longer than max_length = {size} tokens; the longest has {len(longest.tokens)}. They are'
    assert said in caplog.text
    with pytest.raises(ValueError, match='No chat is left; raise max_length'):
        encode(path, columns, max_length=5)


STRICT = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    'row, problem',
    [
        ({'messages': says('Hi')}, r"nothing to learn, but the roles \['user'\]"),
        ({'messages': []}, 'nothing to learn'),
        ({'messages': None}, 'has the message None; expected text'),
        ({'messages': says('Hi', ' ')}, 'not empty if it is of the assistant'),
        ({'messages': [*says('Hi', 'Be'), {'role': 'user', 'content': None}]}, 'expected text for role and content'),
        ({'messages': [{'role': 'tool', 'content': 'Hi'}, *says('Hi', 'Be')]}, 'template fails.*no tools'),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path, row, problem):
    """Guards against an error somewhere in a million rows."""
    path = save(tmp_path / 'model', FAMILIES['Qwen3'])
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template += STRICT
    rows = [{'messages': TWO_TURNS}, {'messages': TWO_TURNS}, row]
    for i, part in enumerate((rows[:1], rows[1:])):
        (tmp_path / f'train-{i}.jsonl').write_text(''.join(json.dumps(one) + '\n' for one in part))
    where = functools.partial(locate, str(tmp_path), 'train')
    with pytest.raises(ValueError, match=rf"row 1 of '.*train-1.jsonl'.*{problem}"):
        encode_chats(
            load_rows(str(tmp_path), 'train', ('messages',)),
            tokenizer,
            max_length=61,
            where=where,
            stop_tokens=[tokenizer.eos_token_id],
        )


@functools.cache
def chats() -> list[Chat]:
    """Chats of many lengths, with one, two and no gaps between the learnt tokens; the first one is right."""
    random = np.random.default_rng(0)
    learnt = [[0, 1], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1], [0, 0, 1]]
    made = [Chat(random.integers(0, 38, len(mask)).astype(np.int32), np.array(mask, bool)) for mask in learnt]
    made[0].tokens[1] = all_log_probs(policy_params(), made[0].tokens[None])[0, 0].argmax()
    return made


def learner(**compute) -> SupervisedLearner:
    """One whose change of the parameters is the gradient."""
    settings = {'model': '', 'max_length': 8, 'batch_size': 6, 'optimizer': lambda: optax.sgd(1.0)}
    devices = {'devices': jax.devices()[:1]} if 'devices' not in compute else {}
    return SupervisedLearner(CONFIG, Finetuning(**settings), Compute(dtype='float32', **devices, **compute))


@functools.cache
def dense():
    """Loss, gradient and accuracies of the chats by plain autodiff, a row for each of them."""
    tokens, learnt = (np.array([np.pad(chat[i], (0, 8 - len(chat[i]))) for chat in chats()]) for i in range(2))

    def loss_and_right(params):
        log_probs, following = all_log_probs(params, tokens)[:, :-1], tokens[:, 1:]
        found = jnp.take_along_axis(log_probs, following[..., None], axis=2)[..., 0]
        return -jnp.sum(found * learnt[:, 1:]) / learnt.sum(), log_probs.argmax(axis=2) == following

    (loss, right), gradient = jax.jit(jax.value_and_grad(loss_and_right, has_aux=True))(policy_params())
    right = np.asarray(right) | ~learnt[:, 1:]
    return float(loss), gradient, right.all(axis=1).mean(), right[learnt[:, 1:]].mean()


LAYOUTS = [
    {},
    {'row_tokens': 13, 'micro_batch_tokens': 13},
    {'row_tokens': 17, 'micro_batch_tokens': 34, 'head_chunk': 7},
    {'data': 2, 'fsdp': 2, 'devices': jax.devices()[:4], 'row_tokens': 9},
]


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_the_gradient_is_that_of_the_mean_over_learnt_tokens(layout):
    """Guards against a loss that depends on packing, micro-batches or devices, or leaks from one chat to another."""
    loss, gradient, accuracy, token_accuracy = dense()
    made = learner(**layout)
    with jax.set_mesh(made.mesh):
        params = jax.device_put(policy_params(), jax.tree.map(lambda x: x.sharding, made.shapes.params))
        state = made.init(jax.tree.map(jnp.copy, params))
    state, metrics = made.update(state, chats())
    changed = jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), state.params, policy_params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), changed, gradient)
    expected = {'loss': loss, 'accuracy': accuracy, 'token_accuracy': token_accuracy, 'tokens': 15, 'skipped': 0}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (int(state.progress.step), int(state.progress.updates)) == (1, 1)
    # And the same of more chats than fit into a batch, without an update.
    measured = made.evaluate(params, [*chats(), *chats()])
    assert {name: measured[name] for name in measured} == pytest.approx({n: metrics[n] for n in measured}, rel=1e-5)


UP = 'model.layers.0.mlp.up_proj.weight'
DEMONSTRATIONS = {'prompt': ['1+2=', '3*4=', '9-5=', '7+7='] * 2, 'completion': ['3#3', '2#2', '#4', '4#4'] * 2}
ONE_DEVICE = Compute(dtype='float32', devices=jax.devices()[:1])


def settings(model: str, **changes) -> Finetuning:
    usual = {'max_length': 8, 'batch_size': 3, 'optimizer': functools.partial(adamw, 1e-2, warmup_updates=3)}
    return Finetuning(model=model, **usual | changes)


@pytest.mark.parametrize('lora', [None, Lora(rank=2)])
def test_resuming_equals_not_stopping(tmp_path, model, lora):
    """Guards against chats that are skipped or seen again, a rate that starts anew, and lost metrics.

    And against an export without what has been learnt, or without the weights that adapters belong to.
    """
    rows, of_run = datasets.Dataset.from_dict(DEMONSTRATIONS), {'evaluate_every': 2, 'checkpoint_every': 2}
    make = lambda name, steps: finetune(
        settings(model, held_out=2, lora=lora), ONE_DEVICE, Run(folder=tmp_path / name, steps=steps, **of_run), rows
    )
    assert make('whole', 4) and make('parts', 2) and make('parts', 4)
    assert_same(*(everything(tmp_path / name, 4) for name in ('parts', 'whole')))
    found = [without_times(read_metrics(tmp_path / name / 'metrics.jsonl')) for name in ('parts', 'whole')]
    assert found[0] == found[1] and [row['step'] for row in found[0]] == [0, 1, 2, 3, 4]
    assert found[0][4]['eval/loss'] < found[0][0]['eval/loss']
    tokens = [row['update/tokens'] for row in found[0][1:]]
    assert sum(tokens[:2]) == sum(tokens[2:]) and sum(tokens[:2]) % 2, 'two updates were meant to be all six chats'
    export(tmp_path / 'whole', tmp_path / 'again')
    exported = [load_file(tmp_path / name / 'model.safetensors') for name in ('again', 'whole/export')]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-7), *exported)
    assert not np.array_equal(exported[0][UP], load_file(Path(model) / 'model.safetensors')[UP])
    with pytest.raises(ValueError, match='train data: '):
        finetune(settings(model, lora=lora), ONE_DEVICE, Run(folder=tmp_path / 'parts', steps=5), rows.select(range(7)))


def test_a_demonstration_is_reproduced(tmp_path, model, monkeypatch):
    """Guards the way from a file to a model that transformers opens: shifts by one, an export of other weights, an end
    that is not learnt. As a command, with a gin file of a model."""
    rows = [dict(zip(DEMONSTRATIONS, row, strict=True)) for row in zip(*DEMONSTRATIONS.values(), strict=True)]
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[:4]))
    (tmp_path / 'own.gin').write_text(
        f"Experiment.model = '{model}'\nFinetuning.source = '{tmp_path}'\nFinetuning.max_length = 8\n"
        'Finetuning.batch_size = 4\nFinetuning.optimizer = @adamw\nadamw.learning_rate = 1e-2\n'
        "Compute.dtype = 'float32'\n"
    )
    folder = tmp_path / 'run'
    bindings = ['Finetuning.stop_at_accuracy = 1.0', 'Run.steps = 200', f"Run.folder = '{folder}'", 'adamw.b2 = 0.98']
    monkeypatch.setattr(sys, 'argv', ['finetune', str(tmp_path / 'own.gin'), *bindings])
    experiments.finetune.main()
    metrics = read_metrics(folder / 'metrics.jsonl')
    assert 5 < len(metrics) < 200 and metrics[-1]['update/accuracy'] == 1 > metrics[-2]['update/accuracy']
    assert metrics[-1]['update/loss'] < 1 < 2 < metrics[0]['update/loss']
    opened = AutoModelForCausalLM.from_pretrained(folder / 'export')
    tokenizer = AutoTokenizer.from_pretrained(folder / 'export')
    for row in rows[:4]:
        tokens = tokenizer(row['prompt'], return_tensors='pt')
        written = opened.generate(**tokens, max_new_tokens=4, do_sample=False)[0, 4:]
        assert tokenizer.decode(written) == row['completion'] + tokenizer.eos_token
    # The same logits as those of our own decoder with the parameters of the checkpoint.
    params = everything(folder, metrics[-1]['step'])['params']
    config = settings(str(folder / 'export')).load_model(ONE_DEVICE).config
    decoder = decoders.bind(decoders.abstract(config)[0], jax.tree.map(jnp.asarray, params))
    ids, index = np.asarray(tokens['input_ids'], np.int32), jnp.arange(4)[None]
    ours = decoder(ids, index, jnp.ones_like(index)) @ decoder.unembedding.T
    with torch.no_grad():
        np.testing.assert_allclose(ours, opened(torch.tensor(ids, dtype=torch.long)).logits, atol=1e-4)


def test_settings_that_contradict_each_other(tmp_path, model):
    """Guards settings of sampling, which would be read by nothing, and two sources or none."""
    rows = datasets.Dataset.from_dict(DEMONSTRATIONS)
    with pytest.raises(ValueError, match='Run.keep_best .* need rollouts'):
        finetune(settings(model), ONE_DEVICE, Run(folder=tmp_path / 'run', steps=1, keep_best=True), rows)
    with pytest.raises(ValueError, match='expected one of the two'):
        finetune(settings(model), ONE_DEVICE, Run(folder=tmp_path / 'run', steps=1))
    with pytest.raises(ValueError, match='asks for texts of 99 tokens, but .* has positions for 8; lower'):
        finetune(settings(model, max_length=99), ONE_DEVICE, Run(folder=tmp_path / 'run', steps=1), rows)
    with pytest.raises(ValueError, match='stop_at_accuracy must be a share'):
        settings(model, stop_at_accuracy=95.0)
