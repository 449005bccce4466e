"""How well the latency table predicts what a stopwatch says, and what the table costs.

    python benchmarks/latency_table.py --data DIR --checkpoint resnet20_cifar10.pt

Random policies of ResNet-20 in equal parts with float and with integer kernels: half of them draw every group's keep
ratio freely, half near a level drawn for the whole policy, as a search moves between dense and narrow. Each policy's
file is timed in `--passes` passes over all of them, and counts as in the third during which the machine was fastest.
The cost of the table is over that of timing the dense model alone, 200 runs with session and warm-up. Single thread,
batch 1. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from scipy.stats import spearmanr

from autocompress import Policy, Workbench, compress, load_task
from autocompress.artifact.onnx import About, Candidate, Exporter
from autocompress.measure.latency import RuntimeMeter, alone
from autocompress.measure.latency_table import LatencyTable, Model, Predictor, build
from autocompress.measure.timing import calmest
from autocompress.policy import LayerChoice, Recovery
from autocompress.runtime import NAME, device, feeds, session, version
from autocompress.task import few

POLICIES, RUNS = 30, 200


@dataclass(frozen=True)
class Case:
    """A random policy, its activations' bits, and its file."""

    policy: Policy
    activations: int
    content: bytes


class Files:
    """Makes the file of a policy."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        dense = self._candidate(Policy(), 32)
        self.exporter = Exporter(bench.graph.layers, dense, [batch.inputs for batch in bench.calibration[:1]])

    def _candidate(self, policy: Policy, activations: int) -> Candidate:
        made = compress(self.bench, policy)
        architecture = self.bench.graph.architecture(policy)
        return Candidate(made.tensors, self.bench.realise(made), architecture, activations)

    def __call__(self, policy: Policy, activations: int) -> bytes:
        return self.exporter.build(self._candidate(policy, activations), About("cifar10", "accuracy", policy.key()))


def cases(files: Files, keep: Mapping[str, Sequence[float]], seed: int) -> list[Case]:
    """Random policies; every second one has integer kernels, every other pair of them draws its groups freely."""
    draw = random.Random(seed)
    found = []
    for i in range(POLICIES):
        activations = (32, 8)[i % 2]
        level = draw.random()
        chosen = {
            name: draw.choice(ratios if i // 2 % 2 else sorted(ratios, key=lambda r: abs(r - _at(level, ratios)))[:2])
            for name, ratios in keep.items()
        }
        bits = {layer.name: LayerChoice(activations) for layer in files.bench.graph.layers}
        policy = Policy(layers=bits, keep=chosen, recovery=Recovery(reestimate_bn=False))
        found.append(Case(policy, activations, files(policy, activations)))
    return found


def _at(level: float, ratios: Sequence[float]) -> float:
    return min(ratios) + level * (max(ratios) - min(ratios))


def dense_seconds(content: bytes, inputs: object) -> float:
    """One end-to-end measurement of the dense model: session, warm-up, runs."""
    start = perf_counter()
    ran = session(content)
    given = feeds(ran, inputs)
    for _ in range(RUNS + 3):
        ran.run(None, given)
    return perf_counter() - start


def table_error(files: Files, ratios: Sequence[float], seed: int, passes: int) -> dict[str, object]:
    """Builds a table, predicts random policies, measures them; the JSON's keys."""
    graph, bench = files.bench.graph, files.bench
    inputs = few(bench.teacher, bench.example.inputs, 1)
    content = files(Policy(), 32)
    keep = {group.name: tuple(ratios) for group in graph.prunable}
    with alone():
        watch = RuntimeMeter(content, inputs)
        seconds = median(dense_seconds(content, inputs) for _ in range(3))
        model = Model(graph, keep, files.exporter.computed, files)
        table = build(model, watch, (NAME, version(), device()), perf_counter)
        drawn = cases(files, keep, seed)
        repeated = [[watch(case.content, 24) for case in drawn] for _ in range(passes)]
    measured = [calmest(column).ms for column in zip(*repeated, strict=True)]
    return {**compared(table, Predictor(table, graph), drawn, measured), "table_build_ratio": table.seconds / seconds}


def compared(
    table: LatencyTable, predict: Predictor, drawn: Sequence[Case], measured: Sequence[float]
) -> dict[str, object]:
    """Prints predicted and measured milliseconds of each policy; the error's keys of the JSON."""
    predicted = [predict(case.policy, case.activations) for case in drawn]
    errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
    for activations in (32, 8):
        rows = [i for i, case in enumerate(drawn) if case.activations == activations]
        rank = spearmanr([predicted[i] for i in rows], [measured[i] for i in rows]).statistic
        print(f"activations {activations}: n {len(rows)}, error {median(abs(errors[i]) for i in rows):.3f}, "
              f"bias {median(errors[i] for i in rows):+.3f}, largest {max(abs(errors[i]) for i in rows):.3f}, "
              f"Spearman {rank:.3f}, {min(measured[i] for i in rows):.3f} to {max(measured[i] for i in rows):.3f} ms"
              )  # fmt: skip
    print(f"table: {table.runs} runs in {table.seconds:.1f} s, dense {table.dense:.3f} ms, own error {table.error:.3f}")
    return {
        "latency_error": round(median(abs(e) for e in errors), 4),
        "latency_spearman": round(float(spearmanr(predicted, measured).statistic), 4),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = Files(Workbench(load_task("cifar10", data=given.data, checkpoint=given.checkpoint)))
    for seed in range(given.repeats):
        found = table_error(files, given.ratios, seed, given.passes)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
