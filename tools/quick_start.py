"""Print the first block of Python of a page: `python tools/quick_start.py README.md`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def first_block(page: str) -> str:
    """The code; `ValueError` if there is none."""
    found = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError("the page has no block of Python")
    return found.group(1)


if __name__ == "__main__":
    print(first_block(Path(sys.argv[1]).read_text(encoding="utf-8")))
