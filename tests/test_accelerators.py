"""Compiled programs of training and sampling for accelerators that are not there: shardings, precision, cuDNN."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from tiny import CUDNN, decoder_config

from experiments.studies.program_cost import compile_program, describe, program_cost, sub_jaxprs
from troll_jax.critic import Critic
from troll_jax.learn import Learner
from troll_jax.models import decoder as decoders
from troll_jax.models.attention import cudnn_attention
from troll_jax.models.head import sparse_head
from troll_jax.models.layers import COMPUTE_DTYPES
from troll_jax.ops import categorical
from troll_jax.ops.advantages import gae
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import ppo_clip, troll
from troll_jax.ops.regularisers import kl_to_reference
from troll_jax.ops.support import default_tail
from troll_jax.ops.top_k import SORTED_AT_ONCE
from troll_jax.optimizer import adamw, apply_gradients, state_shapes
from troll_jax.rollout import Sampler
from troll_jax.settings import Compute, Method, Sampling, scoring
from troll_jax.sharding import make_mesh, named_sharding
from troll_jax.types import CriticState
from troll_jax.update import make_gradient

TOPOLOGIES = ['h100:8', 'v5e:2x4']
SIZES = {'width': 256, 'heads': 8, 'kv_heads': 8, 'head_dim': 32, 'mlp_width': 384}
KEPT, PROMPT, RESPONSE = 8, 16, 16
WHOLE = ('recompute', 'reference', 'values', 'critic', 'update')  # programs that read whole sequences


@pytest.fixture(autouse=True)
def no_cache():
    """Turns off JAX's cache: programs for absent devices cannot be read from it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    yield
    jax.config.update('jax_enable_compilation_cache', before)


def compiled(program, arguments):
    return compile_program(program.trace(*arguments))


SAMPLING = Sampling(prompts_per_step=16, samples_per_prompt=2, support_size=KEPT)
METHOD = Method(
    objective=troll,
    advantages=gae,
    aggregation=token_mean,
    tail_rule=default_tail,
    optimizer=adamw,
    minibatch_prompts=16,
    old_policy='recompute',
    regularisers=[partial(kl_to_reference, coefficient=0.1)],
    critic=Critic(),
)


def learner(config, compute: Compute) -> Learner:
    lengths = {'max_prompt_length': PROMPT, 'max_response_length': RESPONSE}
    return Learner(config, SAMPLING, METHOD, compute, **lengths)


def compute_on(devices, **sizes: int) -> Compute:
    """Two micro-batches of eight rows on these devices."""
    tokens = 64 * 8 * sizes.get('tensor', 1) // len(devices)  # on each
    return Compute(devices=devices, row_tokens=64, micro_batch_tokens=tokens, head_chunk=64, **sizes)


@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('name', ['update', 'critic'])
def test_what_is_compiled_for_an_update(topology, name):
    """Guards against a state that is whole on every device after one update: GPUs' compiler replicated what came out of
    the branch that skips gradients which are not finite. And against products of float32 in lower precision, where a
    compiler has rewritten them. And where rows are split, hidden states of whole rows."""
    compute = compute_on(describe(topology)[1], tensor=2, context=2 if topology == 'v5e:2x4' else 1)
    with jax.sharding.use_abstract_mesh(compute.mesh.abstract_mesh):
        program, arguments = learner(decoder_config(1024, **SIZES), compute).programs()[name]
        result = compiled(program, arguments)
    state, text = arguments[0], result.as_text()
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(result.output_shardings[0]), strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim), leaf
    # Weights are gathered a layer at a time. A replicated state would be gathered by the stacks of all layers.
    layers = (state.params if name == 'update' else state.params['decoder'])['layers']
    stacks = {leaf.shape for leaf in jax.tree.leaves(layers) if leaf.ndim == 3}
    gathered = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]\S* all-gather(?:-start)?\(', text)
    gathered = {tuple(map(int, sizes.split(','))) for sizes in gathered}
    assert gathered and not stacks & gathered and (64, SIZES['width']) not in {sizes[-2:] for sizes in gathered}

    found = re.findall(r' f32\S* (?:dot|convolution)\(.*', text)
    assert len(found) > 10 and all('operand_precision={highest,highest}' in line for line in found)


def test_gradients_are_in_memory_once():
    """Guards the memory of an update on one GPU: the sum over micro-batches and nothing else of the parameters' size.
    There were three, with the gradient of one micro-batch and zeros for a weight decay of 0."""
    compute = Compute(devices=describe('h100:1')[1], micro_batch_tokens=64, head_chunk=64)
    config = decoder_config(256, **SIZES | {'layers': 16, 'mlp_width': 2048, 'remat': 'full'})
    with jax.sharding.use_abstract_mesh(compute.mesh.abstract_mesh):
        program, arguments = learner(config, compute).programs()['update']
        temporary = compiled(program, arguments).memory_analysis().temp_size_in_bytes
    assert temporary < 1.3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0].params))


