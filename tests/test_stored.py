from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.stored import (
    BYTE_EXPONENTS,
    Byte,
    Full,
    Half,
    Quantised,
    Raw,
    from_byte,
    from_half,
    half_exponent,
    round_to_byte,
    round_to_half,
    to_byte,
    to_half,
)

NEAR_THE_LARGEST = st.lists(
    st.tuples(st.sampled_from((-1.0, 1.0)), st.floats(2.0**-20, 1.0, exclude_max=True, width=32)),
    min_size=1,
    max_size=20,
)
MAGNITUDES = st.floats(2.0**-86, 2.0**100, width=32)
"""Largest values whose exponent is not clamped, up to 1.3e30."""


def scaled(pairs: list[tuple[float, float]], largest: float) -> Tensor:
    return torch.tensor([largest] + [sign * share * largest for sign, share in pairs], dtype=torch.float32)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 2), (3,)])
def test_quantised_values_are_scale_times_code_minus_zero_per_row(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 16, shape).astype(np.uint8)
    scale, zero = draw.normal(size=3).astype(np.float32), np.array([0, 7, 15], dtype=np.uint8)
    found = Quantised(torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(zero), 4, False).dense()
    expected = np.stack(
        [s * (c.astype(np.float32) - np.float32(z)) for s, c, z in zip(scale, codes, zero, strict=True)]
    )
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", [Half, Byte, Full, Raw])
def test_unquantised_tensors_are_their_values(kind: type[Half] | type[Byte] | type[Full] | type[Raw]) -> None:
    values = torch.tensor([1.0, -2.0, 0.5])
    assert torch.equal(kind(values).dense(), values)


@settings(max_examples=50, deadline=None)
@given(NEAR_THE_LARGEST, MAGNITUDES)
def test_rounding_to_half_twice_changes_nothing(pairs: list[tuple[float, float]], largest: float) -> None:
    once = round_to_half(scaled(pairs, largest))
    assert torch.equal(round_to_half(once), once)


def test_rounding_twice_changes_nothing_when_the_largest_value_rounds_up_to_a_power_of_two() -> None:
    once = round_to_half(torch.tensor([1 - 2.0**-13, 2.0**-39]))
    assert torch.equal(round_to_half(once), once)


@settings(max_examples=50, deadline=None)
@given(NEAR_THE_LARGEST, MAGNITUDES)
def test_values_near_the_largest_keep_eleven_bits(pairs: list[tuple[float, float]], largest: float) -> None:
    values = scaled(pairs, largest)
    exact, found = values.double().numpy(), round_to_half(values).double().numpy()
    assert np.all(np.abs(found - exact) <= 2.0**-11 * np.abs(exact))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_half_values_are_numpy_halves_of_the_scaled_values(values: list[float]) -> None:
    given_values = torch.tensor(values, dtype=torch.float32)
    halves, exponent = to_half(given_values)
    expected = np.ldexp(given_values.double().numpy(), exponent).astype(np.float16)
    np.testing.assert_array_equal(halves.numpy(), expected)
    np.testing.assert_array_equal(
        from_half(halves, exponent).numpy(), np.ldexp(expected.astype(np.float64), -exponent).astype(np.float32)
    )


