"""Generated problems of the package reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760): about a hundred data
sets, from sums to Sudoku, each with a verifier of its own.

A row's answer says how its problem is generated again, as JSON, because many entries cannot be written as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from troll_jax.data.tasks.arithmetic import is_held_out
from troll_jax.data.tasks.interface import as_messages, check_asked_for, check_split
from troll_jax.rewards.answers import PLACES, find_answer
from troll_jax.rewards.worker import CannotGrade
from troll_jax.typechecks import check_fields

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)

INSTRUCTION = 'Reason step by step, and write the final answer between <answer> and </answer>.'

_TAG = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)
_OWN_PLACES = ('<answer>', 'response')
_CHUNK = 500  # problems of one random seed; those of `acre` depend on their number
_PATIENCE = 2000  # problems in a row that are not new, until there are taken to be no more

# Their problems, or what a problem's entry says, follow the order of Python's sets.
_BY_HASHES = {'isomorphic_strings', 'knight_swap', 'polynomial_multiplication', 'ransom_note', 'word_ladder'}

# They evaluate an answer as Python, as sympy's parser does, so this is all that one may consist of. In sums nothing
# makes a number of its own (2**3, -~2, which is 3); lists hold numbers and the letters of cells; and formulas have no
# text (which S evaluates), no name of sympy's, and no Integral, by which a question would be its own answer.
_FUNCTIONS = 'sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi'.replace(' ', '|')
_SUM = re.compile(r'(?!.*(\*\s*\*|/\s*/))[\d\s()+\-*/.]*', re.DOTALL)
_LIST = re.compile(r'[\d\s\[\](),.\'"A-EQ_-]*')
_FORMULA = re.compile(rf'((?<![a-zA-Z_])({_FUNCTIONS}|[a-zA-Z])(?![a-zA-Z_])|[\d\s()+\-*/^.,])*')
_EVALUATED = {
    **dict.fromkeys(('countdown', 'puzzle24'), _SUM),
    **dict.fromkeys(('binary_matrix', 'n_queens', 'spiral_matrix', 'string_insertion'), _LIST),
    **dict.fromkeys(('intermediate_integration', 'polynomial_multiplication', 'simple_integration'), _FORMULA),
}

# They give full marks to wrong answers: any text, any four numbers that make 24, no number, a probability that is near.
_MISSING_CHECKS: dict[str, Callable[[str, dict], bool]] = {
    'game_of_life_halting': lambda answer, entry: answer == entry['answer'],
    'puzzle24': lambda answer, entry: (
        sorted(map(int, re.findall(r'\d+', answer))) == sorted(entry['metadata']['numbers'])
    ),
    'coin_flip': lambda answer, entry: math.isclose(Fraction(answer), Fraction(entry['answer']), rel_tol=1e-4),
    'complex_arithmetic': lambda answer, entry: 'nan' not in answer.lower(),
}


@dataclass(frozen=True)
class ReasoningGym:
    """A mix of reasoning-gym's data sets, graded by their own `score_answer`. Needs `pip install reasoning-gym`.

    A problem is held out by a stable hash of its question, so none of the test split is a training problem of any seed,
    also where there are few of them. To load test problems takes eight times as many tries.

    Args:
        datasets: (name, weight, parameters) of each data set; its share of the problems is proportional to the weight,
            and parameters are those of its configuration in reasoning-gym, but for size and seed.
        levels: levels of difficulty by reasoning-gym's curricula, each with the same share of the problems, which have
            a column `level`; a level with fewer problems has all of them. `parameters` win over what a curriculum sets.
            (): no curriculum.
        train_size: distinct problems that `load('train')` gives.
        test_size: distinct problems that `load('test')` gives.
        seed: random seed of the draw; the split does not depend on it.
        instruction: text under every question; None for the bare question.
        system_prompt: content of the system message; None for none. Those of the package's own evaluations are in
            `reasoning_gym.utils.SYSTEM_PROMPTS`.
        places: where the answer is: '<answer>' is the last <answer>…</answer>; if there is none, markers of
            `rewards.answers.find_answer` are looked for in their order; without any, 'response' is the whole response.
        partial: true: the reward is the score, of which many data sets give a little for any answer, and not 1 for full
            marks and else 0.
        deadline: time limit of one grading, in seconds.

    Raises:
        ValueError: reasoning-gym is not installed, or a name, a parameter, or another value that does not exist or fit.
    """

    datasets: Sequence[tuple[str, float, Mapping[str, Any]]]
    levels: Sequence[int] = ()
    train_size: int = 20_000
    test_size: int = 512
    seed: int = 0
    instruction: str | None = INSTRUCTION
    system_prompt: str | None = None
    places: tuple[str, ...] = _OWN_PLACES
    partial: bool = False
    deadline: float | None = 5.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.places or not set(self.places) <= {*_OWN_PLACES, *PLACES}:
            raise ValueError(f'places is {self.places!r}; expected one or more of {(*_OWN_PLACES, *PLACES)}.')
        if min(self.train_size, self.test_size) < 1:
            raise ValueError(
                f'train_size is {self.train_size} and test_size {self.test_size}; expected at least 1 of each.'
            )
        if not self.datasets or min(weight for _, weight, _ in self.datasets) <= 0:
            raise ValueError(
                f'datasets is {self.datasets!r}; expected (name, weight, parameters) of one or more data sets, with '
                'weights above zero.'
            )
        for name, _, parameters in self.datasets:
            configurations = [vars(_configuration(name, parameters, level)) for level in self.levels or [None]]
            if any(one in configurations[:i] for i, one in enumerate(configurations)):
                raise ValueError(
                    f'levels is {self.levels!r}, of which some are the same for {name!r}; expected levels that differ. '
                    'Leave out the highest.'
                )

    def __setstate__(self, state: dict) -> None:
        """In a grading worker the package is imported before the first deadline runs."""
        self.__dict__.update(state)
        _package()

    def load(self, split: str) -> Dataset:
        """Rows of 'train' or 'test' with `messages`, `answer` and, with curricula, `level`.

        Raises:
            ValueError: a data set has fewer distinct problems than its share, or none at some level.
        """
        from datasets import Dataset

        check_split(split)
        size = self.train_size if split == 'train' else self.test_size
        parts = [(*dataset, level) for dataset in self.datasets for level in self.levels or [None]]
        weights = [weight for _, weight, _, _ in parts]
        ends = [round(size * total / sum(weights)) for total in itertools.accumulate(weights)]
        problems: dict[str, tuple[str, int | None]] = {}  # of each question
        for part, (name, _, parameters, level) in enumerate(parts):
            share, first, last_new = ends[part] - (ends[part - 1] if part else 0), len(problems), 0
            for tries, (question, answer) in enumerate(self._stream(f'{split} {part}', name, parameters, level)):
                got = len(problems) - first
                if got == share:
                    break
                if question not in problems and is_held_out(question) == (split == 'test'):
                    problems[question], last_new = (answer, level), tries
                elif tries - last_new == _PATIENCE:
                    what = f'{name!r} with {dict(parameters)}' + (f' at level {level}' if self.levels else '')
                    what += f' gives {got} distinct problems for split {split!r} where {share} are its share'
                    if not self.levels or not got:
                        raise ValueError(
                            f'{what}. Lower {split}_size or its weight, or give it parameters with which it has more.'
                        )
                    _logger.warning('%s; it stays at these', what)
                    break
        messages = [as_messages(question, self.instruction, self.system_prompt) for question in problems]
        if 'response' not in self.places:
            check_asked_for(messages, self.places, f'split {split!r}')
        answers, levels = zip(*problems.values(), strict=True)
        columns = {'messages': messages, 'answer': answers} | ({'level': levels} if self.levels else {})
        return Dataset.from_dict(columns)

    def _stream(self, draw: str, name: str, parameters: Mapping, level: int | None) -> Iterator[tuple[str, str]]:
        """Questions and answers, without end."""
        for chunk in itertools.count():
            # Not seeds that follow each other: problem i of seed s is mostly problem i + 1 of seed s - 1.
            digest = hashlib.blake2b(f'{self.seed} {draw} {chunk}'.encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, 'big') % 2**31
            source = {'dataset': name, 'parameters': dict(parameters), 'level': level, 'seed': seed}
            for index in range(_CHUNK):
                entry = _entry(json.dumps(source), index)
                if name in _EVALUATED and not _EVALUATED[name].fullmatch(str(entry['answer'])):
                    continue  # an integral that the package could not solve
                problem = {'answer': entry['answer'], 'index': index, **source}
                yield entry['question'], json.dumps(problem, ensure_ascii=False)

    def grade(self, response: str, answer: str) -> float:
        """1.0 for an answer with full marks, else 0.0, or the score if `partial`. An answer that the data set's
        verifier fails on is wrong.

        Raises:
            CannotGrade: another problem was generated than that which was asked.
        """
        problem = json.loads(answer)
        expected, index, name = problem.pop('answer'), problem.pop('index'), problem['dataset']
        source = json.dumps(problem)
        entry = copy.deepcopy(_entry(source, index))  # verifiers may change it
        if entry['answer'] != expected:
            raise CannotGrade(
                f'reasoning-gym generates the problem {answer[:200]} with the answer {str(entry["answer"])[:80]!r}; '
                'expected the same package and PYTHONHASHSEED as where it was loaded.'
            )
        found = self._find(response)
        if not found or (name in _EVALUATED and not _EVALUATED[name].fullmatch(found)):
            return 0.0
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                score = float(_dataset(source).score_answer(found, entry))
            full = score >= 1 - 1e-6
            if full and name in _MISSING_CHECKS and not _MISSING_CHECKS[name](found, entry):
                return 0.0
        except Exception:
            return 0.0
        return score if self.partial else float(full)

    def _find(self, response: str) -> str | None:
        if '<answer>' in self.places and (tags := _TAG.findall(response)):
            return tags[-1].strip()
        markers = [place for place in self.places if place not in _OWN_PLACES]
        if markers and (found := find_answer(response, markers)) is not None:
            return re.sub(r'(?<=\d),(?=\d{3}(?!\d))', '', found)  # verifiers compare digits
        return response.strip() if 'response' in self.places else None


def _package() -> Any:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise ValueError(f'The task ReasoningGym needs a package ({error}): pip install reasoning-gym') from error
    return reasoning_gym.factory


def _configuration(name: str, parameters: Mapping[str, Any], level: int | None, seed: int = 0) -> Any:
    """The configuration of a data set in reasoning-gym, checked. Raises a ValueError, see `ReasoningGym`."""
    factory = _package()
    known = [name for name in factory.DATASETS if name != 'composite']  # which is a mix of others
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or sorted(known)
        raise ValueError(f'reasoning-gym has no data set {name!r}; expected one like {near}.')
    if name in _BY_HASHES and os.environ.get('PYTHONHASHSEED', 'random') == 'random':
        raise ValueError(
            f'The problems of {name!r} depend on how Python hashes text, which differs between processes; start with '
            'PYTHONHASHSEED=0 in the environment, or leave it out.'
        )
    kind = factory.DATASETS[name][1]
    defaults = {field: value for field, value in vars(kind()).items() if field not in ('seed', 'size')}
    try:
        if unknown := set(parameters) - set(defaults):
            raise ValueError(f'it has no {sorted(unknown)}')
        json.dumps(dict(parameters))  # or it could not be generated again
        if level is None:
            config = kind(**parameters)
        else:
            curriculum = factory.create_curriculum(name)
            curriculum.set_global_level(level)
            config = dataclasses.replace(curriculum.generate_configuration(), **parameters)
        config = dataclasses.replace(config, seed=seed, size=_CHUNK)
        getattr(config, 'validate', lambda: None)()  # two have none
    except Exception as error:  # assertions and whatever else its checks raise
        accepted = ', '.join(f'{field} = {value!r}' for field, value in defaults.items())
        at = '' if level is None else f' at level {level}'
        raise ValueError(
            f'The data set {name!r} of reasoning-gym{at} does not take {dict(parameters)} ({error}). Its parameters '
            f'and their defaults: {accepted or "none"}.'
        ) from error
    return config


@functools.lru_cache(maxsize=64)
def _dataset(source: str) -> Any:
    source = json.loads(source)
    config = _configuration(source['dataset'], source['parameters'], source['level'], source['seed'])
    with _reproducible(f'{source["seed"]}'):
        return _package().DATASETS[source['dataset']][0](config)


@functools.lru_cache(maxsize=1024)
def _entry(source: str, index: int) -> dict[str, Any]:
    """A problem: `question`, `answer` and `metadata`."""
    dataset = _dataset(source)
    with _reproducible(f'{source} {index}'):
        return dataset[index]


@contextlib.contextmanager
def _reproducible(seed: str) -> Iterator[None]:
    """Some data sets draw from Python's own generator, and some print."""
    state = random.getstate()
    random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(state)
