"""Whether lowering what a search lowers also raises the accuracy on `test`.

    python benchmarks/objective.py RUN [RUN ...] [--data DIR --checkpoint FILE]

A search lowers the screened loss of the best policy within a size, over its whole course. So for `--limits` sizes,
evenly in log bytes from the budget down, this takes the policy with the least screened loss after the solver's own
first policies (trial `--first`), and after each doubling of the trials, to the end, and scores all of them on all of
`val` and on `test`. The last is compared with the first of the same size input by input: the gain is the mean over
inputs and over the sizes whose loss was lowered, and its standard error is that of paired differences over the inputs
of `test`. Several runs of one task (other seeds, other budgets) are pooled.

Beside it the hard case: candidates within `NEAR` of the budget, from the least to the most screened loss, most of them
closer than noise. Spearman's rank correlation with the accuracy on `test` has a standard error from resampled inputs.
Prints tables and ends with one JSON line. For classification tasks; the task is that of the run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from autocompress.controllers.solver import SEEDS
from autocompress.evaluate import Evaluator
from autocompress.front import Trial
from autocompress.measure.quality import Quality
from autocompress.report.tables import Run
from autocompress.task import ClassificationTask

NEAR = 0.03
RESAMPLES = 1000

Right = NDArray[np.float64]
"""1 for each input of `test` that is classified rightly, else 0."""


@dataclass(frozen=True)
class Scored:
    """A policy on all of `val`, and input by input on `test`."""

    val: Quality
    right: Right


class Scores:
    """Each policy of a run, scored once."""

    def __init__(self, run: Run, elsewhere: Mapping[str, str]) -> None:
        """`elsewhere` names data and checkpoint where they are not where the run found them."""
        task = replace(run.settings, **elsewhere).load_task()
        if not isinstance(task, ClassificationTask):
            raise SystemExit(f"the task {task.name!r} is no ClassificationTask: nothing is right or wrong there")
        self._task, self._evaluator = task, Evaluator(task, seed=run.settings.seed)
        self._known: dict[str, Scored] = {}

    def __call__(self, trial: Trial) -> Scored:
        policy = trial.evaluation.policy
        if policy.key() not in self._known:
            _, model = self._evaluator.build(policy)
            logits, targets = self._task.outputs(model, self._task.batches("test", 0))
            right = (logits.argmax(dim=1) == targets).double().numpy()
            self._known[policy.key()] = Scored(self._evaluator.quality(model), right)
        return self._known[policy.key()]


def shots(run: Run) -> list[Trial]:
    """One-shot candidates in the order of the search; where it screened, as they were screened."""
    ok = [t for t in run.trials if t.evaluation.status == "ok" and not t.evaluation.rung]
    return [t for t in ok if t.evaluation.screened] or ok


def incumbents(trials: Sequence[Trial], limit: float, marks: Sequence[int]) -> list[Trial]:
    """The least loss within `limit` bytes after each of `marks` trials; empty if the first mark has none."""
    found = []
    for mark in marks:
        fits = [t for t in trials[:mark] if t.measured.bytes <= limit]
        if not fits:
            return []
        found.append(min(fits, key=lambda t: t.measured.loss))
    return found


def courses(run: Run, limits: int, first: int) -> list[list[Trial]]:
    """For each size that the first trials reach: the best policy after `first` trials, twice as many, and so on."""
    trials = shots(run)
    doubled = [first * 2**i for i in range(max(1, math.ceil(math.log2(max(2, len(trials) / first)))))]
    marks = [*doubled, len(trials)]
    high = run.budget.bytes or run.dense.bytes
    low = min(t.measured.bytes for t in trials[:first])
    sizes = [high * (low / high) ** (i / max(1, limits - 1)) for i in range(limits)]
    return [found for size in sizes if (found := incumbents(trials, size + 0.5, marks))]


def gain(pairs: Sequence[tuple[Right, Right]]) -> tuple[float, float]:
    """Mean accuracy of the second over the first, and the standard error over the inputs that all pairs share."""
    differences = np.mean([after - before for before, after in pairs], axis=0)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def near(run: Run, count: int) -> list[Trial]:
    """Candidates next to the budget, evenly from the least to the most loss."""
    limit = run.budget.bytes or run.dense.bytes
    found = [t for t in shots(run) if limit * (1 - NEAR) <= t.measured.bytes <= limit]
    found.sort(key=lambda t: t.measured.loss)
    count = min(count, len(found))
    return [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]


def correlation(values: Sequence[float], rights: Sequence[Right]) -> tuple[float, float]:
    """Spearman's correlation of `values` with the accuracy on `test`, and its standard error over resampled inputs."""
    table, draw = np.stack(rights), np.random.default_rng(0)
    picks = (draw.integers(table.shape[1], size=table.shape[1]) for _ in range(RESAMPLES))
    drawn = [float(spearmanr(values, table[:, pick].mean(axis=1)).statistic) for pick in picks]
    return float(spearmanr(values, table.mean(axis=1)).statistic), float(np.nanstd(drawn))


