"""What a run is compared with: uniform policies, and a random search of as many evaluations, measured as its trials.

Uniform policies are solved as the search's own are, so that what is compared is the choice and not the solver.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autocompress.files import write
from autocompress.policy import Policy
from autocompress.space import Space
from autocompress.trial import Evaluation, Measurement

FILE = "baselines.json"
RANDOM = "random-search"
"""Folder, in that of a run, of the random search that stands beside it."""
BITS, ZEROS = (8, 4, 2), (0.5, 0.85)


class Evaluates(Protocol):
    """`evaluate.Evaluator` is one."""

    def __call__(self, policy: Policy, rung: int = 0) -> Evaluation:
        """Measure a policy on all of `val`."""
        ...


@dataclass(frozen=True, slots=True)
class Baseline:
    """A uniform policy, as people call it, and what it measured."""

    name: str
    measurement: Measurement


def uniform(space: Space) -> list[tuple[str, Policy]]:
    """The same bits, or the same share of zeros, in every layer: what the space allows of `BITS` and `ZEROS`."""
    wide = max((max(allowed) for allowed in space.bits.values()), default=32)
    found: dict[str, tuple[str, Policy]] = {}
    for bits, zeros in [*((b, 0.0) for b in BITS), *((wide, z) for z in ZEROS)]:
        policy = space.uniform(bits=bits, sparsity=zeros)
        kinds = {(choice.bits, choice.sparsity) for choice in policy.layers.values()}
        if len(kinds) != 1:  # a layer has its own rules: then it is only nearly uniform
            common = max(kinds, key=lambda kind: sum((c.bits, c.sparsity) == kind for c in policy.layers.values()))
        else:
            (common,) = kinds
        name = f"uniform {common[0]} bit{'s' * (common[0] != 1)}"
        found.setdefault(policy.key(), (name + (f", {common[1]:.0%} zeros" if common[1] else ""), policy))
    return list(found.values())


def measure_baselines(
    evaluate: Evaluates,
    space: Space,
    folder: Path,
    watch: Callable[[int, int, str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write `baselines.json`; those that fail are left out, and nothing is written if it is `stopped` before the end.

    `watch` hears (done, in all, name).
    """
    policies = uniform(space)
    found: list[Baseline] = []
    for done, (name, policy) in enumerate(policies):
        if stopped():
            return
        watch(done, len(policies), name)
        evaluation = evaluate(policy)
        if evaluation.status == "ok" and evaluation.measurement is not None:
            found.append(Baseline(name, evaluation.measurement))
    write_baselines(folder, found)


def write_baselines(folder: Path, found: Sequence[Baseline]) -> None:
    """As `read_baselines` reads them."""
    rows = [{"name": b.name} | b.measurement.to_json() for b in found]
    write(folder / FILE, (json.dumps(rows, indent=1) + "\n").encode())


def read_baselines(folder: Path) -> list[Baseline]:
    """What was measured beside the run in `folder`; nothing if it cannot be read, since it can be measured again."""
    try:
        rows = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return [_baseline(row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return []


def _baseline(row: dict[str, Any]) -> Baseline:
    measured = Measurement.from_json({name: value for name, value in row.items() if name != "name"})
    return Baseline(str(row["name"]), measured)