@pytest.mark.parametrize("largest", [1e30, 1e20, 65504.0, 1.0, 6e-8, 1e-20, 1e-30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_magnitude_overflows_or_vanishes(largest: float, sign: float) -> None:
    found = round_to_half(torch.tensor([sign * largest, 0.0]))
    assert torch.isfinite(found).all()
    assert float(found[0]) == pytest.approx(sign * largest, rel=2.0**-11)
    assert float(found[1]) == 0.0


@settings(max_examples=50, deadline=None)
@example(2.0**15 - 1)
@given(MAGNITUDES)
def test_the_exponent_brings_the_largest_value_to_the_top_of_the_format(largest: float) -> None:
    brought = np.ldexp(np.float64(np.float32(largest)), half_exponent(torch.tensor([largest, -largest / 3])))
    assert 2.0**14 <= np.float16(brought) < 2.0**15


@pytest.mark.parametrize(("largest", "expected"), [(1e-45, 160), (1e-38, 141), (3e38, -113), (1.0, 14), (32768.0, -1)])
def test_exponents_reach_all_floats_and_clamp(largest: float, expected: int) -> None:
    assert half_exponent(torch.tensor([largest])) == expected


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(0), torch.zeros(2, 0)])
def test_nothing_but_zeros_has_exponent_zero(values: Tensor) -> None:
    assert half_exponent(values) == 0
    assert torch.equal(round_to_half(values), values)


# --- bytes ----------------------------------------------------------------------------------------------

ANY = st.lists(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=True), min_size=1, max_size=12)
ALIKE = st.tuples(
    st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=12), st.floats(2.0**-100, 2.0**100, width=32)
)


@settings(max_examples=300, deadline=None)
@example([1.0, -1e-9])  # its only negative value becomes 0
@example([180.4**2, 1.0])  # rounded down its root would fit in with another exponent
@example([1e-45, -3e-45])
@given(ANY)
def test_bytes_of_bytes_are_the_same(values: list[float]) -> None:
    given_values = torch.tensor(values, dtype=torch.float32)
    codes, exponent, signed = to_byte(given_values)
    once = from_byte(codes, exponent, signed=signed)
    assert BYTE_EXPONENTS[0] <= exponent <= BYTE_EXPONENTS[1]
    assert torch.equal(round_to_byte(once), once)
    assert torch.isfinite(once).all()
    if once.any():
        again = to_byte(once)
        assert torch.equal(again[0], codes)
        assert again[1:] == (exponent, signed)


@settings(max_examples=300, deadline=None)
@example(([9.999999960041972e-13], 2.0**-100))  # a subnormal one
@given(ALIKE)
def test_roots_are_within_half_of_a_step(drawn: tuple[list[float], float]) -> None:
    """A step is at most a 180th of the largest root (90th with signs), and what is cut off the top half of one more.

    It is never less than the root of 2^-149, of which all float32 are multiples.
    """
    values = torch.tensor(drawn[0], dtype=torch.float32) * drawn[1]
    largest = float(values.abs().max())
    found = round_to_byte(values).double()
    step = (largest**0.5) / (90 if (values < 0).any() else 180)
    allowed = max(1.01 * step, 0.5 * 2.0 ** (-149 / 2))
    assert ((found.abs().sqrt() - values.double().abs().sqrt()).abs() <= allowed).all()
    assert ((values.sign() == found.sign()) | (found == 0)).all()


@pytest.mark.parametrize(
    ("largest", "exponent"), [(1.0, 15), (65025.0, 0), (65536.0, -1), (3.4e38, -113), (1e-45, 149)]
)
def test_unsigned_bytes_count_squares(largest: float, exponent: int) -> None:
    codes, found, signed = to_byte(torch.tensor([largest, 0.0, largest / 4]))
    assert (found, signed) == (exponent, False)
    assert int(codes[0]) == min(255, round((largest * 2.0**exponent) ** 0.5))
    assert abs(int(codes[0]) / 2 - int(codes[2])) <= 0.5


def test_signed_bytes_are_two_s_complement_of_roots() -> None:
    codes, exponent, signed = to_byte(torch.tensor([16129.0, -16129.0, 4.0, -9.0, 0.0]))
    assert (exponent, signed) == (0, True)
    assert codes.tolist() == [127, 256 - 127, 2, 256 - 3, 0]


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(0), -torch.zeros(2)])
def test_bytes_of_nothing_but_zeros(values: Tensor) -> None:
    assert to_byte(values)[1:] == (0, False)
    assert torch.equal(round_to_byte(values), values)