def test_a_gradient_alone_is_sharded_as_the_parameters():
    """Guards the replay of a rollout, which keeps the gradient of every objective."""
    compute = compute_on(describe('h100:8')[1])
    config = decoder_config(1024, **SIZES | {'layers': 1})
    gradient = jax.jit(make_gradient(config, ppo_clip, scoring(SAMPLING, METHOD, compute)))
    with jax.sharding.use_abstract_mesh(compute.mesh.abstract_mesh):
        _, (state, batch) = learner(config, compute).programs()['update']
        result = compiled(gradient, (state.params, state.progress, batch))
    shardings = jax.tree.leaves(result.output_shardings.params)
    for leaf, sharding in zip(jax.tree.leaves(state.params), shardings, strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim), leaf


@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_the_embedding_travels_in_the_compute_dtype(topology):
    """Guards masters that are gathered in float32, at twice the bytes, and gradients that are summed in bfloat16."""
    mesh = make_mesh(devices=describe(topology)[1])
    config = decoder_config(1024, layers=0, compute_dtype='bfloat16', **SIZES)
    graphdef, params = decoders.abstract(config, mesh)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32, sharding=named_sharding(mesh, ('batch', None)))
    loss = lambda params, tokens: jnp.sum(decoders.bind(graphdef, params)(tokens, tokens, tokens).astype(jnp.float32))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compiled(jax.jit(jax.grad(loss)), (params, tokens)).as_text()

    def dtypes(kind: str) -> set[str]:
        arrays = re.findall(r'([a-z]+\d+)\[([\d,]+)\]', ' '.join(re.findall(rf' = (.*) {kind}(?:-start)?\(', text)))
        return {dtype for dtype, sizes in arrays if math.prod(map(int, sizes.split(','))) >= 1024 * SIZES['width']}

    assert dtypes('all-gather') == {'bf16'} and dtypes('all-reduce') == {'f32'}


@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_a_step_of_the_optimizer_gathers_nothing(topology):
    """Guards the step alone, which needs no part of another device but the gradient's norm."""
    mesh = make_mesh(devices=describe(topology)[1])
    params = {'a': jax.ShapeDtypeStruct((24, 512), jnp.float32, sharding=named_sharding(mesh, ('layers', 'embed')))}
    optimizer = adamw()
    state = CriticState(params, state_shapes(optimizer, params))
    step = jax.jit(lambda *arguments: apply_gradients(optimizer, *arguments, lambda _: state), donate_argnums=1)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compiled(step, (params, state)).as_text()
    assert 'all-gather' not in text and 'all-reduce' in text


@pytest.mark.skipif(not CUDNN, reason='cuDNN is not installed')
def test_attention_by_cudnn_compiles():
    """Guards what a GPU takes for bfloat16: each device with its rows and heads, an odd length, and the derivative."""
    mesh = make_mesh(1, 4, 2, devices=describe('h100:8')[1])
    shape = lambda heads: jax.ShapeDtypeStruct(
        (8, 63, heads, 64), jnp.bfloat16, sharding=named_sharding(mesh, ('batch', None, 'heads', None))
    )
    segments = jax.ShapeDtypeStruct((8, 63), jnp.int32, sharding=named_sharding(mesh, ('batch', None)))
    loss = lambda q, k, v, segments: jnp.sum(cudnn_attention(q, k, v, segments).astype(jnp.float32))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = compiled(gradient, (shape(4), shape(2), shape(2), segments)).as_text()
    assert '__cudnn$fmha' in text and 'Backward' in text and 'all-gather' not in text


