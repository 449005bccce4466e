"""What each ingredient of a recovery training is worth: a policy is trained again with one of them off at a time.

Every training is written to a file of the run folder before the next begins, so an ablation that was interrupted goes
on. Reads `val` only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from autocompress.errors import AutocompressError
from autocompress.files import write
from autocompress.front import Trial
from autocompress.journal import Journal
from autocompress.policy import Policy, Recovery
from autocompress.study import Progress, Watch, measuring, read_config
from autocompress.trial import Evaluation

FULL = "full recipe"
OFF: tuple[tuple[str, Callable[[Recovery], bool], Callable[[Recovery], Recovery]], ...] = (
    ("no distillation", lambda r: True, lambda r: replace(r, distill_weight=0.0)),  # noqa: ARG005
    ("constant rate", lambda r: True, lambda r: replace(r, decay="constant")),  # noqa: ARG005
    ("one view for the teacher", lambda r: r.views > 1, lambda r: replace(r, views=1)),
    ("no hints", lambda r: r.hint_weight > 0, lambda r: replace(r, hint_weight=0.0)),
    ("no warm-up", lambda r: r.warmup > 0, lambda r: replace(r, warmup=0.0)),
    ("no plateau adjustment", lambda r: r.adjust_factor < 1, lambda r: replace(r, adjust_factor=1.0)),
    ("plain gradients", lambda r: r.gradient != "none", lambda r: replace(r, gradient="none")),
    ("SGD in place of Muon", lambda r: r.optimizer == "muon", lambda r: replace(r, optimizer="sgd")),
    ("fixed scales", lambda r: r.scales != "fixed", lambda r: replace(r, scales="fixed")),
    ("last weights, not their mean", lambda r: r.ema > 0, lambda r: replace(r, ema=0.0)),
    ("trained batch-norm statistics", lambda r: r.reestimate_bn, lambda r: replace(r, reestimate_bn=False)),
)
"""What is left out, whether a recipe has it (the first two are always asked), and the recipe without it."""

Train = Callable[[Policy, int, Callable[[int, int], None]], Evaluation]
"""Trains and measures a policy with a seed, and is told of each step."""


def variants(policy: Policy) -> dict[str, Policy]:
    """The policy with its whole recipe, and with each of its ingredients off, by name."""
    found = {FULL: policy}
    for name, has, without in OFF:
        if has(policy.recovery):
            found[name] = replace(policy, recovery=without(policy.recovery))
    return found


def ablate(
    folder: Path,
    number: int,
    *,
    seeds: int = 3,
    epochs: int | None = None,
    out: Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train trial `number` of the run in `folder` with one ingredient off at a time, with `seeds` seeds each.

    `epochs` stands for those of the trial. Writes `ablation-trial-N.json` and a Markdown table, there or at `out`.
    Returns `summarise` of it. Raises `AutocompressError` for a trial that has no recipe, `RunError` for the folder.
    """
    if seeds < 1:
        raise AutocompressError(f"--seeds is {seeds}; it must be 1 or more")
    settings, _, _ = read_config(folder)
    with Journal.reading(folder) as journal:
        trials, identity = journal.trials(), journal.fact("identity")
    policy = _recipe(trials, number, epochs)
    path = folder / f"ablation-trial-{number}.json"
    asked = {
        "trial": number,
        "task": identity["task"],
        "metric": identity["metric"],
        "direction": identity["direction"],
        "dense_quality": identity["dense_quality"],
        "quality_before": _before(trials, policy),
        "epochs": policy.recovery.epochs,
        "seeds": [settings.seed + i for i in range(seeds)],
        "variants": {name: variant.key() for name, variant in variants(policy).items()},
    }
    known = read_ablation(path)
    data = asked | {"results": known["results"] if known is not None else []}
    evaluator = measuring(settings, folder)

    def train(variant: Policy, seed: int, progress: Callable[[int, int], None]) -> Evaluation:
        return evaluator(variant, 0, None, progress, seed=seed)

    fill(data, variants(policy), train, path, watch or (lambda _: None))
    found = summarise(data)
    write(out or path.with_suffix(".md"), markdown(found).encode())
    return found


def _recipe(trials: Sequence[Trial], number: int, epochs: int | None) -> Policy:
    """The policy of the trial, which must have been trained."""
    trained = [t for t in trials if t.evaluation.policy.recovery.epochs and t.evaluation.status == "ok"]
    found = next((t.evaluation.policy for t in trained if t.number == number), None)
    if found is None:
        names = ", ".join(str(t.number) for t in trained) or "none here; search with --epochs 1 or more"
        raise AutocompressError(f"trial {number} has no recovery training to take apart; those that have: {names}")
    if epochs is None:
        return found
    if epochs < 1:
        raise AutocompressError(f"--epochs is {epochs}; it must be 1 or more")
    return replace(found, recovery=replace(found.recovery, epochs=epochs))


def _before(trials: Sequence[Trial], policy: Policy) -> float | None:
    """The quality that the policy had without training."""
    key = policy.without_recovery().key()
    shots = [t for t in trials if t.evaluation.policy.key() == key and t.evaluation.status == "ok"]
    return min(shots, key=lambda t: t.evaluation.screened).measured.quality if shots else None


