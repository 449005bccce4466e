"""Entropy coding of integers: what is written is read, in about as many bytes as the symbols' entropy."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autocompress import ArtifactError
from autocompress.coding import SYMBOLS_PER_BYTE, alphabet, coded_length, decode, encode

Array = np.ndarray[Any, Any]
WIDTHS = range(1, 9)


def drawn(bits: int, count: int, zeros: float, seed: int = 0) -> Array:
    """Bell-shaped symbols around 0 (modulo the alphabet), `zeros` of them exactly 0."""
    draw, size = np.random.default_rng(seed), alphabet(bits)
    signed = np.clip(np.rint(draw.normal(0, size / 6, count)), -(size // 2), (size - 1) // 2).astype(int)
    signed[draw.random(count) < zeros] = 0
    return (signed % size).astype(np.uint8)


def entropy_bytes(symbols: Array) -> float:
    shares = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(shares * np.log2(shares)).sum()) * len(symbols) / 8


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_symbols_survive(bits: int, data: st.DataObject) -> None:
    symbols = np.array(data.draw(st.lists(st.integers(0, alphabet(bits) - 1), max_size=60)), dtype=np.uint8)
    content = encode(symbols, bits)
    assert len(content) == coded_length(symbols, bits)
    if len(symbols) <= SYMBOLS_PER_BYTE * len(content):
        found = decode(content, bits, len(symbols))
        assert (found.dtype, found.shape) == (np.uint8, symbols.shape)
        assert np.array_equal(found, symbols)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [432, 36_864])
def test_length_is_near_the_entropy(bits: int, zeros: float, count: int) -> None:
    symbols = drawn(bits, count, zeros)
    content = encode(symbols, bits)
    assert np.array_equal(decode(content, bits, count), symbols)
    table = 4 + 0.7 * alphabet(bits)  # bytes
    assert entropy_bytes(symbols) - 1 <= len(content) <= 1.004 * entropy_bytes(symbols) + table


@pytest.mark.parametrize("bits", WIDTHS)
def test_single_value_costs_next_to_nothing(bits: int) -> None:
    assert coded_length(np.zeros(100_000, dtype=np.uint8), bits) < 8 + alphabet(bits) / 3


def test_streams_do_not_change_from_release_to_release() -> None:
    assert encode(np.array([0, 0, 1, 2, 0, 0, 0, 1], dtype=np.uint8), 1).hex() == "39ae26a3c52b"
    assert encode(np.array([0, 1, 3, 0, 0, 2, 0, 0, 3, 0], dtype=np.uint8), 2).hex() == "b6542423f32609"
    found = hashlib.sha256(
        b"".join(encode((np.arange(5000) ** 2 // 7 % alphabet(b)).astype(np.uint8), b) for b in WIDTHS)
    )
    assert found.hexdigest()[:16] == "ec57236054a116ac"


# --- what no writer makes -------------------------------------------------------------------------------


@given(st.binary(max_size=40), st.integers(1, 8), st.integers(0, 3000))
@settings(max_examples=300, deadline=None, derandomize=True)
@example(b"", 8, 0)
@example(b"", 1, 1)
@example(b"\1", 8, 512)
def test_any_bytes_are_refused_or_read_within_the_alphabet(content: bytes, bits: int, count: int) -> None:
    try:
        found = decode(content, bits, count)
    except ArtifactError:
        return
    assert found.shape == (count,)
    assert not count or int(found.max()) < alphabet(bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_streams_with_more_in_them_are_refused(bits: int) -> None:
    content = encode(drawn(bits, 300, 0.5), bits)
    for other in (content + b"\0", content * 2, bytes(4) + content, b"\1\2\3\4" + content):
        with pytest.raises(ArtifactError):
            decode(other, bits, 300)


@pytest.mark.parametrize("count", [0, 150, 299])
def test_streams_of_more_symbols_than_announced_are_refused(count: int) -> None:
    with pytest.raises(ArtifactError):
        decode(encode(drawn(4, 300, 0.0), 4), 4, count)


@pytest.mark.parametrize("count", [SYMBOLS_PER_BYTE * 3 + 1, 2**40, math.factorial(30)])
def test_short_streams_cannot_ask_for_many_symbols(count: int) -> None:
    with pytest.raises(ArtifactError, match="cannot be"):
        decode(b"\1\2\3", 4, count)