def test_what_the_head_moves():
    """Guards passes over the logits of a chunk: one writes them and one reads them, forward and backward, and their
    gradient is written and read by two products in bfloat16. And copies of the gradient of the unembedding."""
    chunk, width, vocab = 1024, 1024, 32_768
    mesh = make_mesh(devices=describe('h100:1')[1])
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=named_sharding(mesh, [None] * len(sizes)))

    def total(hidden, unembedding, tokens, old):
        settings = dict(temperature=1.0, support_size=64, support_mass=0.9, chunk=chunk, dtype='bfloat16')
        output = sparse_head(hidden, unembedding, tokens, old, tokens >= 0, **settings)
        return jnp.sum(output.log_probs + output.entropy) + jnp.sum(output.on_old_support + output.own.log_probs)

    hidden, tokens, old = (
        shape(*x) for x in [(jnp.bfloat16, 1, 8 * chunk, width), (int, 1, 8 * chunk), (int, 1, 8 * chunk, 64)]
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
        text = compiled(gradient, (hidden, shape(jnp.float32, vocab, width), tokens, old)).as_text()
    passes, products, sums = 5.5 * 4 * chunk * vocab, 3 * 2 * vocab * width, 2 * 4 * vocab * width
    assert sum(cost.bytes for cost in program_cost(text)) / 8 < 1.3 * (passes + products + sums)


def test_a_draw_reads_the_logits_once():
    """Guards the sampler's passes over the vocabulary, and sorts of a row that take several kernels."""

    def choose(uniforms, logits):
        blocks = categorical.summarise(logits, one_pass=True)
        return categorical.draw(uniforms, blocks), categorical.largest(blocks, 64), blocks.entropy

    mesh = make_mesh(devices=describe('h100:1')[1])
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=named_sharding(mesh, (None, None)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compiled(jax.jit(jax.vmap(choose)), (shape(64, 2), shape(64, 151_936))).as_text()
    rows = [int(size) for size in re.findall(r'= \(f32\[64,(\d+)\]\S*, \S+ sort\(', text)]
    assert rows and max(rows) <= SORTED_AT_ONCE
    once, _ = program_cost(text)
    assert once.bytes < 1.5 * 4 * 64 * 151_936


def products(jaxpr, in_kernel=False):
    """All matrix products of a program, also those in loops, branches and kernels; and whether it is in a kernel."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield equation, in_kernel
        for inner in sub_jaxprs(equation.params):
            yield from products(inner, in_kernel or equation.primitive.name == 'pallas_call')


@pytest.mark.parametrize('dtype', COMPUTE_DTYPES)
@pytest.mark.parametrize('attention', ['xla', 'splash'])
def test_float32_is_float32(attention, dtype):
    """Guards products of float32 that a TPU takes in bfloat16 and a GPU in TF32, in any program, forward and backward;
    and the speed of bfloat16, which asks for nothing."""
    compute = compute_on(jax.devices()[:1])
    config = decoder_config(40, compute_dtype=dtype, attention=attention, **SIZES)
    sampler = Sampler(
        config,
        samples_per_prompt=2,
        max_response_length=RESPONSE,
        temperature=1.0,
        stop_tokens=[0],
        support_size=KEPT,
        support_mass=1.0,
    )
    with jax.sharding.use_abstract_mesh(compute.mesh.abstract_mesh):
        built = learner(config, compute)
        programs = built.programs()
        programs |= sampler.programs(built.shapes.params, sampler.sizes(2, PROMPT))
        for name, (program, arguments) in programs.items():
            found = list(products(program.trace(*arguments).jaxpr.jaxpr))
            assert found and any(in_kernel for _, in_kernel in found) == (attention == 'splash' and name in WHOLE)
            for equation, in_kernel in found:
                is_float32 = all(x.aval.dtype == jnp.float32 for x in equation.invars)
                assert is_float32 or dtype == 'bfloat16'
                highest = equation.params['precision'] == (jax.lax.Precision.HIGHEST,) * 2
                on_cpu = dtype == 'bfloat16' and name in ('prefill', 'decode')  # whose caches are float32 there
                if is_float32 and (dtype == 'float32' or attention == 'xla') and not on_cpu:
                    assert highest, (name, equation)
                elif in_kernel or not is_float32:  # splash attention multiplies some in float32, for whatever they are
                    assert not highest, (name, equation)
