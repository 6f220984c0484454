"""LoRA against the dense model that its adapters are merged into, and through a whole run."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from faults.runs import everything
from loop import ARITHMETIC, HASH, assert_same, run, without_times
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from updates import CONFIG, PACKED, RESPONSE, SCORING, SGD, assert_same_step, batch, policy_params, rollout, start

from experiments.evaluate import evaluation
from experiments.export import export
from experiments.plumbing.gin_files import Config
from experiments.replay import replay
from experiments.studies.program_cost import count_flops
from troll_jax.critic import Critic
from troll_jax.models import decoder as decoders
from troll_jax.models.lora import Lora, merge, split
from troll_jax.ops.advantages import gae
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import troll
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import BatchShape
from troll_jax.rollout import Sampler
from troll_jax.settings import Method
from troll_jax.sharding import make_mesh, place
from troll_jax.types import Prompts, join
from troll_jax.update import make_gradient, make_update

LORA = Lora(rank=3, alpha=7.0)
ADAPTED = dataclasses.replace(CONFIG, lora=LORA)


@functools.cache
def adapters(scale=0.2, config=ADAPTED):
    """Adapters of which neither factor is zero."""
    drawn = decoders.init(config, jax.random.key(5), trained_only=True)
    return jax.tree.map(lambda x: x + scale * jnp.sin(jnp.arange(x.size) + 1.0).reshape(x.shape), drawn)


def whole():
    return join(policy_params(), adapters())


@functools.cache
def update():
    return make_update(ADAPTED, SGD, troll, SCORING)


@functools.cache
def updated(shape=PACKED[2], mesh_shape=None):
    """Adapters after one update, its metrics, and the base after it; on a mesh or without one."""
    state = start(adapters(), SGD)._replace(base=jax.tree.map(jnp.copy, policy_params()))
    if mesh_shape is None:
        state, log = update()(state, batch(shape))
    else:
        mesh = make_mesh(*mesh_shape)
        base, trained = split(decoders.abstract(ADAPTED, mesh)[1])
        put = functools.partial(jax.tree.map, lambda x, like: jax.device_put(np.array(x), like.sharding))
        with jax.set_mesh(mesh):
            state = state._replace(params=put(state.params, trained), base=put(state.base, base))
            state, log = update()(state, place(batch(shape), mesh))
        kept = jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim), state.params, trained)
        assert all(jax.tree.leaves(kept))
    # How often the projection is evaluated changes with rounding.
    metrics = {name: x for name, x in log.metrics.items() if not name.startswith('evaluations')}
    return jax.tree.map(np.asarray, ((state.params, metrics), state.base))


def test_the_gradient_is_that_of_the_merged_weights():
    """Guards the scale, the two factors, packing and micro-batches of adapters; and weights that are to be frozen.

    By the chain rule through W + s A B, from the gradient of a dense model that knows no adapters, on padded rows.
    """
    merged, back = jax.vjp(lambda params: merge(join(policy_params(), params), LORA), adapters())
    state = start(merged, SGD)
    dense = jax.jit(make_gradient(CONFIG, troll, SCORING))(merged, state.progress, batch())
    expected = jax.tree.map(lambda x, change: np.asarray(x - change), adapters(), back(dense.params)[0])
    (params, metrics), base = updated()
    norm = np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (params, adapters())), strict=True)))
    assert norm > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * norm, rtol=0), params, expected)
    np.testing.assert_allclose(metrics['loss'], dense.loss, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, base, policy_params())


def test_mesh_does_not_matter():
    """Guards sums over sharded inputs of A and outputs of B; the adapters keep their layout."""
    shape = BatchShape(2, 4, 13)
    assert_same_step(updated(shape, (2, 2, 2))[0], updated(shape)[0])


def test_no_gradient_of_frozen_weights_is_computed():
    """Guards the third of the products that adapters save: of three for each weight, two are left."""
    data = batch()

    def flops(config, params, base=None):
        gradient = jax.jit(make_gradient(config, troll, SCORING))
        traced = gradient.trace(params, start(params, SGD).progress, data, base)
        return sum(count_flops(traced.jaxpr.jaxpr, 1))

    tiny = dataclasses.replace(CONFIG, lora=Lora(rank=1))
    dense, adapted = flops(CONFIG, policy_params()), flops(tiny, adapters(config=tiny), policy_params())
    assert adapted < 0.85 * dense, adapted / dense


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_first_policy_is_the_start_model(dtype):
    """Guards against adapters that are not zero at first, in training's forward pass or in the sampler's weights."""
    config = dataclasses.replace(ADAPTED, compute_dtype=dtype)
    plain = dataclasses.replace(config, lora=None)
    base = decoders.cast_weights(policy_params(), dtype)
    params = join(base, decoders.init(config, jax.random.key(5), trained_only=True))
    tokens = rollout().tokens
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = lambda config, params: decoders.bind(decoders.abstract(config)[0], params)(tokens, index, index * 0 + 1)
    np.testing.assert_array_equal(hidden(config, params), hidden(plain, policy_params()))
    assert_same(decoders.decode_weights(params, config), decoders.decode_weights(base, plain))


def test_greedy_responses_are_those_of_the_forward_pass():
    """Guards the merge into the weights of decoding: a scale or a layer that is left out."""
    sampler = Sampler(
        ADAPTED,
        samples_per_prompt=1,
        max_response_length=RESPONSE,
        temperature=0.0,
        stop_tokens=[CONFIG.vocab_size + 1],
        support_size=1,
        support_mass=1.0,
    )
    prompts = Prompts(rollout().tokens[:4, :2], np.full(4, 2, np.int32))
    found = sampler(whole(), prompts, jax.random.split(jax.random.key(0), 4))
    index = jnp.broadcast_to(jnp.arange(2 + RESPONSE), found.tokens.shape)
    decoder = decoders.bind(decoders.abstract(ADAPTED)[0], whole())
    scores = decoder(jnp.asarray(found.tokens), index, jnp.ones_like(index)) @ decoder.unembedding.T
    expected = np.asarray(jax.nn.log_softmax(scores))[:, 1:-1]
    assert_same(found.tokens[:, 2:], expected.argmax(-1))
    np.testing.assert_allclose(found.log_probs, expected.max(-1), atol=1e-4)
    assert np.abs(expected - np.asarray(jax.nn.log_softmax(dense_scores(found.tokens)))[:, 1:-1]).max() > 0.1


def dense_scores(tokens):
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder = decoders.bind(decoders.abstract(CONFIG)[0], policy_params())
    return decoder(jnp.asarray(tokens), index, jnp.ones_like(index)) @ decoder.unembedding.T


def test_settings_that_cannot_be():
    """Guards a pattern that adapts nothing, and a critic that is trained in full beside adapters."""
    some = dataclasses.replace(CONFIG, lora=Lora(targets=['*e*', 'up']))
    paths = {path[3] for path, _ in jax.tree_util.tree_flatten_with_path(split(decoders.abstract(some)[1])[1])[0]}
    assert {path.key for path in paths} == {'query', 'key', 'value', 'gate', 'up'}
    with pytest.raises(ValueError, match=r"no weight of a layer matches 'gates'; expected some of \['query', "):
        decoders.abstract(dataclasses.replace(CONFIG, lora=Lora(targets=['query', 'gates'])))
    with pytest.raises(ValueError, match='Lora.rank is 2.5; expected a whole number'):
        Lora(rank=2.5)
    with pytest.raises(ValueError, match='Lora.rank must be above 0; got 0'):
        Lora(rank=0)
    with pytest.raises(ValueError, match='Method.lora is to avoid'):
        parts = {'objective': troll, 'advantages': gae, 'aggregation': token_mean, 'tail_rule': default_tail}
        Method(**parts, optimizer=adamw, minibatch_prompts=1, critic=Critic(), lora=LORA)


BINDINGS = [
    'Method.lora = @Lora()',
    'Lora.rank = 3',
    'Lora.alpha = 7.0',
    'Method.regularisers = [@kl_to_reference]',
    'kl_to_reference.coefficient = 0.01',
    'Method.refresh_reference_every = 3',
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, model):
    """A run of four steps, its folder and metrics, and its start model, a copy that a test may change."""
    folder = tmp_path_factory.mktemp('lora')
    start_model = shutil.copytree(model, folder / 'start')
    task = [*HASH, 'Run.evaluate_every = 2', 'Run.save_rollout_every = 2']
    metrics = run(folder / 'run', str(start_model), *BINDINGS, task=task)
    return folder / 'run', metrics, start_model, task


def test_a_run_learns_resumes_and_is_evaluated_and_replayed(tmp_path, trained):
    """Guards adapters, moments or a reference that start anew, a base in the checkpoint, and other commands' base."""
    folder, whole_run, start_model, task = trained
    assert all(row['update/gradient_norm'] > 1e-6 and row['update/kl_noise'] < 1e-6 for row in whole_run[1:])
    run(tmp_path, str(start_model), *BINDINGS, 'Run.steps = 2', task=task)
    parts = run(tmp_path, str(start_model), *BINDINGS, task=task)
    assert without_times(parts) == without_times(whole_run)
    states = [everything(path, 4) for path in (tmp_path, folder)]
    assert_same(*states)
    assert states[0].keys() == {'progress', 'params', 'opt_state', 'reference'}
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(states[0]['params'])[0]}
    assert len(names) == 14 and all("['lora']" in name for name in names)
    found = evaluation(str(folder), Config([folder / 'config.gin']), step=2)
    assert found['test']['success']['mean'] == pytest.approx(whole_run[2]['eval/success'])
    assert replay(folder, objectives=['troll'])['kl_at_start'] < 1e-6


