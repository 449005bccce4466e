"""How much faster a network gets for one point of accuracy, by the package's own search and a stopwatch.

    python benchmarks/latency.py --data DIR --checkpoint resnet20_cifar10.pt

For ResNet-20, a depthwise-separable network and an MLP (`networks.py`): searches at falling latency budgets with
integer kernels, or with float ones if those reach nothing, until `val` loses more than `POINT`; of what loses no more
the fastest file is taken.
Files are timed again alone, each run beside one of the dense float file, and scored on `test` once, by their search.
`one-shot` is without training, `recovered` with `--epochs` of it for two members of each front. `half_macs` removes
channels alone, at half the multiply-accumulates, float weights, no training. `table` asks how well the latency table
predicts random policies and what it costs (`latency_table.py`), and `planes` whether weights stored in 4 bits run as
fast as in 8.
Single thread, batch 1, ONNX Runtime. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from latency_table import Files, table_error

from autocompress import Policy, Settings, Study, Workbench, load_space, load_task, search
from autocompress.errors import NothingFits
from autocompress.front import Trial
from autocompress.measure.latency import RuntimeMeter, alone
from autocompress.measure.timing import Latency
from autocompress.policy import LayerChoice, Recovery
from autocompress.runtime import device, version
from autocompress.space import SpaceFile
from autocompress.study import Outcome
from autocompress.task import few

POINT = 0.01
"""Accuracy that may go."""
NETWORKS = {"resnet20": "cifar10", "depthwise": "networks.py:depthwise", "mlp": "networks.py:perceptron"}
ONE_SHOT = {"resnet20": (56, 48, 43)}
RECOVERED = {"resnet20": (46, 43), "depthwise": (44, 41, 38), "mlp": (20, 15)}
"""Budgets, in percent of the dense latency, from slow to fast."""
PARTS = (*NETWORKS, "half_macs", "table", "planes")
PASSES = 5


@dataclass(frozen=True)
class Bench:
    """What all searches share."""

    data: Path
    checkpoint: Path
    folder: Path
    trials: int
    epochs: int

    def settings(self, network: str, budget: str, epochs: int, format: str = "onnx") -> Settings:
        """Of one search."""
        task = NETWORKS[network]
        own = task == "cifar10"
        return Settings(
            task=task if own else str(Path(__file__).parent / task),
            budgets=(budget,),
            space="latency",
            trials=self.trials,
            epochs=epochs,
            recoveries=2,
            data=str(self.data) if own else None,
            checkpoint=str(self.checkpoint) if own else None,
            format=format,
        )


@dataclass(frozen=True)
class Found:
    """A member of a search's final front, its file timed again, and what the dense model scores."""

    trial: Trial
    timed: Latency
    dense_ms: float
    dense: tuple[float, float]  # accuracy on val and test

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.timed.ms

    @property
    def lost(self) -> tuple[float, float]:
        """Accuracy lost on val and on test."""
        return self.dense[0] - self.trial.measured.quality, self.dense[1] - self.trial.quality_test


def with_kernels(activations: Sequence[int]) -> SpaceFile:
    """The shipped space with one kind of kernels."""
    file = load_space("latency")
    return file.model_copy(update={"layers": file.layers.model_copy(update={"activations": list(activations)})})


def run(settings: Settings, space: SpaceFile, folder: Path) -> tuple[Outcome, Study]:
    """One search in a new folder."""
    started: list[Study] = []
    return search(settings, folder, space=space, started=started.append), started[0]


def searched(bench: Bench, network: str, budget: int, activations: int, epochs: int) -> list[Found]:
    """The front of one search, timed again; empty if nothing fits."""
    name = f"{network}-{budget}-{activations}-{epochs}"
    settings = bench.settings(network, f"latency={budget}%", epochs)
    try:
        outcome, study = run(settings, with_kernels([activations]), bench.folder / name)
    except NothingFits as error:
        print(f"| {budget}% | {activations} | {error} |", flush=True)
        return []
    evaluator = study.evaluator
    dense = evaluator.quality.dense, float(evaluator.task.score(evaluator.bench.teacher, "test"))
    found = []
    for trial in outcome.front:
        timed = evaluator.target.retime(outcome.folder / trial.artifact)
        found.append(Found(trial, timed, evaluator.dense.latency_ms, dense))
        print(row(budget, activations, outcome, found[-1]), flush=True)
    for text in outcome.warnings:
        print(f"{name}: {text}", file=sys.stderr)
    return found