@dataclass
class _Clock:
    """Tells the watcher how far an ablation is."""

    watch: Watch
    total: int
    done: int = 0
    start: float = 0.0
    trained: int = 0

    def tell(self, detail: str, share: float = 0.0) -> None:
        """`share` of the training in flight is done."""
        seconds, made = time.monotonic() - self.start, self.trained + share
        left = seconds / made * (self.total - self.done - share) if made else None
        self.watch(Progress("ablating", self.done, self.total, self.done, 0, None, seconds, left, detail))


def fill(data: dict[str, Any], wanted: Mapping[str, Policy], train: Train, path: Path, watch: Watch) -> None:
    """Make the trainings that `data["results"]` lacks, seed after seed, and write `data` to `path` after each."""
    done = {(r["key"], r["seed"]) for r in data["results"]}
    jobs: dict[tuple[str, int], tuple[str, Policy]] = {}
    for seed in data["seeds"]:
        for name, policy in wanted.items():
            jobs.setdefault((policy.key(), seed), (name, policy))
    waiting = [(key[1], *job) for key, job in jobs.items() if key not in done]
    clock = _Clock(watch, len(jobs), len(jobs) - len(waiting), time.monotonic())
    for seed, name, policy in waiting:
        detail = f"{name}, seed {seed}"
        clock.tell(detail)
        evaluation = train(policy, seed, lambda step, total, detail=detail: clock.tell(detail, step / total))  # type: ignore[misc]
        data["results"].append(_result(policy, seed, evaluation))
        write(path, (json.dumps(data, indent=1) + "\n").encode())
        clock.done, clock.trained = clock.done + 1, clock.trained + 1
    clock.tell("")


def _result(policy: Policy, seed: int, evaluation: Evaluation) -> dict[str, Any]:
    measured = evaluation.measurement
    ok = evaluation.status == "ok" and measured is not None
    return {
        "key": policy.key(),
        "seed": seed,
        "quality": measured.quality if ok and measured else None,
        "loss": measured.loss if ok and measured else None,
        "bytes": measured.bytes if ok and measured else None,
        "seconds": evaluation.seconds,
        "error": evaluation.error.strip().splitlines()[-1] if evaluation.error else "",
    }


# --- what was found -------------------------------------------------------------------------------------


def read_ablation(path: Path) -> dict[str, Any] | None:
    """What `ablate` wrote; None if there is nothing, or nothing that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if _whole(data) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _whole(data: Any) -> bool:
    """Whether `summarise` can work on it."""
    numbers = all(
        isinstance(r["key"], str) and isinstance(r["seed"], int) and (r["quality"] is None or _is_finite(r["quality"]))
        for r in data["results"]
    )
    texts = all(isinstance(data[name], str) for name in ("task", "metric", "direction"))
    whole = all(isinstance(data[name], int) for name in ("trial", "epochs"))
    named = all(isinstance(key, str) for key in (*data["variants"].keys(), *data["variants"].values()))
    before = (data["quality_before"] is None or _is_finite(data["quality_before"])) and _is_finite(
        data["dense_quality"]
    )
    seeds = isinstance(data["seeds"], list) and all(isinstance(seed, int) for seed in data["seeds"])
    return numbers and texts and whole and named and before and seeds


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and abs(value) < 1e100  # whose squares are finite too


def summarise(data: Mapping[str, Any]) -> dict[str, Any]:
    """Per variant the mean and standard deviation (over seeds) of the quality on val, and the same of the difference to
    the full recipe with the same seed; None where there are too few."""
    qualities: dict[str, dict[int, float]] = {}
    for r in data["results"]:
        if r["quality"] is not None and r["seed"] in data["seeds"]:
            qualities.setdefault(r["key"], {})[r["seed"]] = float(r["quality"])
    full = qualities.get(data["variants"].get(FULL, ""), {})
    rows = []
    for name, key in data["variants"].items():
        found = qualities.get(key, {})
        gaps = [found[s] - full[s] for s in found if s in full] if name != FULL else []
        tried = sum(r["key"] == key and r["seed"] in data["seeds"] for r in data["results"])
        rows.append(
            {
                "variant": name,
                "n": len(found),
                "failed": tried - len(found),
                "mean": fmean(found.values()) if found else None,
                "std": stdev(found.values()) if len(found) > 1 else None,
                "difference": fmean(gaps) if gaps else None,
                "difference_std": stdev(gaps) if len(gaps) > 1 else None,
            }
        )
    names = ("trial", "task", "metric", "direction", "dense_quality", "quality_before", "epochs", "seeds")
    return {name: data[name] for name in names} | {"rows": rows}


def markdown(found: Mapping[str, Any]) -> str:
    """The table of `summarise`, with n and spread."""
    before = _text(found["quality_before"])
    lines = [
        f"# Ablation of trial {found['trial']}",
        "",
        f"{found['metric']} on val of the same policy, trained for {found['epochs']} epoch(s) with seeds "
        f"{', '.join(map(str, found['seeds']))}, one ingredient off at a time; mean and standard deviation over seeds. "
        f"Without training {before}, original {_text(found['dense_quality'])}.",
        "",
        f"| variant | n | failed | {found['metric']} | std | against full | std |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *_lines(found["rows"])]) + "\n"


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for r in rows:
        numbers = (r["mean"], r["std"], r["difference"], r["difference_std"])
        mean, std, gap, gap_std = (_text(x) for x in numbers)
        sign = "+" if r["difference"] is not None and r["difference"] >= 0 else ""
        yield f"| {r['variant']} | {r['n']} | {r['failed']} | {mean} | {std} | {sign}{gap} | {gap_std} |"


def _text(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"
