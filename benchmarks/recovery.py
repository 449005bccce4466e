"""What recovery training gives back, at several sizes, and what searching its recipe is worth.

    python benchmarks/recovery.py --data DIR --checkpoint resnet20_cifar10.pt --runs DIR

For each budget the package's own search (`--epochs` in the last rung) finds a policy and a recipe on `val`. Its pick
is then trained again with other seeds, `--seeds` in all; each time the file is written, weighed, read back and scored
on `test`. With `--last-rung` so is the best of the last rung where the pick is another. At the budgets of `--compare`
the same policy is also trained by the fixed recipe (distillation 0.9 at temperature 4, cosine from 0.02), as many
epochs and seeds. `--only cost` times steps: distilled against plain, and what goes on outside of forward and backward
passes. Everything measured is kept in `--runs`, so that an ended benchmark goes on where it was. Prints tables and ends
with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import torch

from autocompress import Policy, Settings, load_task, search
from autocompress.engine import compress
from autocompress.evaluate import Evaluator
from autocompress.files import write
from autocompress.front import Trial, feasible
from autocompress.policy import LayerChoice, Recovery
from autocompress.study import CONFIG, Outcome
from autocompress.task import Batch, Task

PARTS = ("accuracy", "cost")
FIXED = Recovery(lr=0.02, decay="cosine", distill_weight=0.9, temperature=4.0)
"""The best recipe of those that were tried by hand before anything was searched."""
STEPS, WARM_UP, ROUNDS = 12, 3, 5


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    data: Path
    checkpoint: Path
    runs: Path
    epochs: int
    seeds: int
    trials: int
    recoveries: int | None
    last_rung: bool = False

    def settings(self, budget: float) -> Settings:
        """Of the search under one budget, in percent of the original's bytes."""
        chosen = {} if self.recoveries is None else {"recoveries": self.recoveries}
        return Settings(
            task="cifar10",
            budgets=(f"size={budget:g}%",),
            trials=self.trials,
            epochs=self.epochs,
            data=str(self.data.resolve()),
            checkpoint=str(self.checkpoint.resolve()),
            **chosen,
        )

    def task(self) -> Task:
        return load_task("cifar10", data=self.data, checkpoint=self.checkpoint)


@dataclass(frozen=True)
class Trained:
    """One training: its file's bytes and accuracies."""

    bytes: int
    val: float
    test: float


def searched(bench: Bench, budget: float) -> Outcome:
    """The search under one budget; one that was ended goes on."""
    folder = bench.runs / f"{budget:g}"
    return search(bench.settings(budget), folder, resume=(folder / CONFIG).is_file())


def trained(bench: Bench, evaluator: Evaluator, policy: Policy, seed: int) -> Trained:
    """`policy` trained with one seed, from its file; what was trained before is read."""
    path = bench.runs / "trained" / f"{policy.key()}-{seed}"
    result = path.with_suffix(".json")
    if result.is_file():
        return Trained(**json.loads(result.read_text()))
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact = path.with_suffix(evaluator.target.suffix)
    evaluation = evaluator(policy, 1, artifact, seed=seed)
    if evaluation.measurement is None:
        raise SystemExit(f"training failed: {evaluation.error}")
    read = evaluator.reload(artifact)
    task = evaluator.task
    found = Trained(artifact.stat().st_size, task.score(read.model, "val"), task.score(read.model, "test"))
    write(result, json.dumps(vars(found)).encode())
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else math.nan:.4f}"


HEADER = (
    "| budget | recipe | bytes, largest | within | one-shot val | val | test | n |\n"
    "|---:|---|---:|---|---:|---:|---:|---:|"
)


def row(budget: float, name: str, limit: int, before: float, found: Sequence[Trained]) -> str:
    """One line of the table."""
    largest = max(f.bytes for f in found)
    return (
        f"| {budget:g}% | {name} | {largest:,} | {'yes' if largest <= limit else 'NO'} | {before:.4f} "
        f"| {spread([f.val for f in found])} | {spread([f.test for f in found])} | {len(found)} |"
    )


