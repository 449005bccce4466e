"""Timing files in ONNX Runtime: what takes turns, what counts, and what the runtime's profile says of a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from autocompress.errors import ExportError, LatencyError
from autocompress.measure import latency
from autocompress.measure.latency import ATTEMPTS, WARM_UP, RuntimeMeter, alone
from autocompress.measure.node_times import layer_times
from autocompress.measure.timing import Latency, calmest

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width: int = 16) -> bytes:
    """Two numbered convolutions with activations, a nameless one's worth of other nodes, and a numbered Gemm."""
    draw = np.random.default_rng(0)
    shapes = {"w0": (width, 3, 3, 3), "w1": (8, width, 3, 3), "w2": (8, 5)}
    weights = [numpy_helper.from_array(draw.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="0", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], name="1", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "w2"], ["y"], name="2"),
    ]
    ports = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["n", 3, 8, 8]), ("y", ["n", 5]))
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


# --- the meter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_latencies_are_positive_and_their_quartiles_in_order(threads: int) -> None:
    meter = RuntimeMeter(network(), IMAGE, threads=threads)
    found = meter(network(8), 10)
    assert 0 < found.low <= found.ms <= found.high < 1e4
    assert found.reference > 0
    assert meter.dense > 0
    assert (meter.threads, meter.batch) == (threads, 2)


def test_reference_of_an_earlier_run_scales_the_result() -> None:
    meter = RuntimeMeter(network(), IMAGE, dense_ms=1000.0)
    assert meter.dense == 1000.0
    assert 50.0 < meter(network(), 10).ms < 20_000.0


def test_candidate_and_reference_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    meter = RuntimeMeter(network(), IMAGE, dense_ms=1.0)
    monkeypatch.setattr(latency, "session", lambda *_, **__: "candidate")
    monkeypatch.setattr(latency, "_bound", lambda ran, _: lambda: order.append("c" if ran == "candidate" else "r"))
    monkeypatch.setattr(latency.time, "thread_time_ns", itertools.count(0, 1_000_000).__next__)
    found = meter(b"", 5)
    assert "".join(order) == "cr" * (WARM_UP + 5)
    assert (found.ms, found.samples, found.reference) == (1.0, 5, 1.0)


def ticking(monkeypatch: pytest.MonkeyPatch, durations: Iterator[int]) -> RuntimeMeter:
    """A meter on a machine where each run takes the next of `durations`, in milliseconds."""
    meter = RuntimeMeter(network(), IMAGE, dense_ms=1.0)
    clock = 0

    def run() -> None:
        nonlocal clock
        clock += next(durations) * 1_000_000

    meter._fastest = float("inf")
    monkeypatch.setattr(latency, "_bound", lambda *_: run)
    monkeypatch.setattr(latency.time, "thread_time_ns", lambda: clock)
    return meter


def test_rounds_with_a_slow_reference_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = ticking(monkeypatch, itertools.cycle([20, 10, 99, 30]))  # calm (2 times the reference), then disturbed
    found = meter(network(), 9)
    assert (found.low, found.ms, found.high, found.samples, found.reference) == (2.0, 2.0, 2.0, 9, 10.0)


def test_machine_that_is_never_calm_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = ticking(monkeypatch, itertools.cycle([90, 30]))
    meter._fastest = 10.0  # in an earlier measurement
    found = meter(network(), 9)
    assert (found.ms, found.samples) == (3.0, ATTEMPTS * 9)


