"""A number with its unit: '10 m/s' is 10 and metres per second."""

import re

from troll_jax.rewards.answers import SCALES


def quantity(text: str) -> tuple[str, tuple]:
    """A value and its unit: pairs of a word and a power, as 'm/s' is m and s^-1; the empty tuple if there is none."""
    text = text.strip()
    match = _QUANTITY.fullmatch(text)
    if match is None or not (words := _UNIT.findall(match['unit'])):
        return re.sub(r'(?<=\d),(?=\d{3})', '', text) if THOUSANDS.fullmatch(text) else text, ()
    powers: dict[str, int] = {}
    sign, square = 1, 1
    for mark, word, power in words:
        if mark == '/' or word.lower() == 'per':
            sign = -1
        if word in _POWERS:
            square = _POWERS[word]
        elif word and word.lower() not in _FILLERS:
            name = _UNITS.get(word) or _UNITS.get(word.lower()) or word.lower()
            powers[name] = powers.get(name, 0) + sign * square * int(power or 1)
            square = 1
    return match['value'].strip(), tuple(sorted(powers.items()))


THOUSANDS = re.compile(r'[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![,\d])(?:\s*[A-Za-z\\^].*)?$')
_SCALES = '|'.join(SCALES)
# What is no unit: behind a number it changes its value.
_DENIED = (
    'one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy|eighty|'
    'ninety|half|halves|thirds?|fourths?|fifths?|quarters?|tenths?|hundredths?|thousandths?|minus|plus|times|over|'
    'divided|less|more|fewer|greater|least|most|not|never|none|nor|without|except|but|mod|modulo|base|squared|cubed|'
    'root|choose|factorial|and|or|to|between|versus|than|percent|double|twice|triple|pairs?|score|gross|negative|'
    f'positive|point|about|nearly|almost|if|when|where|wrong|false|incorrect|is|are|infinity|{_SCALES}|'
    'arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|gcd|lcm'
)
# Names of one unit, separated by commas; each may also have an s.
_UNITS = {
    alias: names.split()[0]
    for names in (
        'm meter metre, cm centimeter centimetre, mm millimeter millimetre, km kilometer kilometre, '
        'nm nanometer nanometre, in inch inche, ft foot feet, yd yard, mi mile, '
        's sec second, ms millisecond, min minute, h hr hour, day, '
        'g gram, kg kilogram, mg milligram, lb pound, oz ounce, L l liter litre, mL ml milliliter millilitre, '
        'N newton, J joule, kJ kilojoule, erg, eV electronvolt, W watt, kW kilowatt, V volt, A amp ampere, '
        'K kelvin, C celsius, F fahrenheit, Pa pascal, Hz hertz, T tesla, mol mole, '
        'degree deg circ, rad radian, dollar usd, cent, mph, kph, au AU, pc parsec'
    ).split(', ')
    for word in names.split()
    for alias in (word, word + 's')
}
_POWERS = {'square': 2, 'sq': 2, 'cubic': 3, 'cu': 3}
_FILLERS = {'per', 'of', 'the', 'a', 'an', 'unit', 'units', 'each'}
_SHORT = '|'.join(sorted((word for word in _UNITS if len(word) < 3), key=len, reverse=True))
_UNIT_WORD = rf'(?!(?:{_DENIED})(?![A-Za-z]))(?:[A-Za-z]{{3,}}|{_SHORT}|of|a|an|sq|cu)(?![A-Za-z])\.?'
_UNIT_POWER = r'(?:\s*\^\s*\{?-?\d\}?)?'
_DEGREE = r'\^\s*\{?\s*\\circ\s*\}?'
_QUANTITY = re.compile(
    rf'(?P<value>.{{0,500}}?(?:[\d}})!]|\\pi|%))(?P<unit>\s*{_DEGREE}\s*[CF]?|(?:\s+|(?<=\d)(?=[A-Za-z]{{2,}})|\s*/\s*(?=[A-Za-z]{{3}}))'
    rf'{_UNIT_WORD}{_UNIT_POWER}(?:(?:\s*(?:/|\\cdot|-)\s*|\s+){_UNIT_WORD}{_UNIT_POWER}){{0,9}}\s*)'
)
_UNIT = re.compile(r'(/)?\s*([A-Za-z]+)(?:\.?\s*\^\s*\{?(-?\d)\}?)?')
