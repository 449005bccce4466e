"""Which bytes a packed file holds, by arithmetic: entries, codings, header. `docs/format.md` describes the file.

Knows nothing about tensors. From a graph and a policy alone follows how long a file can become; with the lengths of
the codes that are entropy coded, how long it is.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from autocompress.coding import SYMBOLS_PER_BYTE
from autocompress.errors import ArtifactError
from autocompress.graph import Graph, Shape
from autocompress.policy import LayerChoice, Policy

MAGIC = b"ACZ1"
PREFIX = struct.Struct("<4sIQI8sd")  # magic, CRC-32 of what follows it, file length, header length, policy key, quality
MAX_HEADER = 4 * 2**20
MAX_DIMENSIONS = 8

Kind = Literal["quantised", "half", "byte", "full", "raw"]
Coding = Literal["dense", "bitmask", "entropy"]
WORTHWHILE = 8
"""Bytes that entropy coding has to save: more than the longer row takes in the header."""
RAW_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "complex64": 8,
    "complex128": 16,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in the file. `count` is the number of values that are written: all, or those a bitmask marks.

    `coded` is the length in bytes of the codes if they are entropy coded, `scale_bits` what each row's scale takes.
    """

    name: str
    kind: Kind
    shape: Shape
    bits: int
    coding: Coding = "dense"
    count: int = 0
    symmetric: bool = True
    dtype: str = "float32"
    coded: int = 0
    scale_bits: int = 16

    @property
    def nbytes(self) -> int:
        """Length of this tensor's section of the payload."""
        values = self.coded if self.coding == "entropy" else -(-self.count * self.bits // 8)
        mask = -(-prod(self.shape) // 8) if self.coding == "bitmask" else 0
        if self.kind == "quantised":
            rows = self.shape[0]
            return 2 + self.scale_bits // 8 * rows + (0 if self.symmetric else rows) + mask + values
        return (2 if self.kind in ("half", "byte") else 0) + mask + values

    def to_json(self) -> list[Any]:
        """As short as it can be and still be plain."""
        letter = "e" if self.coding == "entropy" else self.kind[0]
        row: list[Any] = [self.name, letter + ("8" if self.scale_bits == 8 else ""), list(self.shape)]
        if self.kind == "raw":
            return [*row, self.dtype]
        if self.kind == "quantised":
            row += [self.bits, int(self.symmetric)]
        if self.coding == "entropy":
            return [*row, self.coded]
        return [*row, self.count] if self.coding == "bitmask" else row

    @classmethod
    def from_json(cls, row: Any) -> Entry:
        """The entry that `to_json` wrote; every number is checked before anything is allocated."""
        name, letter, shape, *rest = _list(row, 3, 6)
        if not isinstance(name, str) or letter not in ("q", "q8", "e", "e8", "h", "b", "f", "r"):
            raise ArtifactError(f"the header describes a tensor as {row!r}")
        shape = tuple(_count(size) for size in _list(shape, 0, MAX_DIMENSIONS))
        numel = prod(shape)
        _count(prod(max(1, size) for size in shape))  # strides must be representable even without elements
        if letter == "r":
            (dtype,) = _list(rest, 1, 1)
            if not isinstance(dtype, str) or dtype not in RAW_BYTES:
                raise ArtifactError(f"tensor {name!r} has unknown type {dtype!r}")
            return cls(name, "raw", shape, 8 * RAW_BYTES[dtype], count=numel, dtype=dtype)
        if letter == "b":
            _list(rest, 0, 0)
            return cls(name, "byte", shape, 8, count=numel)
        scale_bits = 8 if letter.endswith("8") else 16
        if letter[0] in "qe":
            bits, symmetric, *rest = _list(rest, 2, 3)
            whole = type(bits) is int and type(symmetric) is int
            if not (whole and 1 <= bits <= 8 and symmetric in (0, 1) and (symmetric or bits > 1) and shape):
                raise ArtifactError(f"tensor {name!r} has an impossible grid")
            if letter[0] == "e":
                coded = _count(*_list(rest, 1, 1))
                entry = cls(name, "quantised", shape, bits, "entropy", numel, bool(symmetric), coded=coded)
                return replace(entry, scale_bits=scale_bits)
            kind: Kind = "quantised"
        else:
            kind, bits, symmetric = ("half", 16, 1) if letter == "h" else ("full", 32, 1)
        coding: Coding = "bitmask" if rest else "dense"
        count = _count(*_list(rest, 1, 1)) if rest else numel
        if count > numel:
            raise ArtifactError(f"tensor {name!r} marks {count} of {numel} values")
        return cls(name, kind, shape, int(bits), coding, count, bool(symmetric), scale_bits=scale_bits)


def _list(value: Any, low: int, high: int) -> list[Any]:
    if not isinstance(value, list) or not low <= len(value) <= high:
        raise ArtifactError(f"the header holds {str(value)[:80]!r} where a list of {low} to {high} items belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise ArtifactError(f"the header holds {str(value)[:80]!r} where a size belongs")
    return value


def weight_entry(
    name: str, shape: Shape, choice: LayerChoice, kept: int, coded: tuple[int, int] | None = None
) -> Entry:
    """How a weight with `kept` unpruned values is written: whatever is shortest.

    Dense, as a bitmask, or, where `coded` gives the bits of its codes and the length of all when entropy coded and that
    pays, as these. One without elements takes no bytes, whatever its choice.
    """
    if not prod(shape):
        return Entry(name, "full", shape, 32)
    kinds: dict[int, Kind] = {16: "half", 32: "full"}
    bits, length = coded or (choice.width, None)
    kind, count = kinds.get(bits, "quantised"), prod(shape)
    symmetric = choice.symmetric or kind != "quantised"
    entry = Entry(name, kind, shape, bits, "dense", count, symmetric, scale_bits=8 if choice.small_floats else 16)
    options = []
    if kept == count or bits > 1:  # one bit is a sign and cannot be zero
        options.append(entry)
    if kept < count:
        options.append(replace(entry, coding="bitmask", count=kept))
    shortest = min(options, key=lambda entry: entry.nbytes)
    if length is None or count > SYMBOLS_PER_BYTE * length:
        return shortest
    stream = replace(entry, coding="entropy", coded=length)
    return stream if stream.nbytes + WORTHWHILE <= shortest.nbytes else shortest


def rest_entry(name: str, shape: Shape, dtype: str, *, small: bool = False) -> Entry:
    """How anything but a compressible weight is written: floats at 16 bits (`small`: 8) if they fit, integers as is."""
    if dtype in RAW_BYTES:
        return Entry(name, "raw", shape, 8 * RAW_BYTES[dtype], count=prod(shape), dtype=dtype)
    if dtype == "exact":
        return Entry(name, "full", shape, 32, count=prod(shape))
    if small:
        return Entry(name, "byte", shape, 8, count=prod(shape))
    return Entry(name, "half", shape, 16, count=prod(shape))


Coded = Mapping[str, tuple[int, int]]
"""Weight name to the bits of its codes, and the bytes that all take when entropy coded."""


def plan(graph: Graph, policy: Policy, coded: Coded | None = None) -> tuple[Entry, ...]:
    """Every entry of the file that `policy` leads to; weights that `coded` does not name are not entropy coded."""
    coded = coded or {}
    choices = {layer.weight: choice for layer, choice in graph.choices(policy)}
    small = graph.small_floats(policy)
    entries = []
    for name, shape in graph.contents(policy).items():
        if name in choices:
            kept = prod(shape) - choices[name].zeros(prod(shape))
            entries.append(weight_entry(name, shape, choices[name], kept, coded.get(name)))
        else:
            dtype = graph.tensors.get(name, (shape, "float32"))[1]
            entries.append(rest_entry(name, shape, dtype, small=name in small))
    return tuple(entries)


@dataclass(frozen=True)
class Header:
    """What the file says of itself, beside the measured quality and the policy's key, which stand in the prefix.

    `policy` is without its layers, which the entries describe, and without its recovery training, which leaves no
    trace in the file but in its values.
    """

    task: str
    metric: str
    graph: str
    policy: Policy
    folded: tuple[str, ...]
    entries: tuple[Entry, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Compact JSON, deflated."""
        data = {
            "task": self.task,
            "metric": self.metric,
            "graph": self.graph,
            "policy": {
                name: value for name, value in self.policy.to_json().items() if name not in ("layers", "recovery")
            },
            "folded": list(self.folded),
            "tensors": [entry.to_json() for entry in self.entries],
            "versions": dict(self.versions),
        }
        return zlib.compress(json.dumps(data, separators=(",", ":"), sort_keys=True).encode(), 9)

    @classmethod
    def decode(cls, content: bytes) -> Header:
        """The header that `encode` wrote. Raises `ArtifactError` (`PolicyError` for its policy)."""
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(content, MAX_HEADER)
            if not inflate.eof or inflate.unused_data:
                raise ArtifactError("the artifact's header is cut short or larger than it may be")
            data = json.loads(text)
        except (zlib.error, ValueError, RecursionError) as error:
            raise ArtifactError(f"the artifact's header cannot be read: {error}") from None
        wanted = {"task", "metric", "graph", "policy", "folded", "tensors", "versions"}
        if not isinstance(data, dict) or set(data) != wanted:
            raise ArtifactError("the artifact's header lacks a member or has one too many")
        texts = [data["task"], data["metric"], data["graph"], *_list(data["folded"], 0, 10**6)]
        versions = data["versions"]
        if not isinstance(versions, dict):
            raise ArtifactError("the artifact's header does not name library versions")
        if not all(isinstance(text, str) for text in (*texts, *versions.values())):
            raise ArtifactError("the artifact's header holds something else where a name belongs")
        entries = tuple(Entry.from_json(row) for row in _list(data["tensors"], 0, 10**6))
        if len({entry.name for entry in entries}) != len(entries):
            raise ArtifactError("the artifact's header names a tensor twice")
        policy = Policy.from_json(data["policy"])
        return cls(data["task"], data["metric"], data["graph"], policy, tuple(data["folded"]), entries, versions)

    @property
    def payload_bytes(self) -> int:
        """Length of the sections after the header."""
        return sum(entry.nbytes for entry in self.entries)


def header_for(
    graph: Graph, policy: Policy, task: str, metric: str, versions: Mapping[str, str], coded: Coded | None = None
) -> Header:
    """The header of the file that `policy` leads to; `coded` is as in `plan`."""
    folded, entries = tuple(graph.folded(policy)), plan(graph, policy, coded)
    rest = Policy(keep=policy.keep, criterion=policy.criterion, solver=policy.solver)
    return Header(task, metric, graph.shapes_fingerprint, rest, folded, entries, versions)


def file_bytes(header: Header) -> int:
    """Exact length of the file with this header."""
    return PREFIX.size + len(header.encode()) + header.payload_bytes
