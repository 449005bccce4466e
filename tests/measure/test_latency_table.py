"""The table of layer times: which runs fill it, that it predicts an additive machine exactly, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import GRAPH, make_graph

from autocompress.errors import LatencyError
from autocompress.graph import Graph
from autocompress.measure import latency_table
from autocompress.measure.latency_table import (
    MAX_RUNS,
    MIN_RUNS,
    LatencyTable,
    Model,
    Predictor,
    build,
    design,
    fits_integers,
    read_table,
)
from autocompress.measure.timing import Latency, Traced
from autocompress.policy import LayerChoice, Policy

RATIOS = (0.5, 0.75, 1.0)
KEEP = {"conv1": RATIOS, "conv2": RATIOS}
COMPUTED = tuple(layer.weight for layer in GRAPH.layers)
FLOAT_EDGE = 0.25
PLACE = ("onnxruntime", "1.0", "a board")


def file_of(policy: Policy, activations: int) -> bytes:
    """A file of the fake machine: it runs descriptions of models."""
    return json.dumps([policy.to_json(), activations]).encode()


def layer_ms(graph: Graph, policy: Policy, activations: int) -> list[float]:
    """Each layer's time: in blocks of four channels, integers faster, floats among them slower by their edges."""
    shapes, found = graph.shapes(policy), []
    for layer in graph.layers:
        rows, columns = shapes[layer.weight][:2]
        integer = activations == 8 and fits_integers(policy.layers.get(layer.name, LayerChoice()))
        blocks = (-(-rows // 4)) * (-(-columns // 4)) * layer.positions
        found.append(0.01 * blocks * (0.4 if integer else 1.0) + 0.02 * (rows % 4 != 0))
        found[-1] += FLOAT_EDGE if activations == 8 and not integer else 0.0
    return found


@dataclass
class FakeWatch:
    """A machine on which latencies are sums; tracing adds `probe` to every node."""

    dense: float
    unit: float = 1.0
    threads: int = 1
    batch: int = 2
    overhead: float = 0.5
    probe: float = 0.003
    asked: int = 0

    def total(self, content: bytes) -> float:
        policy, activations = json.loads(content)
        return self.overhead + sum(layer_ms(GRAPH, Policy.from_json(policy), activations))

    def __call__(self, content: bytes, samples: int = 5) -> Latency:
        self.asked += 1
        ms = self.unit * self.total(content)
        return Latency(ms, ms, ms, samples, 1.0)

    def traced(self, content: bytes, samples: int = 5) -> Traced:
        policy, activations = json.loads(content)
        times = layer_ms(GRAPH, Policy.from_json(policy), activations)
        return Traced(self(content, samples), {i: self.unit * (t + self.probe) for i, t in enumerate(times)})

    def against(self, reference: bytes, dense_ms: float) -> FakeWatch:
        return FakeWatch(dense_ms, dense_ms / self.total(reference), probe=self.probe)


def made(keep: Mapping[str, Sequence[float]] = KEEP, watch: FakeWatch | None = None) -> LatencyTable:
    return build(Model(GRAPH, keep, COMPUTED, file_of), watch or FakeWatch(9.0), PLACE, iter(range(100)).__next__)


def policy(a: float, b: float, bits: Sequence[int] = (8, 8, 8)) -> Policy:
    names = [layer.name for layer in GRAPH.layers]
    return Policy(layers=dict(zip(names, map(LayerChoice, bits), strict=True)), keep={"conv1": a, "conv2": b})


# --- design -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [(0.5, 1.0), RATIOS, (0.25, 0.5, 0.75, 1.0)])
def test_design_shows_every_pair_of_widths_of_a_layer(ratios: tuple[float, ...]) -> None:
    runs = design(GRAPH, {"conv1": ratios, "conv2": ratios})
    assert {(run["conv1"], run["conv2"]) for run in runs} == set(itertools.product(ratios, ratios))
    assert MIN_RUNS <= len(runs) <= MAX_RUNS
    assert len(runs) <= max(MIN_RUNS, len(ratios) ** 2)


def test_design_spans_the_latencies_and_stays_small_with_many_ratios() -> None:
    ratios = tuple(k / 8 for k in range(2, 9))
    runs = design(GRAPH, {"conv1": ratios, "conv2": ratios})
    assert len(runs) == MAX_RUNS
    assert {"conv1": 0.25, "conv2": 0.25} in runs
    assert {"conv1": 1.0, "conv2": 1.0} in runs
    for name in KEEP:
        assert {run[name] for run in runs} == set(ratios)
    assert len({tuple(run.values()) for run in runs}) == MAX_RUNS


def test_design_without_choices_is_the_dense_model_twice() -> None:
    assert design(GRAPH, {}) == ({"conv1": 1.0, "conv2": 1.0},) * 2


# --- prediction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [32, 8])
def test_latencies_that_add_up_are_predicted_exactly(activations: int) -> None:
    table, watch = made(), FakeWatch(9.0)
    for a, b in itertools.product(RATIOS, RATIOS):
        wanted = watch.total(file_of(policy(a, b), activations))
        assert table.predict(GRAPH, policy(a, b), activations) == pytest.approx(wanted, rel=1e-6)
    assert table.error < 1e-6


def test_float_layers_among_integer_ones_cost_their_float_time_and_an_edge() -> None:
    table, watch = made(), FakeWatch(9.0)
    mixed = policy(1.0, 1.0, (8, 32, 4))
    assert table.predict(GRAPH, mixed, 8) == pytest.approx(watch.total(file_of(mixed, 8)), rel=0.02)
    assert table.predict(GRAPH, mixed, 8) > table.predict(GRAPH, policy(1.0, 1.0), 8) + FLOAT_EDGE / 2


def test_weights_that_are_not_signed_bytes_count_as_floats() -> None:
    assert [fits_integers(LayerChoice(bits)) for bits in (1, 7, 8, 16, 32)] == [True, True, True, False, False]
    assert fits_integers(LayerChoice(7, scheme="asymmetric"))
    assert not fits_integers(LayerChoice(8, scheme="asymmetric"))


def test_predictor_agrees_with_the_table_and_remembers() -> None:
    table = made()
    predict = Predictor(table, GRAPH)
    for a, b in itertools.product(RATIOS, RATIOS):
        assert predict(policy(a, b), 8) == predict(policy(a, b), 8) == table.predict(GRAPH, policy(a, b), 8)


def test_widths_that_were_not_measured_are_estimated_between_those_that_were() -> None:
    table = made()
    times = [table.predict(GRAPH, policy(ratio, 1.0), 32) for ratio in (0.5, 0.625, 1.0)]
    assert times[0] < times[1] < times[2]


def test_times_follow_the_calmest_measurements_of_the_dense_file() -> None:
    class Disturbed(FakeWatch):
        """Slower by half in two of three measurements, when its reference is slow too."""

        def __call__(self, content: bytes, samples: int = 5) -> Latency:
            found = super().__call__(content, samples)
            slow = 1.5 if self.asked % 3 else 1.0
            return replace(found, ms=found.ms * slow, reference=slow)

    table = made(watch=Disturbed(9.0))
    assert table.predict(GRAPH, policy(1.0, 1.0), 32) == pytest.approx(FakeWatch(9.0).total(file_of(policy(1, 1), 32)))


def test_model_without_prunable_channels_gets_a_table() -> None:
    table = made({})
    assert table.runs == 2 * 2 + latency_table.MIXED_RUNS
    wanted = FakeWatch(9.0).total(file_of(policy(1, 1), 8))
    assert table.predict(GRAPH, policy(1, 1), 8) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("activations", [32, 8])
def test_removed_layers_take_no_time_and_the_rest_takes_its_own(activations: int) -> None:
    table = made({"conv1": (0.0, *RATIOS), "conv2": RATIOS}, FakeWatch(9.0, probe=0.0))
    assert table.error < 1e-9
    for a, b in itertools.product((0.0, *RATIOS), RATIOS):
        one = policy(a, b)
        found = table.predict(GRAPH, one, activations)
        assert found == pytest.approx(FakeWatch(9.0).total(file_of(one, activations)))
    assert all(entry.inputs and entry.outputs for p in table.precisions for rows in p.layers.values() for entry in rows)


def test_design_removes_some_and_all_of_the_groups_that_can_go() -> None:
    plain, more = (design(GRAPH, {"conv1": (*zero, *RATIOS), "conv2": (*zero, *RATIOS)}) for zero in ((), (0.0,)))
    assert more[: len(plain)] == plain
    assert [sorted(run.items()) for run in more[len(plain) :]][-1] == [("conv1", 0.0), ("conv2", 0.0)]
    assert {len(run) for run in more[len(plain) :]} == {1, 2}


def test_layer_that_the_runtime_does_not_show_adds_nothing() -> None:
    table = build(Model(GRAPH, KEEP, COMPUTED[:2], file_of), FakeWatch(9.0), PLACE, iter(range(100)).__next__)
    assert table.precision(32).ms("fc", (10, 16)) == 0.0
    assert table.predict(GRAPH, policy(1, 1), 32) > 0


# --- as a file --------------------------------------------------------------------------------------------


def test_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = made()
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json()))
    assert read_table(path) == table
    assert (table.deployment.device, table.deployment.batch, table.dense) == ("a board", 2, 9.0)