@pytest.mark.parametrize("stuck", [[0, 10], [20, 0], [0, 0]])
def test_rounds_in_which_the_clock_stands_still_say_nothing(stuck: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    meter = ticking(monkeypatch, itertools.cycle([20, 10, *stuck]))
    found = meter(network(), 9)
    assert (found.low, found.ms, found.high, found.samples, found.reference) == (2.0, 2.0, 2.0, 9, 10.0)


def test_a_clock_that_never_moves_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = ticking(monkeypatch, itertools.repeat(0))
    with pytest.raises(LatencyError, match=r"clock did not move .* larger --batch"):
        meter(network(), 9)


def test_preempted_rounds_do_not_count_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = RuntimeMeter(network(), IMAGE, threads=2, dense_ms=1.0)
    lost = itertools.count()
    monkeypatch.setattr(latency, "_preemptions", lambda: next(lost) // 4)  # every second round
    assert meter(network(), 8).samples >= 8


def test_files_that_the_runtime_does_not_take_and_no_threads_are_refused() -> None:
    with pytest.raises(ExportError, match="does not take"):
        RuntimeMeter(b"nonsense", IMAGE)
    with pytest.raises(LatencyError, match="1 or more"):
        RuntimeMeter(network(), IMAGE, threads=0)


def test_timing_is_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock, Timeout

    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    with alone(), pytest.raises(Timeout), FileLock(tmp_path / "cache" / "timing.lock", timeout=0):
        pass
    with FileLock(tmp_path / "cache" / "timing.lock", timeout=0):
        pass


# --- noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "decided"), [(0.8, True), (0.9, False), (1.0, False), (1.2, False), (1.21, True)])
def test_limit_within_the_spread_is_in_doubt(limit: float, decided: bool) -> None:
    found = Latency(1.0, 0.9, 1.2, 40)
    assert found.decides(limit) is decided
    assert ("too noisy to decide" in found.doubt(limit)) is not decided


def test_calmest_measurement_is_that_of_the_fastest_machine() -> None:
    measured = [Latency(ms, ms, ms, 9, reference) for ms, reference in [(5.0, 3.0), (1.0, 1.0), (4.0, 2.0)]]
    assert calmest(measured).ms == 1.0
    assert calmest(measured[:1]).ms == 5.0


# --- the runtime's profile --------------------------------------------------------------------------------


def test_traced_layers_are_all_that_are_numbered() -> None:
    found = RuntimeMeter(network(), IMAGE).traced(network(), 10)
    assert set(found.layers) - {-1} == {0, 1, 2}
    assert all(ms > 0 for ms in found.layers.values())
    assert found.latency.ms > 0


def profile(*runs: list[tuple[str, int]]) -> bytes:
    events = [{"cat": "Session", "name": "model_run", "ts": 0, "dur": 9}]
    clock = 0
    for name, duration in itertools.chain(*runs):
        clock += 10
        events.append({"cat": "Node", "name": f"{name}_kernel_time", "ts": clock, "dur": duration})
        events.append({"cat": "Node", "name": f"{name}_fence_before", "ts": clock, "dur": 1000})
    return json.dumps(events[::-1]).encode()


def test_nodes_count_to_the_numbered_one_before_them() -> None:
    run = [
        ("Quantize_3", 1),
        ("b_nchwc", 10),
        ("ReorderOutput_token_4", 2),
        ("1_token_9", 20),
        ("2/MatMulAddFusion", 5),
    ]
    found = layer_times(profile(run), network(), [0])
    assert found == {-1: 0.001, 0: 0.012, 1: 0.02, 2: 0.005}


def test_only_the_given_runs_count_and_the_middle_of_them() -> None:
    runs = [[("0", t), ("1", 7)] for t in (900, 10, 20, 30, 400)]
    assert layer_times(profile(*runs), network(), [1, 2, 3, 4]) == {0: 0.025, 1: 0.007}


@pytest.mark.parametrize("name", ["a_nchwc", "b_nchwc", "0", "0_token_12", "fused 0"])
def test_renamed_nodes_are_recognised(name: str) -> None:
    assert set(layer_times(profile([(name, 3)]), network(), [0])) == {0}


@pytest.mark.parametrize("name", ["x_nchwc", "Conv_0", "ReorderInput_token_0", "Relu_1"])
def test_other_nodes_belong_to_no_layer(name: str) -> None:
    assert set(layer_times(profile([(name, 3)]), network(), [0])) == {-1}