HEADER = (
    "| budget | kernels | evaluations | trained | val lost | test lost | bytes | predicted ms | ms (quartiles, n) "
    "| faster |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def row(budget: int, activations: int, outcome: Outcome, found: Found) -> str:
    """One line of the table."""
    measured, timed = found.trial.measured, found.timed
    kernels = "float" if activations == 32 else "integer"
    epochs = found.trial.evaluation.policy.recovery.epochs
    return (
        f"| {budget}% | {kernels} | {outcome.evaluations} in {outcome.seconds:.0f} s | {epochs} | {found.lost[0]:.4f} "
        f"| {found.lost[1]:.4f} | {measured.bytes:,} | {measured.predicted_ms:.3f} "
        f"| {timed.ms:.3f} ({timed.low:.3f} to "
        f"{timed.high:.3f}, {timed.samples}) | {found.speedup:.2f} |"
    )


def fastest(bench: Bench, network: str, budgets: Sequence[int], epochs: int) -> float:
    """Prints every front member on the way down; the speedup of the fastest that loses no more than `POINT` on val.

    Of files that a stopwatch cannot tell apart, whose quartiles overlap with the fastest's, the best on val counts.
    """
    print(f"\n## {network}, {f'{epochs} epochs of recovery' if epochs else 'one-shot'}\n\n{HEADER}", flush=True)
    good: list[Found] = []
    for activations in (8, 32):
        for budget in budgets:
            kept = [f for f in searched(bench, network, budget, activations, epochs) if f.lost[0] <= POINT]
            if not kept:
                break
            good += kept
        if good:  # floats are slower at the same accuracy wherever integers reach it
            break
    if not good:
        return math.nan
    first = max(good, key=lambda found: found.speedup)
    best = min((f for f in good if f.timed.low <= first.timed.high), key=lambda found: found.lost[0])
    print(
        f"\nchosen by val: {best.speedup:.2f} times faster, val {best.trial.measured.quality:.4f} of "
        f"{best.dense[0]:.4f}, test {best.trial.quality_test:.4f} of {best.dense[1]:.4f}, "
        f"{best.dense_ms:.3f} to {best.timed.ms:.3f} ms"
    )
    return round(best.speedup, 3)


def half_macs(bench: Bench) -> float:
    """One-shot accuracy on test of the best of val at half the multiply-accumulates, float weights."""
    file = with_kernels([32])
    floats = file.layers.model_copy(update={"bits": [32]})
    channels = file.channels.model_copy(update={"multiple_of": 1})
    settings = bench.settings("resnet20", "macs=50%", 0, "packed")
    outcome, _ = run(
        settings, file.model_copy(update={"layers": floats, "channels": channels}), bench.folder / "half_macs"
    )
    picked = outcome.picked
    assert picked is not None
    print(
        f"\n## half the multiply-accumulates, channels only\n\n{outcome.evaluations} evaluations in "
        f"{outcome.seconds:.0f} s: {picked.measured.macs:,} of {outcome.dense.macs:,}, val "
        f"{picked.measured.quality:.4f} of {outcome.dense.quality:.4f}, test {picked.quality_test:.4f}"
    )
    return round(picked.quality_test, 4)


def planes_over_int8(files: Files) -> float:
    """Latency of a file with weights in 4-bit planes over that of one with int8 weights, taking turns."""
    made = []
    for bits in (4, 8):
        layers = {layer.name: LayerChoice(bits) for layer in files.bench.graph.layers}
        made.append(files(Policy(layers=layers, recovery=Recovery(reestimate_bn=False)), 8))
    inputs = few(files.bench.teacher, files.bench.example.inputs, 1)
    with alone():
        timed = [RuntimeMeter(made[1], inputs, dense_ms=1.0)(made[0], 200) for _ in range(PASSES)]
    middle = sorted(timed, key=lambda t: t.ms)[PASSES // 2]
    print(
        f"\n## 4-bit planes against int8\n\n{len(made[0]):,} and {len(made[1]):,} bytes; ratio of latencies "
        f"{middle.ms:.3f} (quartiles {middle.low:.3f} to {middle.high:.3f}, n {middle.samples}); medians of "
        f"{PASSES} passes "
        f"{min(t.ms for t in timed):.3f} to {max(t.ms for t in timed):.3f}"
    )
    return round(middle.ms, 4)


def parts(bench: Bench, wanted: Sequence[str]) -> Iterator[tuple[str, object]]:
    """The JSON's keys, as they are measured."""
    if "resnet20" in wanted:
        yield "speedup_oneshot", fastest(bench, "resnet20", ONE_SHOT["resnet20"], 0)
        yield "speedup_recovered", fastest(bench, "resnet20", RECOVERED["resnet20"], bench.epochs)
    for network in ("depthwise", "mlp"):
        if network in wanted:
            yield f"speedup_{network}", fastest(bench, network, RECOVERED[network], bench.epochs)
    if "half_macs" in wanted:
        yield "half_macs_accuracy", half_macs(bench)
    if "table" in wanted or "planes" in wanted:
        files = Files(Workbench(load_task("cifar10", data=bench.data, checkpoint=bench.checkpoint)))
        if "planes" in wanted:
            yield "plane_over_int8", planes_over_int8(files)
        if "table" in wanted:
            print("\n## the latency table\n")
            yield from table_error(files, (0.5, 0.75, 1.0), 0, PASSES).items()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--epochs", type=int, default=2, help="of recovery training")
    parser.add_argument("--trials", type=int, default=20, help="evaluations of each search")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    os.environ["CIFAR10"] = str(given.data.resolve())
    print(f"{device()}, ONNX Runtime {version()}, one thread, batch 1, load {os.getloadavg()[0]:.1f}")
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.data, given.checkpoint, Path(folder), given.trials, given.epochs)
        result = dict(parts(bench, wanted))
    print(f"\n{perf_counter() - start:.0f} s")
    print(json.dumps({"device": device(), **result}))


if __name__ == "__main__":
    main()
