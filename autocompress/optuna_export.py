"""A run as an Optuna study on disk, for optuna-dashboard and Optuna's own plots. A copy: nothing reads it back."""

from __future__ import annotations

import importlib
import logging
import threading
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from autocompress.errors import AutocompressError
from autocompress.front import Trial
from autocompress.policy import Policy
from autocompress.report.tables import Run

STORAGE = "optuna-journal.log"
Value = int | float | str | bool


def export_study(run: Run, path: Path) -> int:
    """Write every finished trial to a new storage at `path`; how many there are. Objectives are quality, bytes and ms.

    Parameters are named after layers and channel groups, bits and shares as ordered numbers; the constraint `budget`
    is the share by which a trial passes the budget.
    """
    for old in (path, path.with_name(path.name + ".lock")):
        old.unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = [parameters(run, trial.evaluation.policy) for trial in run.trials]
    known = _distributions(points)
    directions: list[Any] = ["maximize" if run.direction == "max" else "minimize", "minimize", "minimize"]
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=run.folder.resolve().name, directions=directions)
    for key, value in (("task", run.task), ("metric", run.metric), ("budget", str(run.budget))):
        study.set_user_attr(key, value)
    for trial, values in zip(run.trials, points, strict=True):
        study.add_trial(_frozen(run, trial, values, known))
    return len(points)


def parameters(run: Run, policy: Policy) -> dict[str, Value]:
    """A policy as flat, named values; a recipe only where there is recovery training."""
    found: dict[str, Value] = {}
    for layer in run.layers:
        choice = policy.choice(layer["name"])
        found |= {f"bits/{layer['name']}": choice.bits, f"zeros/{layer['name']}": choice.sparsity}
    found |= {f"channels/{group}": ratio for group, ratio in policy.keep.items()}
    found["criterion"] = policy.criterion
    if policy.recovery.epochs:
        found |= {f"recovery/{name}": value for name, value in policy.recovery.to_json().items()}
    return found


def _distributions(points: list[dict[str, Value]]) -> dict[str, BaseDistribution]:
    """For each parameter, what holds all of its values: text as a choice, numbers as a range."""
    values: dict[str, list[Value]] = {}
    for point in points:
        for name, value in point.items():
            values.setdefault(name, []).append(value)
    return {name: _distribution(known) for name, known in values.items()}


def _distribution(values: list[Value]) -> BaseDistribution:
    if any(isinstance(v, str | bool) for v in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    numbers = [v for v in values if not isinstance(v, str)]
    if all(isinstance(v, int) for v in numbers):
        return IntDistribution(int(min(numbers)), int(max(numbers)))
    return FloatDistribution(float(min(numbers)), float(max(numbers)))


def _frozen(run: Run, trial: Trial, values: Mapping[str, Value], known: Mapping[str, BaseDistribution]) -> FrozenTrial:
    evaluation, attributes = trial.evaluation, {"trial": trial.number, "rung": trial.evaluation.rung}
    measured = evaluation.measurement if evaluation.status == "ok" else None
    more: dict[str, Any] = {"status": evaluation.status, "screened": evaluation.screened}
    if evaluation.error:
        more["error"] = evaluation.error.strip().splitlines()[-1]
    scored = None if measured is None else [measured.quality, float(measured.bytes), measured.latency_ms]
    return optuna.trial.create_trial(
        state=TrialState.FAIL if scored is None else TrialState.COMPLETE,
        values=scored,
        params=dict(values),
        distributions={name: known[name] for name in values},
        user_attrs=attributes | more,
        constraints=None if measured is None else {"budget": run.budget.excess(measured)},
    )


def serve(path: Path, port: int, *, browser: bool, say: Callable[[str], None]) -> None:
    """Run optuna-dashboard on the storage until Ctrl-C. Raises `AutocompressError` where it is not installed."""
    try:
        served = importlib.import_module("optuna_dashboard")
    except ImportError:
        raise AutocompressError(
            "the dashboard needs optuna-dashboard: pip install 'autocompress[dashboard]' "
            f"(the study is in {path}; --export-only asks for no more)"
        ) from None
    address = f"http://127.0.0.1:{port}"
    say(f"optuna-dashboard: {address} (Ctrl-C ends it)")
    if browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    try:
        served.run_server(JournalStorage(JournalFileBackend(str(path))), host="127.0.0.1", port=port)
    except KeyboardInterrupt:
        say("ended")
    except OSError as error:
        raise AutocompressError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
