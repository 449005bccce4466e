"""A run's trials and front as pandas tables and plain rows. Reads the journal; measures nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from autocompress.ablation import read_ablation, summarise
from autocompress.baselines import RANDOM, Baseline, read_baselines
from autocompress.errors import AutocompressError
from autocompress.front import Trial, Wish, feasible, front_of, nearest, pick, standard_error
from autocompress.journal import Journal
from autocompress.policy import Recovery
from autocompress.profile import Profile
from autocompress.study import Settings, read_config
from autocompress.trial import Budget, Measurement

COLUMNS = {
    "trial": "int64",
    "rung": "int64",
    "quality_val": "float64",
    "quality_test": "float64",
    "bytes": "int64",
    "latency_ms": "float64",
    "predicted_ms": "float64",
    "macs": "int64",
    "loss": "float64",
    "feasible": "bool",
    "screened": "bool",
    "epochs": "int64",
    "parent": "Int64",
    "quality_before": "float64",
    "bytes_before": "Int64",
    "recipe": "str",
    "policy": "str",
    "artifact": "str",
    "seconds": "float64",
    "at": "float64",
    "metric": "str",
}
"""Columns of `front.csv` and `trials.csv`, and keys of the rows that `--json` prints; `docs/numbers.md` describes each.

`quality_before` and `bytes_before` are what the one-shot policy had that a recovery training began with (`parent`).
"""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell must not begin with, or spreadsheets run it."""


@dataclass(frozen=True)
class Run:
    """Everything a run folder says, read once."""

    folder: Path
    task: str
    settings: Settings
    config: dict[str, Any]
    budget: Budget
    dense: Measurement
    trials: Sequence[Trial]
    metric: str
    direction: str
    layers: Sequence[dict[str, Any]]
    seconds: float
    peak_memory_mib: int | None
    warnings: Sequence[str]
    profile: dict[str, Any] | None = None
    latency_table: dict[str, Any] | None = None
    lessons: int = 0
    ablations: Sequence[dict[str, Any]] = ()
    levels: Profile | None = None
    details: dict[str, Any] | None = None
    baselines: Sequence[Baseline] = ()
    dates: tuple[str, str] | None = None
    random: Run | None = None
    counted: Mapping[str, int] = field(default_factory=dict)
    """Inputs of `val` and `test`, if the metric is the share of them that is right."""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """A finished, running or interrupted run. Raises `RunError`."""
        settings, _, config = read_config(folder)
        with Journal.reading(folder) as journal:
            facts = {name: journal.fact(name, make) for name, make in _FACTS.items()}
            missing = [name for name, value in facts.items() if value is None]
            if missing:
                raise AutocompressError(
                    f"{folder} ended before its first trial; continue it with `autocompress search --resume {folder}`"
                )
            return cls(
                folder,
                facts["identity"]["task"],
                settings,
                config,
                facts["budget"],
                facts["dense"],
                journal.trials(),
                facts["identity"]["metric"],
                facts["identity"]["direction"],
                facts["layers"],
                journal.fact("seconds", float) or 0.0,
                journal.fact("peak_memory_mib", int),
                journal.fact("warnings", _texts) or (),
                _profile(journal),
                _latency_table(journal),
                len(journal.fact("lessons", list) or ()),
                _ablations(folder),
                _levels(journal),
                journal.fact("details", _detail_rows),
                read_baselines(folder),
                journal.dates(),
                _random(folder),
                journal.fact("counted", _counts) or {},
            )

    @cached_property
    def front(self) -> list[Trial]:
        """Feasible non-dominated trials, smallest first; of all trials if none is feasible."""
        fits = feasible(self.trials, self.budget) or self.trials
        return front_of(fits, self.direction, latency=self.budget.ms is not None)

    @cached_property
    def picked(self) -> Trial | None:
        """Best quality within the budget."""
        return pick(self.trials, self.direction, Wish(), self.budget) if feasible(self.trials, self.budget) else None

    @property
    def nearest(self) -> Trial | None:
        """The trial that misses the budget by least."""
        return nearest(self.trials, self.budget)

    @cached_property
    def parents(self) -> dict[str, Trial]:
        """One-shot trials by the key of their policy, those that were scored on all of `val` where there are."""
        shots = [
            t for t in self.trials if t.evaluation.status == "ok" and not t.evaluation.rung
            and t.evaluation.copy_of is None
        ]  # fmt: skip
        return {t.evaluation.policy.key(): t for t in sorted(shots, key=lambda t: not t.evaluation.screened)}

    def parent(self, trial: Trial) -> Trial | None:
        """The one-shot trial that a recovery training began with; None for one without."""
        policy = trial.evaluation.policy
        return self.parents.get(policy.without_recovery().key()) if policy.recovery.epochs else None

    def row(self, trial: Trial) -> dict[str, Any]:
        """`row` of a trial of this run."""
        return row(trial, self.budget, self.parents, self.metric)

    def error(self, quality: float, split: str = "val") -> float:
        """The standard error of a metric that is a share of right answers; NaN if that is unknown."""
        return standard_error(quality, self.counted.get(split))

    @property
    def evaluations(self) -> int:
        """Trials that were really measured."""
        return sum(t.evaluation.status != "infeasible" and t.evaluation.copy_of is None for t in self.trials)


