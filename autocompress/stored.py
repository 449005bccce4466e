"""How one tensor is stored: integer codes on an affine grid, halves, floats or raw bytes.

The engine produces these, the scored model is filled from them, and the artifact writes exactly them, so what is
measured is what ships. Knows nothing about policies or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from autocompress.coding import alphabet, coded_length


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """value = scale * (code - zero), one scale and zero per slice of dimension 0.

    `codes` uint8 in [0, 2^bits), any shape; `scale` float32 (out,), already exact in the file's `scale_bits`;
    `zero` uint8 (out,). `mask` bool, of the same shape as `codes`: False where the weight was pruned, whose code
    is the zero point; None when nothing was. With 1 bit the zero point is 1, and codes are 0 or 2: minus or plus the
    scale. `coded` is the number of bytes that the codes take when entropy coded, None where that was not computed.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool
    mask: Tensor | None = None
    coded: int | None = None
    scale_bits: Literal[8, 16] = 16

    def steps(self) -> Tensor:
        """Codes counted from the zero point, int16."""
        zero = self.zero.to(torch.int16).reshape(-1, *[1] * (self.codes.ndim - 1))
        return self.codes.to(torch.int16).sub_(zero)

    def symbols(self) -> Tensor:
        """What is entropy coded, flat uint8: `steps` modulo the number of codes, so 0 is zero."""
        return self.steps().remainder_(alphabet(self.bits)).to(torch.uint8).flatten()

    def narrowed(self) -> Quantised:
        """The same symmetric codes in as few bits as they need, two or more."""
        steps = self.steps()
        low, high = (int(steps.min()), int(steps.max())) if steps.numel() else (0, 0)
        bits = max(2, 1 + max(-low - 1, high, 0).bit_length())
        zero = torch.full_like(self.zero, 2 ** (bits - 1))
        return replace(self, codes=steps.add_(2 ** (bits - 1)).to(torch.uint8), zero=zero, bits=bits, coded=None)

    def coding(self) -> tuple[int, int] | None:
        """Bits of a code, and the bytes that all take when entropy coded, where that was computed."""
        return None if self.coded is None else (self.bits, self.coded)

    def with_length(self) -> Quantised:
        """The same with `coded`."""
        return replace(self, coded=coded_length(self.symbols().numpy(), self.bits))

    def dense(self) -> Tensor:
        """Float32 values."""
        values = self.codes.float()
        return values.sub_(_per_row(self.zero, self.codes)).mul_(_per_row(self.scale, self.codes))


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """Float32 `values` that `round_to_half` maps to themselves; `mask` as in `Quantised`."""

    values: Tensor
    mask: Tensor | None = None

    def dense(self) -> Tensor:
        """Float32 values."""
        return self.values


@dataclass(frozen=True, slots=True, eq=False)
class Byte:
    """Float32 `values` that `round_to_byte` maps to themselves."""

    values: Tensor

    def dense(self) -> Tensor:
        """Float32 values."""
        return self.values


@dataclass(frozen=True, slots=True, eq=False)
class Full:
    """Float32 `values` as they are; `mask` as in `Quantised`."""

    values: Tensor
    mask: Tensor | None = None

    def dense(self) -> Tensor:
        """Float32 values."""
        return self.values


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Integers and booleans (buffers), byte for byte."""

    values: Tensor

    def dense(self) -> Tensor:
        """The values."""
        return self.values


Stored = Quantised | Half | Byte | Full | Raw
StoredModel = Mapping[str, Stored]
"""State-dict name to stored tensor, in the order of the file."""


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.float().reshape(-1, *[1] * (like.ndim - 1))


MAX_EXPONENT = 160
"""Largest power of two, up or down, by which a section of halves is scaled."""
BYTE_EXPONENTS = (-114, 149)
"""That of bytes: float32 ends at 2^128, which is 128 squared times 2^114, and begins at 2^-149."""


def half_exponent(values: Tensor) -> int:
    """The power of two by which `values` are multiplied before rounding to half precision.

    It brings the largest magnitude, rounded, into [2^14, 2^15), so neither large nor tiny tensors leave
    the format's range.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0.0:
        return 0
    _, exponent_of = torch.frexp(torch.tensor(largest, dtype=torch.float64))  # largest = m 2^e with m in [0.5, 1)
    exponent = int(exponent_of)
    exponent = max(-MAX_EXPONENT, min(MAX_EXPONENT, 15 - exponent))
    scaled = torch.tensor(largest * 2.0**exponent, dtype=torch.float64)
    rounds_up = float(scaled.half()) == 2.0**15
    return exponent - 1 if rounds_up else exponent  # so that what is read back keeps its exponent


def to_half(values: Tensor) -> tuple[Tensor, int]:
    """Half-precision values and their exponent: `from_half` of both is the stored value."""
    exponent = half_exponent(values)
    return (values.double() * 2.0**exponent).half(), exponent


def from_half(values: Tensor, exponent: int) -> Tensor:
    """Float32 values of `to_half`; exact, since only the exponent changes."""
    return (values.double() * 2.0**-exponent).float()


def round_to_half(values: Tensor) -> Tensor:
    """Float32 values as the file will hold them."""
    return from_half(*to_half(values))


def byte_exponent(values: Tensor, *, signed: bool) -> int:
    """The power of two by which `values` are multiplied before their roots become bytes.

    The greatest one that brings the largest root to at most 255, or 127 where one bit is the sign.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0.0:
        return 0
    top = _top(signed)
    exponent = 14 - math.frexp(largest)[1] - 2 * signed  # the root is from 90 to 128, or half of that
    while round(math.sqrt(math.ldexp(largest, exponent + 1))) <= top:
        exponent += 1
    # what is read back must find the same exponent, though its largest may have been rounded down
    exponent += round(math.sqrt(2) * round(math.sqrt(math.ldexp(largest, exponent)))) <= top
    return min(exponent, BYTE_EXPONENTS[1])


def _top(signed: bool) -> int:
    return 127 if signed else 255


def to_byte(values: Tensor) -> tuple[Tensor, int, bool]:
    """Bytes as uint8, their exponent, and whether they are signed: `from_byte` of these is the stored value.

    Roots are rounded, not values (companding): scales of one layer can differ by factors of hundreds.
    """
    signed = bool((values < 0).any())
    exponent = byte_exponent(values, signed=signed)
    roots = (values.double().abs() * 2.0**exponent).sqrt().round().clamp_max(_top(signed))
    roots = torch.where(values < 0, -roots, roots)
    if signed and not bool((roots < 0).any()):
        return to_byte(values.clamp_min(0))
    return (roots % 256).to(torch.uint8), exponent, signed


def from_byte(codes: Tensor, exponent: int, *, signed: bool) -> Tensor:
    """Float32 values of `to_byte`; exact."""
    roots = (codes.to(torch.int8) if signed else codes).double()
    return (roots * roots.abs() * 2.0**-exponent).float()


def round_to_byte(values: Tensor) -> Tensor:
    """Float32 values as the file will hold them in 8 bits."""
    codes, exponent, signed = to_byte(values)
    return from_byte(codes, exponent, signed=signed)
