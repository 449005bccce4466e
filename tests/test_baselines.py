"""What a run is compared with, and that it can be read again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fakes import FakeEvaluator, make_space

from autocompress.baselines import FILE, Baseline, measure_baselines, read_baselines, uniform, write_baselines
from autocompress.policy import Policy
from autocompress.trial import Measurement

PRUNE = "[layers]\nbits = [32]\nsparsity = [0.0, 0.5, 0.85]\n"


def test_uniform_policies_have_one_choice_everywhere_and_say_which() -> None:
    found = dict(uniform(make_space()))
    assert list(found) == [
        "uniform 8 bits", "uniform 4 bits", "uniform 2 bits", "uniform 32 bits, 50% zeros",
    ]  # fmt: skip
    for name, policy in found.items():
        assert {
            f"uniform {c.bits} bits" + (f", {c.sparsity:.0%} zeros" if c.sparsity else "")
            for c in policy.layers.values()
        } == {name}
        assert set(policy.keep.values()) <= {1.0}


def test_a_space_without_bits_has_only_zeros_to_compare() -> None:
    assert [name for name, _ in uniform(make_space(PRUNE))] == [
        "uniform 32 bits", "uniform 32 bits, 50% zeros", "uniform 32 bits, 85% zeros",
    ]  # fmt: skip


def test_they_are_measured_as_trials_are_and_read_again(tmp_path: Path) -> None:
    evaluator, space = FakeEvaluator(), make_space()
    heard: list[tuple[int, int, str]] = []
    measure_baselines(evaluator, space, tmp_path, lambda *said: heard.append(said))
    found = read_baselines(tmp_path)
    expected = [evaluator(policy).measurement for _, policy in uniform(space)]
    assert [repr(b.measurement) for b in found] == [repr(m) for m in expected]
    assert [name for *_, name in heard] == [b.name for b in found]


def test_failures_are_left_out_and_a_stop_leaves_nothing(tmp_path: Path) -> None:
    space = make_space()

    def fault(policy: Policy, rung: int) -> str | None:
        del rung
        return "raise" if {c.bits for c in policy.layers.values()} == {4} else None

    measure_baselines(FakeEvaluator(fault=fault), space, tmp_path, lambda *_: None, lambda: True)
    assert not (tmp_path / FILE).exists()
    measure_baselines(FakeEvaluator(fault=fault), space, tmp_path, lambda *_: None)
    assert "uniform 4 bits" not in {b.name for b in read_baselines(tmp_path)}


@pytest.mark.parametrize(
    "content", ["", "[", "{}", "[1]", '[{"name": "x"}]', '[{"name": "x", "bytes": "many"}]', "[" * 9999]
)
def test_what_cannot_be_read_counts_as_not_measured(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert read_baselines(tmp_path) == []
    write_baselines(tmp_path, [Baseline("x", Measurement(5, 6, 0.5, math.nan, 1.0))])
    (found,) = read_baselines(tmp_path)
    assert (found.measurement.bytes, found.measurement.macs, found.measurement.quality) == (5, 6, 0.5)
    assert math.isnan(found.measurement.loss)