def accuracies(bench: Bench, budgets: Sequence[float], compare: Sequence[float]) -> Iterator[tuple[str, object]]:
    """The table of accuracies, and the JSON's keys."""
    reached: dict[str, float] = {}
    fixed: dict[str, dict[str, float]] = {}
    lines, evaluator = [HEADER], Evaluator(bench.task())
    for budget in budgets:
        outcome = searched(bench, budget)
        picked, limit = outcome.picked, outcome.budget.bytes
        assert picked is not None
        assert limit is not None
        policy = picked.evaluation.policy
        before = evaluator(policy.without_recovery()).measurement
        assert before is not None
        print(
            f"{budget:g}%: {outcome.evaluations} evaluations in {outcome.seconds:.0f} s; {policy.recovery}", flush=True
        )
        ours = again(bench, evaluator, picked)
        lines.append(row(budget, "searched", limit, before.quality, ours))
        reached[f"{budget:g}%"] = round(mean(f.test for f in ours), 4)
        longest = last_rung(outcome) if bench.last_rung else None
        if longest is not None and longest.number != picked.number:
            print(lines[-1], longest.evaluation.policy.recovery, sep="\n", flush=True)
            lines.append(row(budget, "searched, last rung", limit, math.nan, again(bench, evaluator, longest)))
        if budget in compare:
            plain = replace(policy, recovery=replace(FIXED, epochs=policy.recovery.epochs))
            theirs = [trained(bench, evaluator, plain, seed) for seed in range(bench.seeds)]
            lines.append(row(budget, "fixed", limit, before.quality, theirs))
            fixed[f"{budget:g}%"] = compared(ours, theirs)
        print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    yield "accuracy", reached
    yield "against_fixed", fixed


def again(bench: Bench, evaluator: Evaluator, trial: Trial) -> list[Trained]:
    """What the search measured of a trial, with seed 0, and as many trainings more as there are seeds left."""
    test = trial.quality_test
    if math.isnan(test):  # no member of the front: its file was not scored on `test`
        ours = [trained(bench, evaluator, trial.evaluation.policy, 0)]
    else:
        ours = [Trained(trial.measured.bytes, trial.measured.quality, test)]
    return [*ours, *(trained(bench, evaluator, trial.evaluation.policy, seed) for seed in range(1, bench.seeds))]


def last_rung(outcome: Outcome) -> Trial | None:
    """The best on `val` of those within the budget that were trained longest."""
    fits = [t for t in feasible(outcome.trials, outcome.budget) if t.evaluation.rung]
    rung = max((t.evaluation.rung for t in fits), default=0)
    return max((t for t in fits if t.evaluation.rung == rung), key=lambda t: t.measured.quality, default=None)


def compared(ours: Sequence[Trained], theirs: Sequence[Trained]) -> dict[str, float]:
    """Searched less fixed on test, seed by seed: mean and standard deviation."""
    gaps = [a.test - b.test for a, b in zip(ours, theirs, strict=True)]
    return {"gain": round(mean(gaps), 4), "std": round(stdev(gaps), 4) if len(gaps) > 1 else math.nan}


# --- cost -------------------------------------------------------------------------------------------------


class Short:
    """A task whose training epoch has only a few batches."""

    def __init__(self, task: Task, steps: int) -> None:
        self._task, self._steps = task, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def batches(self, split: Any, seed: int) -> Any:
        whole = self._task.batches(split, seed)
        return list(islice(whole, self._steps)) if split == "train" else whole