def _texts(values: Any) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{str(values)[:80]} holds something else than texts")
    return list(values)


def _identity(data: Any) -> dict[str, str]:
    names = ("task", "metric", "direction")
    found = dict(zip(names, _texts([data[name] for name in names]), strict=True))
    if found["direction"] not in ("min", "max"):
        raise ValueError(f"the direction is {found['direction']!r}")
    return found


def _layer_rows(data: Any) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(("name", "kind"), _texts([row["name"], row["kind"]]), strict=True)),
            "shape": [int(size) for size in row["shape"]],
            "bytes": int(row["bytes"]),
            "groups": _texts(row.get("groups", ())),
        }
        for row in data
    ]


def _detail_rows(data: Any) -> dict[str, Any]:
    trials = {str(number): _numbers(found) for number, found in data.get("trials", {}).items()}
    return {"dense": _numbers(data.get("dense", {})), "trials": trials}


def _counts(data: Any) -> dict[str, int]:
    return {str(split): int(count) for split, count in data.items() if count is not None}


def _numbers(data: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in data.items()}


_FACTS: dict[str, Callable[[Any], Any]] = {
    "dense": Measurement.from_json,
    "budget": Budget.from_json,
    "identity": _identity,
    "layers": _layer_rows,
}
"""What every run says of itself before its first trial, and what makes it."""


def row(trial: Trial, budget: Budget, parents: Mapping[str, Trial], metric: str = "") -> dict[str, Any]:
    """One `ok` trial under the names of `COLUMNS`; `parents` are one-shot trials by the key of their policy."""
    measured, evaluation = trial.measured, trial.evaluation
    recovery = evaluation.policy.recovery
    parent = parents.get(evaluation.policy.without_recovery().key()) if recovery.epochs else None
    return {
        "trial": trial.number,
        "rung": evaluation.rung,
        "quality_val": measured.quality,
        "quality_test": trial.quality_test,
        "bytes": measured.bytes,
        "latency_ms": measured.latency_ms,
        "predicted_ms": measured.predicted_ms,
        "macs": measured.macs,
        "loss": measured.loss,
        "feasible": budget.excess(measured) <= 0,
        "screened": evaluation.screened,
        "epochs": recovery.epochs,
        "parent": parent.number if parent else None,
        "quality_before": parent.measured.quality if parent else math.nan,
        "bytes_before": parent.measured.bytes if parent else None,
        "recipe": recipe_text(recovery) if recovery.epochs else "",
        "policy": evaluation.policy.key(),
        "artifact": trial.artifact,
        "seconds": evaluation.seconds,
        "at": trial.at,
        "metric": metric,
    }


def recipe_text(recovery: Recovery) -> str:
    """How a model was trained, in a line; what was not used is left out."""
    r = recovery
    parts = [
        f"rate {r.lr:.3g}, {r.decay}" + (f" to {r.decay_rate:.2g} of it" if r.decay != "constant" else ""),
        f"{r.warmup:.0%} warm-up" if r.warmup else "",
        f"x{r.adjust_factor:g} on a plateau" if r.adjust_factor < 1 else "",
        f"distillation {r.distill_weight:.2f} at temperature {r.temperature:.2g}" if r.distill_weight else "",
        f"the teacher's mean over {r.views} views" if r.views > 1 and r.distill_weight else "",
        f"hints {r.hint_weight:.2g}" if r.hint_weight else "",
        f"gradients: {r.gradient}" if r.gradient != "none" else "",
        {"adam": "AdamW", "muon": "Muon"}.get(r.optimizer, ""),
        "learned scales" if r.scales == "learned" else "",
        f"mean of weights {r.ema:g}" if r.ema else "",
        "" if r.reestimate_bn else "trained statistics",
    ]
    return "; ".join(part for part in parts if part)


