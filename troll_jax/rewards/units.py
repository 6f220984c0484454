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
_UNITS = {
    alias: name
    for name, aliases in {
        'm': 'm meter metre',
        'cm': 'cm centimeter centimetre',
        'mm': 'mm millimeter millimetre',
        'km': 'km kilometer kilometre',
        'nm': 'nm nanometer nanometre',
        'in': 'in inch inche',
        'ft': 'ft foot feet',
        'yd': 'yd yard',
        'mi': 'mi mile',
        's': 's sec second',
        'ms': 'ms millisecond',
        'min': 'min minute',
        'h': 'h hr hour',
        'day': 'day',
        'g': 'g gram',
        'kg': 'kg kilogram',
        'mg': 'mg milligram',
        'lb': 'lb pound',
        'oz': 'oz ounce',
        'L': 'L l liter litre',
        'mL': 'mL ml milliliter millilitre',
        'N': 'N newton',
        'J': 'J joule',
        'kJ': 'kJ kilojoule',
        'W': 'W watt',
        'kW': 'kW kilowatt',
        'V': 'V volt',
        'A': 'A amp ampere',
        'K': 'K kelvin',
        'Pa': 'Pa pascal',
        'Hz': 'Hz hertz',
        'C': 'C celsius',
        'F': 'F fahrenheit',
        'T': 'T tesla',
        'mol': 'mol mole',
        'eV': 'eV electronvolt',
        'rad': 'rad radian',
        'degree': 'deg degree circ',
        'dollar': 'dollar usd',
        'cent': 'cent',
        'mph': 'mph',
        'kph': 'kph',
        'erg': 'erg',
        'au': 'AU au',
        'pc': 'pc parsec',
    }.items()
    for word in aliases.split()
    for alias in {word, word + 's'}
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
