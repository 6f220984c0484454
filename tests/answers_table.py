"""The golden answers that this grader and math-verify alone misjudge, by kind, for docs/grading.md.

    python -m tests.answers_table

Each cell: wrong answers that pass / right ones that fail.
"""

from collections import Counter, defaultdict

from math_verify import parse, verify

from tests.test_answers import GOLDEN, response
from troll_jax.rewards.math import grade_math

GRADERS = {
    'this grader': lambda case: grade_math(response(case), case['answer']),
    'math-verify': lambda case: verify(parse(f'${case["answer"]}$'), parse(response(case))),
}
ROWS = {  # kinds of few pairs share a row
    'plain numbers': ('integer', 'thousands', 'decimal', 'fraction', 'percent', 'scientific notation'),
    'algebra': ('algebraic expressions', 'equations', 'roots', 'pi and e', 'factorials and powers', 'complex numbers'),
    'sets, tuples, intervals': ('sets', 'tuples and vectors', 'matrices', 'intervals'),
    'others': ('money and units', 'typesetting', 'words', 'ratios, times and bases', 'choices', 'other', 'broken'),
}


def main() -> None:
    row_of = {kind: row for row, kinds in ROWS.items() for kind in kinds}
    counts = defaultdict(Counter)  # by row
    for case in GOLDEN:
        kind, whole, right = row_of.get(case['kind'], case['kind']), 'text' in case, bool(case['grade'])
        misjudged = [(name, right) for name, grade in GRADERS.items() if bool(grade(case)) != right]
        for row in (kind + whole * ', text', 'all texts' if whole else 'all in a box', 'all'):
            counts[row].update([right, *misjudged])
    print('kind', 'wrong / right', *GRADERS, sep=' | ')
    for row, count in counts.items():
        cells = (f'{count[name, False]} / {count[name, True]}' for name in GRADERS)
        print(row, f'{count[False]} / {count[True]}', *cells, sep=' | ')


if __name__ == '__main__':
    main()