def cost(bench: Bench) -> Iterator[tuple[str, object]]:
    """Seconds per step of plain and distilled training, and of bare forward and backward passes, in turns."""
    evaluator = Evaluator(Short(bench.task(), STEPS))
    layers = {layer.name: LayerChoice(3, 0.5) for layer in evaluator.graph.layers}
    recipes = {
        "plain": replace(FIXED, epochs=1, distill_weight=0.0),
        "distilled": replace(FIXED, epochs=1),
        "distilled, learned scales, the teacher's answers remembered": replace(FIXED, epochs=1, scales="learned"),
        "distilled from two views": replace(FIXED, epochs=1, views=2),
    }
    runs: dict[str, Callable[[int], float]] = {
        name: lambda turn, recovery=recovery: timed(evaluator, Policy(layers, recovery=recovery), turn)
        for name, recovery in recipes.items()
    }
    times: dict[str, list[float]] = {name: [] for name in (*runs, "bare")}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            times[name].append(run(turn))
        times["bare"].append(bare(evaluator))
    kept = {name: values[1:] for name, values in times.items()}  # the first turn warms up
    print("\n| seconds per step | median | least | most | n |\n|---|---:|---:|---:|---:|")
    for name, values in kept.items():
        print(f"| {name} | {median(values):.3f} | {min(values):.3f} | {max(values):.3f} | {len(values)} |")
    yield "distilled_over_plain", ratio(kept["distilled"], kept["plain"])
    yield "two_views_over_plain", ratio(kept["distilled from two views"], kept["plain"])
    yield "outside_share", round(1 - ratio(kept["bare"], kept["plain"]), 4)


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over turns."""
    return round(median(x / y for x, y in zip(a, b, strict=True)), 4)


def timed(evaluator: Evaluator, policy: Policy, turn: int) -> float:
    """Seconds per step, from the first to the last step of one training."""
    marks: list[float] = []
    compress(evaluator.bench, policy, lambda *_: marks.append(perf_counter()), seed=turn)
    steps = [b - a for a, b in pairwise(marks)]
    return sum(steps[WARM_UP:]) / len(steps[WARM_UP:])


def bare(evaluator: Evaluator) -> float:
    """Seconds per step of forward and backward passes alone, on a batch that is ready, as training computes them."""
    bench = evaluator.bench
    student, batch = bench.student(bench.state).train(), Batch(*bench.calibration[0])
    layout = torch.channels_last if bench.precision.channels_last else torch.contiguous_format
    student.to(memory_format=layout)  # type: ignore[call-overload]
    inputs = batch.inputs.to(memory_format=layout)
    for p in student.parameters():
        p.requires_grad_()
    marks = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=bench.precision.autocast):
            outputs = student(inputs)
        evaluator.task.loss(outputs.float(), batch).backward()  # type: ignore[no-untyped-call]
        student.zero_grad()
        marks.append(perf_counter())
    for p in student.parameters():
        p.requires_grad_(False)
    student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    student.eval()
    steps = [b - a for a, b in pairwise(marks)]
    return sum(steps[WARM_UP:]) / len(steps[WARM_UP:])


def measured(bench: Bench, given: argparse.Namespace, wanted: Sequence[str]) -> Mapping[str, object]:
    """All keys of the JSON line."""
    found: dict[str, object] = {}
    if "cost" in wanted:
        found |= dict(cost(bench))
    if "accuracy" in wanted:
        found |= dict(accuracies(bench, given.budgets, given.compare))
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the searches and of what was trained")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4, 2.5, 6, 8], help="percent of the bytes")
    parser.add_argument("--compare", type=float, nargs="*", default=[4], help="budgets with the fixed recipe beside")
    parser.add_argument("--epochs", type=int, default=2, help="of the last rung")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each pick")
    parser.add_argument("--trials", type=int, default=60, help="one-shot evaluations of each search")
    parser.add_argument("--recoveries", type=int, help="trainings in the first rung of each search")
    parser.add_argument("--last-rung", action="store_true", help="the best of the last rung too, if it is not the pick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(given.threads)
    given.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        given.data,
        given.checkpoint,
        given.runs,
        given.epochs,
        given.seeds,
        given.trials,
        given.recoveries,
        given.last_rung,
    )
    print(f"{given.threads} thread(s), load {os.getloadavg()[0]:.1f}", flush=True)
    print(json.dumps(measured(bench, given, wanted)))


if __name__ == "__main__":
    main()
