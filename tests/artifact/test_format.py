"""A second decoder, written from docs/format.md alone, reads what the package writes."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.artifact import layout, packed
from autocompress.engine.prune import magnitude_mask
from autocompress.engine.quantize import quantise
from autocompress.measure.size import Size
from autocompress.stored import Byte, Full, Half, Quantised, Raw, Stored, round_to_byte, round_to_half
from autocompress.tasks import cifar10
from autocompress.trace import trace

Array = np.ndarray[Any, Any]


KEY = "0123456789abcdef"

# --- the decoder: struct, zlib, json and numpy ----------------------------------------------------------


def decode(content: bytes) -> tuple[dict[str, Any], dict[str, Array], float]:
    magic, checksum, total, length, _, quality = struct.unpack("<4sIQI8sd", content[:36])
    assert (magic, total) == (b"ACZ1", len(content))
    assert zlib.crc32(content[8:]) == checksum
    header = json.loads(zlib.decompress(content[36 : 36 + length]))
    at, tensors = 36 + length, {}
    for row in header["tensors"]:
        tensors[row[0]], at = section(content, at, *row[1:])
    assert at == total
    return header, tensors, quality


def section(content: bytes, at: int, kind: str, shape: list[int], *rest: Any) -> tuple[Array, int]:
    def take(count: int, dtype: str) -> Array:
        nonlocal at
        found = np.frombuffer(content, dtype, count, at)
        at += found.nbytes
        return found

    def bits(count: int) -> list[int]:
        content = take(math.ceil(count / 8), "u1")
        assert all(content[k // 8] >> (7 - k % 8) & 1 == 0 for k in range(count, 8 * len(content)))
        return [int(content[k // 8]) >> (7 - k % 8) & 1 for k in range(count)]

    def floats(count: int) -> Array:
        if small:
            roots = take(count, "i1" if exponent % 2 else "u1").astype(np.float64)
            return np.ldexp(roots * np.abs(roots), -(exponent // 2)).astype(np.float32)
        return np.ldexp(take(count, "<f2").astype(np.float64), -exponent).astype(np.float32)

    n, small, kind = math.prod(shape), kind in ("q8", "e8", "b"), kind[0]
    if kind == "r":
        dtype = {"bool": "?", "uint8": "u1", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8"}[rest[0]]
        return take(n, dtype).reshape(shape), at
    exponent = int(take(1, "<i2")[0]) if kind in "qehb" else 0
    if kind in "qe":
        width, symmetric, *rest = rest  # type: ignore[assignment]
        scale = floats(shape[0])
        zero = np.full(shape[0], 2 ** (width - 1)) if symmetric else take(shape[0], "u1").astype(int)
        row = np.arange(n) // max(1, math.prod(shape[1:]))
    if kind == "e":
        codes = (stream(take(rest[0], "u1").tobytes(), width, n) + zero[row]) % (3 if width == 1 else 2**width)
        return (scale[row] * (codes - zero[row]).astype(np.float32)).reshape(shape), at
    marked = np.array(bits(n), bool) if rest else np.ones(n, bool)
    m = rest[0] if rest else n
    assert int(marked.sum()) == m
    result = np.zeros(n, np.float32)
    if kind == "q":
        digits = bits(m * width)
        packed = np.array([int("".join(map(str, digits[j * width : (j + 1) * width])), 2) for j in range(m)], np.int64)
        codes = 2 * packed if width == 1 else packed
        result[marked] = scale[row[marked]] * (codes - zero[row[marked]]).astype(np.float32)
    else:
        result[marked] = take(m, "<f4") if kind == "f" else floats(m)
    return result.reshape(shape), at


def stream(content: bytes, width: int, count: int) -> Array:
    size = 3 if width == 1 else 2**width
    assert count <= 512 * len(content)
    assert content[-1:] != b"\0"
    words = list(np.frombuffer(content + bytes(-len(content) % 4), "<u4"))
    state = 0

    def refill() -> None:
        nonlocal state
        if state < 2**32 and words:
            state = state * 2**32 + int(words.pop())

    def read(weights: list[int], length: int) -> list[int]:
        nonlocal state
        share = [2**16 * w // sum(weights) for w in weights]
        share[weights.index(max(weights))] += 2**16 - sum(share)
        start = [sum(share[:s]) * (2**24 - len(share)) // 2**16 + s for s in range(len(share))] + [2**24]
        found = []
        for _ in range(length):
            q = state % 2**24
            symbol = next(s for s in range(len(share)) if q < start[s + 1])
            state = state // 2**24 * (start[symbol + 1] - start[symbol]) + q - start[symbol]
            refill()
            found.append(symbol)
        return found

    refill()
    refill()
    steps = read([2**16 // (2 + min(d, 64 - d)) ** 2 for d in range(64)], size)
    turns = [symbol for k in range(size) for symbol in (k, size - 1 - k)][:size]
    level, weights = 63, [0] * size
    for symbol, step in zip(turns, steps, strict=True):
        level = (level + step) % 64
        weights[symbol] = (256, 304, 362, 431)[level % 4] * 2 ** (level // 4)
    symbols = read(weights, count)
    assert state == 0
    assert not words
    return np.array(symbols, np.int64)


# --- random tensors -------------------------------------------------------------------------------------


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], Stored, str]:
    """Kind, shape, tensor and coding."""
    kind = draw(st.sampled_from(("quantised", "half", "byte", "full", "raw")))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1 if kind == "quantised" else 0, max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-20, 20))
    if kind == "raw":
        dtype = getattr(torch, draw(st.sampled_from(("bool", "uint8", "int8", "int16", "int32", "int64"))))
        numbers = torch.randint(-(2**62), 2**62, shape, generator=generator)
        return kind, shape, Raw(numbers % 2 == 0 if dtype == torch.bool else numbers.to(dtype)), "dense"
    if kind == "byte":
        return kind, shape, Byte(round_to_byte(values.abs() if draw(st.booleans()) else values)), "dense"
    coding = draw(st.sampled_from(("dense", "bitmask", "entropy") if kind == "quantised" else ("dense", "bitmask")))
    mask = None
    if coding == "bitmask" or draw(st.booleans()):
        mask = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.3, 0.9, 1.0)))
        values = torch.where(mask, values, 0.0)
    if kind == "half":
        return kind, shape, Half(round_to_half(values), mask), coding
    if kind == "full":
        return kind, shape, Full(values, mask), coding
    bits = draw(st.integers(1, 8))
    symmetric = bits == 1 or draw(st.booleans())
    scale_bits, rounded = draw(st.sampled_from(((8, round_to_byte), (16, round_to_half))))
    scale = rounded(torch.randn(shape[0], generator=generator) * 10.0 ** draw(st.integers(-20, 20)))
    zero = torch.randint(0, 2**bits, (shape[0],), generator=generator).to(torch.uint8)
    if symmetric:
        zero = torch.full((shape[0],), 2 ** (bits - 1), dtype=torch.uint8)
    codes = torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)
    if bits == 1:
        codes = 2 * codes
    if mask is not None:
        if bits == 1 and coding == "dense":  # a sign cannot be zero
            mask = torch.ones(shape, dtype=torch.bool)
        codes = torch.where(mask, codes, zero.reshape(-1, *[1] * (len(shape) - 1)))
    return kind, shape, Quantised(codes, scale, zero, bits, symmetric, mask, scale_bits=scale_bits), coding


def entry(name: str, kind: Any, shape: tuple[int, ...], stored: Stored, coding: Any) -> layout.Entry:
    if isinstance(stored, Raw):
        dtype = str(stored.values.dtype).removeprefix("torch.")
        return layout.Entry(
            name, kind, shape, 8 * stored.values.element_size(), count=stored.values.numel(), dtype=dtype
        )
    count = math.prod(shape)
    if coding == "bitmask":
        assert stored.mask is not None
        count = int(stored.mask.sum())
    bits = stored.bits if isinstance(stored, Quantised) else {"half": 16, "byte": 8, "full": 32}[kind]
    coded = 0
    if coding == "entropy":
        assert isinstance(stored, Quantised)
        coded = stored.with_length().coded or 0
        if count > 512 * coded:  # a stream of nothing
            coding = "dense"
    entry = layout.Entry(name, kind, shape, bits, coding, count, getattr(stored, "symmetric", True), coded=coded)
    return replace(entry, scale_bits=getattr(stored, "scale_bits", 16))


def file_of(tensors: list[tuple[str, tuple[int, ...], Stored, str]], quality: float = 0.5) -> bytes:
    entries = tuple(entry(f"t{i}", *tensor) for i, tensor in enumerate(tensors))
    header = layout.Header("task", "accuracy", "0" * 16, Policy(), ("bn",), entries, {"torch": "2"})
    content = packed.pack(header, {f"t{i}": tensor[2] for i, tensor in enumerate(tensors)}, quality, KEY)
    assert layout.file_bytes(header) == len(content)
    return content


def same_bits(found: Array, expected: torch.Tensor) -> None:
    """Equal type, shape and bytes; the sign of a zero is not told apart."""
    wanted = expected.numpy()
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if found.dtype == np.float32:
        found, wanted = found + np.float32(0), wanted + np.float32(0)
    assert found.tobytes() == wanted.tobytes()


@given(st.lists(stored_tensors(), max_size=4))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_second_decoder_and_reader_give_the_stored_values(
    tensors: list[tuple[str, tuple[int, ...], Stored, str]],
) -> None:
    content = file_of(tensors)
    header, found, quality = decode(content)
    read = packed.unpack(content)
    assert quality == read.quality == 0.5
    assert header["folded"] == list(read.header.folded) == ["bn"]
    assert list(found) == list(read.tensors) == [f"t{i}" for i in range(len(tensors))]
    for i, (_, _, stored, _) in enumerate(tensors):
        same_bits(found[f"t{i}"], stored.dense())
        same_bits(read.tensors[f"t{i}"].dense().numpy(), stored.dense())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_second_decoder_reads_streams_of_bell_shaped_weights(bits: int, scheme: Any, sparsity: float) -> None:
    weight = torch.randn(8, 15, 3, 3, generator=torch.Generator().manual_seed(bits))
    stored = quantise(weight, LayerChoice(bits, scheme=scheme), magnitude_mask(weight, int(sparsity * weight.numel())))
    content = file_of([("quantised", tuple(weight.shape), stored, "entropy")])
    header, tensors, _ = decode(content)
    assert header["tensors"] == [["t0", "e", [8, 15, 3, 3], bits, int(stored.symmetric), stored.coded]]
    same_bits(tensors["t0"], stored.dense())


@given(st.lists(stored_tensors(), max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_was_read_is_written_again_to_the_same_bytes(
    tensors: list[tuple[str, tuple[int, ...], Stored, str]],
) -> None:
    content = file_of(tensors)
    read = packed.unpack(content)
    assert packed.pack(read.header, read.tensors, read.quality, read.key) == content


def test_documented_bytes_of_a_small_file() -> None:
    codes = torch.tensor([[1, 2, 4], [7, 4, 4]], dtype=torch.uint8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    quantised = Quantised(
        codes, torch.tensor([0.5, -0.25]), torch.tensor([4, 4], dtype=torch.uint8), 3, symmetric=True, mask=mask
    )
    half = Half(torch.tensor([1.0, -2.0]))
    byte = Byte(torch.tensor([64.0**2, -(100.0**2)]))
    parts = [("quantised", (2, 3), quantised, "bitmask"), ("half", (2,), half, "dense"), ("byte", (2,), byte, "dense")]
    content = file_of(parts, quality=0.25)
    length = int.from_bytes(content[16:20], "little")
    assert content[:4] == b"ACZ1"
    assert content[8:16] == len(content).to_bytes(8, "little")
    assert content[20:36] == bytes.fromhex(KEY) + struct.pack("<d", 0.25)
    rows = json.loads(zlib.decompress(content[36 : 36 + length]))["tensors"]
    assert rows == [["t0", "q", [2, 3], 3, 1, 3], ["t1", "h", [2]], ["t2", "b", [2]]]
    exponent = 15  # brings 0.5 to 2^14
    first = struct.pack("<hee", exponent, 2.0**14, -(2.0**13)) + bytes([0b11010000, 0b00101011, 0b10000000])
    last = struct.pack("<hbb", 1, 64, -100)  # twice the exponent, which is 0, and 1 for signs
    assert content[36 + length :] == first + struct.pack("<hee", 13, 2.0**13, -(2.0**14)) + last


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_empty_and_single_integers_are_read(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.ones(shape, dtype=dtype)
    content = file_of([("raw", shape, Raw(values), "dense")])
    same_bits(decode(content)[1]["t0"], values)
    assert torch.equal(packed.unpack(content).tensors["t0"].dense(), values)


def test_quality_that_was_not_measured_is_nan() -> None:
    assert math.isnan(decode(file_of([], quality=math.nan))[2])


# --- whole models ---------------------------------------------------------------------------------------


def test_header_of_a_resnet20_with_mixed_widths_takes_few_bytes() -> None:
    graph = trace(cifar10.architecture(20).eval(), torch.zeros(2, 3, 32, 32))
    layers = {layer.name: LayerChoice(2 + i % 3, i % 7 / 10) for i, layer in enumerate(graph.layers)}
    coded = {
        layer.weight: (layers[layer.name].width, math.prod(layer.shape) // (9 + i % 4))
        for i, layer in enumerate(graph.layers)
    }
    header = Size(graph, "cifar10-resnet20", "accuracy").header(Policy(layers), coded)
    assert {entry.coding for entry in header.entries if entry.kind == "quantised"} == {"entropy"}
    assert len(header.encode()) <= 520


@pytest.fixture(scope="module")
def bench() -> Workbench:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4)
    )
    model.register_buffer("offset", torch.tensor(3))
    data = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    return Workbench(ClassificationTask(model, data, data, data, name="small"))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("bits", "scheme"),
    [
        *((bits, scheme) for bits in (1, 2, 5, 8, 16, 32) for scheme in ("symmetric", "asymmetric")),
        *((bits, "entropy") for bits in (0.5, 1, 2.5, 3, 6)),
    ],
)
def test_second_decoder_reads_whole_models(bench: Workbench, bits: float, scheme: Any, fold: bool) -> None:
    layers = {
        layer.name: LayerChoice(bits, s, scheme) for layer, s in zip(bench.graph.layers, (0, 0.3, 0.9), strict=True)
    }
    policy = Policy(layers, {group.name: 0.5 for group in bench.graph.prunable}, recovery=Recovery(fold_bn=fold))
    compressed = compress(bench, policy)
    size = Size(bench.graph, "small", "accuracy")
    written = size.header(policy, compressed.codings())
    header, tensors, _ = decode(packed.pack(written, compressed.tensors, 0.5, policy.key()))
    assert Policy.from_json(header["policy"]) == Policy(keep=policy.keep), "layers stand in the rows"
    assert header["folded"] == (["1"] if fold else [])
    assert list(tensors) == list(compressed.tensors)
    kinds = {row[0]: row[1] for row in header["tensors"]}
    small = {"0.weight", "3.weight", "5.weight", "3.bias", "5.bias", *(["0.bias"] if fold else [])}
    expected = small if scheme == "entropy" and bits < 3 else set()
    assert {name for name, kind in kinds.items() if kind in ("q8", "e8", "b")} == expected
    for name, stored in compressed.tensors.items():
        same_bits(tensors[name], stored.dense())
