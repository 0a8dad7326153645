"""A text of any size that nothing can compress, the same each time."""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache
from random import Random


@lru_cache(maxsize=4)
def text(size: int) -> str:
    """So many characters."""
    return b64encode(Random(size).randbytes(size)).decode()[:size]