def course_figures(course: Sequence[Sequence[tuple[Trial, Scored]]]) -> dict[str, object]:
    """Gains of the policies of least loss at the end over those that came first."""
    lowered = [found for found in course if found[-1][0].measured.loss < found[0][0].measured.loss]
    figures: dict[str, object] = {"sizes": len(course), "sizes_lowered": len(lowered)}
    if not lowered:
        return figures
    pairs = [(found[0][1].right, found[-1][1].right) for found in lowered]
    each = [float((after - before).mean()) for before, after in pairs]
    mean, error = gain(pairs)
    ratio = float(np.mean([found[-1][0].measured.loss / found[0][0].measured.loss for found in lowered]))
    spread = {"least": round(min(each), 4), "most": round(max(each), 4), "risen": sum(x > 0 for x in each)}
    return figures | {
        "test_inputs": len(pairs[0][0]),
        "loss_ratio": round(ratio, 3),
        "test_gain": round(mean, 4),
        "test_gain_error": round(error, 4),
    } | spread  # fmt: skip


def near_figures(found: Sequence[tuple[Trial, Scored]]) -> dict[str, object]:
    """Rank correlations, signed so that 1 is best; none for fewer than three policies."""
    if len(found) < 3:
        return {"near": len(found)}
    rights = [scored.right for _, scored in found]
    kinds = {
        "screened_loss": [-t.measured.loss for t, _ in found],
        "val_loss": [-s.val.loss for _, s in found],
        "val_accuracy": [s.val.score for _, s in found],
    }
    figures: dict[str, object] = {"near": len(found)}
    for kind, values in kinds.items():
        rank, error = correlation(values, rights)
        figures |= {f"spearman_{kind}": round(rank, 3), f"spearman_{kind}_error": round(error, 3)}
    return figures


def show(title: str, rows: Sequence[tuple[Trial, Scored]]) -> None:
    """One table."""
    print(f"\n{title}\n\n| trial | bytes | screened loss | loss on val | accuracy on val | on test |")
    print("|---:|---:|---:|---:|---:|---:|")
    for trial, scored in rows:
        m, val = trial.measured, scored.val
        print(
            f"| {trial.number} | {m.bytes:,} | {m.loss:.4f} | {val.loss:.4f} | {val.score:.4f} "
            f"| {scored.right.mean():.4f} |",
            flush=True,
        )


def main() -> None:
    """Parse, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of searches of one task")
    parser.add_argument("--limits", type=int, default=6, help="sizes at which the course of a search is followed")
    parser.add_argument("--first", type=int, default=SEEDS, help="trials that come before the search learns")
    parser.add_argument("--policies", type=int, default=12, help="candidates next to the budget of the first run")
    parser.add_argument("--data", help="folder of the task's data, if it has moved since the run")
    parser.add_argument("--checkpoint", help="the model's checkpoint, if it has moved since the run")
    given = parser.parse_args()
    elsewhere = {name: value for name in ("data", "checkpoint") if (value := getattr(given, name)) is not None}
    runs = [Run.read(folder) for folder in given.runs]
    course, beside = [], []
    for run in runs:
        scores = Scores(run, elsewhere)
        for found in courses(run, given.limits, given.first):
            course.append([(trial, scores(trial)) for trial in found])
            distinct = list({trial.number: (trial, scored) for trial, scored in course[-1]}.values())
            show(f"{run.folder.name}, least loss within one size, as the search went on", distinct)
        if run is runs[0]:
            beside = [(trial, scores(trial)) for trial in near(run, given.policies)]
            show(f"{run.folder.name}, candidates within {NEAR:.0%} of the budget", beside)
    print(json.dumps({"runs": len(runs)} | course_figures(course) | near_figures(beside)))


if __name__ == "__main__":
    main()
