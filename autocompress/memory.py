"""Gives memory that was freed back to the system, where the C library is glibc. Knows nothing about who used it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

BLOCK_BYTES = 2**20
_M_MMAP_THRESHOLD = -3


def trim() -> None:
    """Freed blocks go back that the library keeps below others, which are in use."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def give_back() -> None:
    """From now on, blocks of `BLOCK_BYTES` or more go back as soon as they are freed, in all of this process.

    By itself the library soon keeps blocks of up to 32 MB, the temporary ones of a large layer, wherever they happened
    to lie. Each new block costs the zeroing of its pages.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, BLOCK_BYTES)
        trim()


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
