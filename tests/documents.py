"""Code blocks of the documents."""

import re
from pathlib import Path

YOUR_OWN = (Path(__file__).parent.parent / 'docs/your_own.md').read_text()


def blocks(text: str, language: str = '') -> list[str]:
    """The code blocks of a document in a language."""
    found = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]