def test_exports_open_elsewhere(tmp_path, trained):
    """Guards names, transposes and the scale of both exports: transformers and PEFT give the same logits."""
    folder, _, start_model, _ = trained
    export(folder, tmp_path / 'merged')
    export(folder, tmp_path / 'adapters', adapters=True)
    tokens = torch.arange(1, 8)[None]
    with torch.no_grad():
        logits = lambda model: model.eval()(tokens).logits.numpy()
        before, after = (
            logits(AutoModelForCausalLM.from_pretrained(path)) for path in (start_model, tmp_path / 'merged')
        )
        assert np.abs(after - before).max() > 1e-2
        peft = pytest.importorskip('peft')
        opened = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(start_model), tmp_path / 'adapters'
        )
        np.testing.assert_allclose(logits(opened), after, atol=1e-5)
    described = json.loads((tmp_path / 'adapters/adapter_config.json').read_text())
    assert described['base_model_name_or_path'] == str(start_model)


def test_another_base_or_none_is_an_error(tmp_path, trained):
    """Guards adapters on top of weights that they were not trained with."""
    folder, _, start_model, task = trained
    copy = shutil.copytree(start_model, tmp_path / 'copy')
    weights = load_file(copy / 'model.safetensors')
    weights['model.norm.weight'] = weights['model.norm.weight'] * 1.01
    save_file(weights, copy / 'model.safetensors', metadata={'format': 'pt'})
    config = lambda path: Config([folder / 'config.gin'], [f"Experiment.model = '{path}'"])
    with pytest.raises(ValueError, match='4 holds adapters of another start model'):
        evaluation(str(folder), config(copy))
    with pytest.raises(FileNotFoundError, match='gone'):
        evaluation(str(folder), config(tmp_path / 'gone'))
    with pytest.raises(ValueError, match='was trained without Method.lora'):
        run(tmp_path / 'dense', str(start_model), 'Run.steps = 1', task=ARITHMETIC)
        export(tmp_path / 'dense', tmp_path / 'nothing', adapters=True)