def table(trials: Sequence[Trial], budget: Budget, parents: Mapping[str, Trial], metric: str = "") -> pd.DataFrame:
    """Measured trials with typed columns; copies of others are left out."""
    measured = (t for t in trials if t.evaluation.status == "ok" and t.evaluation.copy_of is None)
    rows = [row(trial, budget, parents, metric) for trial in measured]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """The table as CSV in which no text is a formula: what would be one is preceded by an apostrophe."""
    text = [name for name, kind in COLUMNS.items() if kind == "str"]
    safe = frame.assign(**{name: [_text_cell(value) for value in frame[name]] for name in text})
    return safe.to_csv(index=False, lineterminator="\n").encode()


def _text_cell(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA) else value


def plain(value: Any) -> Any:
    """NaN as None, so that JSON stays JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(run: Run) -> dict[str, Any]:
    """The object that `search --json` and `report --json` print."""
    picked = run.picked
    return dict(
        plain(
            {
                "run": str(run.folder),
                "evaluations": run.evaluations,
                "failed": sum(t.evaluation.status == "failed" for t in run.trials),
                "seconds": round(run.seconds, 3),
                "peak_memory_mib": run.peak_memory_mib,
                "profile": run.profile,
                "latency_table": run.latency_table,
                "lessons": run.lessons,
                "budget": {"bytes": run.budget.bytes, "latency_ms": run.budget.ms, "macs": run.budget.macs},
                "dense": {
                    "quality_val": run.dense.quality,
                    "bytes": run.dense.bytes,
                    "latency_ms": run.dense.latency_ms,
                    "macs": run.dense.macs,
                },
                "front": [run.row(trial) for trial in run.front],
                "picked": run.row(picked) if picked else None,
                "standard_error": run.error(picked.measured.quality) if picked else None,
                "nearest": run.row(run.nearest) if picked is None and run.nearest else None,
                "warnings": list(run.warnings),
            }
        )
    )


def _profile(journal: Journal) -> dict[str, Any] | None:
    """What the solver's profile took, and whether an earlier search had measured it; None for other controllers."""
    profile = _levels(journal)
    if profile is None:
        return None
    return {
        "evaluations": profile.evaluations,
        "seconds": round(profile.seconds, 3),
        "reused": bool(journal.fact("profile_reused")),
    }


def _levels(journal: Journal) -> Profile | None:
    """The profile that the solver began with."""
    found: Profile | None = journal.fact("profile", Profile.from_json)
    return found


def _random(folder: Path) -> Run | None:
    """The random search that `report --baselines` ran beside this run; None if there is none to show."""
    try:
        return Run.read(folder / RANDOM) if (folder / RANDOM).is_dir() else None
    except AutocompressError:
        return None


def _latency_table(journal: Journal) -> dict[str, Any] | None:
    """Where the run's table of layer times is from, what it took, and how far its predictions are off."""
    table: dict[str, Any] | None = journal.fact("latency_table", _table_facts)
    if table is None:
        return None
    pairs = [
        (t.measured.predicted_ms, t.measured.latency_ms)
        for t in journal.trials()
        if t.evaluation.status == "ok" and t.measured.predicted_ms > 0 and t.measured.latency_ms > 0
    ]
    return {
        **table,
        "error_on_trials": round(median(abs(told / ms - 1) for told, ms in pairs), 4) if pairs else None,
    }


def _table_facts(data: Any) -> dict[str, Any]:
    return {
        "device": str(data["deployment"]["device"]),
        "runs": int(data["runs"]),
        "seconds": round(float(data["seconds"]), 3),
        "error": round(float(data["error"]), 4),
    }


def _ablations(folder: Path) -> list[dict[str, Any]]:
    """What `autocompress ablate` found, by trial; what cannot be read is left out."""
    found = [read_ablation(path) for path in folder.glob("ablation-trial-*.json")]
    return sorted((summarise(a) for a in found if a is not None), key=lambda a: int(a["trial"]))


def markdown(text: str) -> str:
    """A text as it is, inside Markdown: on one line, and with nothing that marks up."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", line)


def size_text(count: float) -> str:
    """Bytes as people say them, powers of ten: `1.23 MB`."""
    for unit, scale in (("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"
