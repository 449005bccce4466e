"""Entropy coding of small integers: asymmetric numeral systems (Duda, 1311.2540) with one frequency table per tensor.

`docs/format.md` describes the stream. Every probability follows from integers, so a stream means the same on every
machine. Knows nothing about tensors, files or what the integers stand for.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np

from autocompress.errors import ArtifactError

Integers = np.ndarray[Any, np.dtype[Any]]

SYMBOLS_PER_BYTE = 512
"""Longer runs are not written as a stream, so that a short file cannot ask for a large tensor."""
LEVELS = 64
"""A symbol's frequency is one of so many levels, four to an octave."""
_AT_ONCE = 2**20
_SUM = 2**16
_WEIGHTS = np.array([(256, 304, 362, 431)[level % 4] << level // 4 for level in range(LEVELS)])
_STEPS = np.array([_SUM // (2 + min(step, LEVELS - step)) ** 2 for step in range(LEVELS)])
"""How frequent each difference between neighbouring levels is taken to be: small ones are common."""


def alphabet(bits: int) -> int:
    """How many symbols there are: with 1 bit three, since zero is one beside the two signs."""
    return 3 if bits == 1 else 2**bits


def encode(symbols: Integers, bits: int) -> bytes:
    """The stream of `symbols`, flat uint8 below `alphabet(bits)`: first the frequency table, then they."""
    counts = sum(
        (np.bincount(part, minlength=alphabet(bits)) for part in _parts(symbols)), np.zeros(alphabet(bits), int)
    )
    levels = _levels(counts)
    steps = np.diff(levels[_order(len(levels))], prepend=LEVELS - 1) % LEVELS
    coder = constriction.stream.stack.AnsCoder()
    model = _model(_WEIGHTS[levels])
    for part in reversed(_parts(symbols)):
        coder.encode_reverse(part.astype(np.int32), model)
    coder.encode_reverse(steps.astype(np.int32), _model(_STEPS))
    return bytes(coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


def _parts(symbols: Integers) -> list[Integers]:
    """The symbols, some at a time: the coder takes integers of four bytes, and counting ones of eight."""
    return [symbols[at : at + _AT_ONCE] for at in range(0, len(symbols), _AT_ONCE)]


def decode(content: bytes, bits: int, count: int) -> Integers:
    """The `count` symbols in a stream, uint8 (count,). Raises `ArtifactError` if `encode` cannot have written it."""
    if count > SYMBOLS_PER_BYTE * len(content) or content.endswith(b"\0"):
        raise ArtifactError(f"the artifact holds a stream of {len(content)} bytes that cannot be {count} codes")
    words = np.frombuffer(content + bytes(-len(content) % 4), dtype="<u4").astype(np.uint32)
    coder, size = constriction.stream.stack.AnsCoder(words), alphabet(bits)
    levels = np.empty(size, dtype=np.int64)
    levels[_order(size)] = (np.cumsum(coder.decode(_model(_STEPS), size)) + LEVELS - 1) % LEVELS
    symbols: Integers = coder.decode(_model(_WEIGHTS[levels]), count).astype(np.uint8)
    if not coder.is_empty():
        raise ArtifactError(f"the artifact holds a stream with more in it than {count} codes")
    return symbols


def coded_length(symbols: Integers, bits: int) -> int:
    """Length in bytes of the stream of `symbols`."""
    return len(encode(symbols, bits))


def _order(size: int) -> Integers:
    """0, size - 1, 1, size - 2, ...: as signed numbers 0, -1, 1, -2, ..., whose frequencies resemble one another."""
    places = np.arange(size)
    return np.where(places % 2 == 0, places // 2, size - (places + 1) // 2)


def _levels(counts: Integers) -> Integers:
    """The most frequent symbol has the highest level; what does not occur counts as a third."""
    octaves = np.log2(np.maximum(counts, 1 / 3) / max(1, counts.max()))
    levels: Integers = np.maximum(0, np.rint(LEVELS - 1 + 4 * octaves)).astype(np.int64)
    return levels


def _model(weights: Integers) -> Any:
    """Probabilities in proportion to integer `weights`, brought to a sum of 2^16.

    With a power of two as their sum, the library's conversion to 24 bits is exact in float64.
    """
    shares = weights * _SUM // weights.sum()
    shares[weights.argmax()] += _SUM - shares.sum()
    return constriction.stream.model.Categorical(shares.astype(np.float64), perfect=False)