def damaged(path: Sequence[str | int], value: object) -> Any:
    data = copy.deepcopy(json.loads(json.dumps(made().to_json())))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


ENTRY = ("precisions", 0, "layers", "conv1", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 99),
        (("deployment",), None),
        (("deployment", "batch"), 0),
        (("deployment", "threads"), True),
        (("deployment", "device"), 3),
        (("dense",), 0),
        (("dense",), float("nan")),
        (("precisions",), 3),
        (("precisions", 0, "activations"), 7),
        (("precisions", 0, "overhead"), "much"),
        (("precisions", 0, "overhead"), float("-inf")),
        (("precisions", 0, "scale"), -1.0),
        (("precisions", 0, "layers"), []),
        (("precisions", 0, "layers", "conv1"), []),
        ((*ENTRY, "ms"), float("inf")),
        ((*ENTRY, "ms"), 10**400),
        ((*ENTRY, "outputs"), 1.5),
        ((*ENTRY, "inputs"), -1),
        (("edge_layer",), [1]),
        (("runs",), "5"),
    ],
)
def test_damaged_tables_are_refused(path: Sequence[str | int], value: object) -> None:
    with pytest.raises(LatencyError, match="cannot be read"):
        LatencyTable.from_json(damaged(path, value))


@pytest.mark.parametrize("data", [None, [], "x", {}, 3, {"version": 1}])
def test_what_is_no_table_is_refused(data: object) -> None:
    with pytest.raises(LatencyError, match="cannot be read"):
        LatencyTable.from_json(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_table_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "board.json"
    path.write_bytes(content)
    with pytest.raises(LatencyError, match=r"board\.json cannot be read"):
        read_table(path)
    with pytest.raises(LatencyError, match="missing"):
        read_table(tmp_path / "missing.json")


def test_tables_of_other_models_and_deployments_are_refused() -> None:
    table = made()
    table.check(GRAPH, "1.0", 1, 2)
    with pytest.raises(LatencyError, match="another model"):
        table.check(make_graph(lambda name: f"other.{name}"), "1.0", 1, 2)
    with pytest.raises(LatencyError, match=r"onnxruntime 1\.0, and this is 1\.1"):
        table.check(GRAPH, "1.1", 1, 2)
    with pytest.raises(LatencyError, match="1 threads, not 4"):
        table.check(GRAPH, "1.0", 4, 2)
    with pytest.raises(LatencyError, match="batch size of 2, not 1"):
        table.check(GRAPH, "1.0", 1, 1)


def test_activations_without_times_are_refused() -> None:
    table = made()
    with pytest.raises(LatencyError, match="no times for 8-bit"):
        replace(table, precisions=table.precisions[:1]).predict(GRAPH, policy(1, 1), 8)
