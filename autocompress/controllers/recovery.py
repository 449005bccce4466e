"""Proposes recovery training: known good recipes first, then the best of them again or a draw of a multivariate TPE.

What a training is worth is log(loss after / loss of its one-shot policy), which compares across sizes. A proposal is
for a rung (epochs) and a place on the budget axis (share of the dense bytes): what both do to the worth, as far as that
is linear in their logarithms, is taken out, and lessons from elsewhere count as worse the farther away they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler

from autocompress.lessons import Lesson
from autocompress.policy import Policy, Recovery
from autocompress.space import Ordered, Parameter, Real, Space, Value
from autocompress.trial import Evaluation

USUAL: dict[str, Value] = {
    "lr": 0.02,
    "decay": "cosine",
    "decay_rate": 0.01,
    "warmup": 0.0,
    "adjust_factor": 1.0,
    "adjust_patience": 2,
    "adjust_cooldown": 0,
    "distill_weight": 0.9,
    "temperature": 4.0,
    "hint_weight": 0.0,
    "gradient": "none",
    "scales": "fixed",
    "ema": 0.0,
    "optimizer": "muon",
    "views": 2,
}
"""A recipe that is good for most models."""
RECIPES: tuple[dict[str, Value], ...] = (
    {"distill_weight": 1.0, "optimizer": "sgd", "hint_weight": 1.0},
    {"distill_weight": 1.0, "lr": 0.01, "temperature": 16.0, "hint_weight": 1.0},
    {"optimizer": "sgd"},
    {"distill_weight": 1.0, "lr": 0.005, "temperature": 16.0},
    {"distill_weight": 1.0, "lr": 0.01, "temperature": 16.0},
    {"distill_weight": 1.0, "optimizer": "sgd"},
    {"distill_weight": 1.0, "lr": 0.01, "temperature": 16.0, "optimizer": "sgd"},
    {"distill_weight": 1.0, "lr": 0.005},
    {"distill_weight": 1.0, "lr": 0.01},
    {"distill_weight": 1.0, "lr": 0.04, "decay": "one-cycle", "warmup": 0.1, "optimizer": "sgd"},
    {"distill_weight": 1.0, "lr": 0.005, "temperature": 16.0, "optimizer": "sgd"},
    {"distill_weight": 1.0, "scales": "learned", "ema": 0.99, "optimizer": "sgd"},
    {"distill_weight": 1.0, "gradient": "centralise", "lr": 0.01, "optimizer": "sgd"},
)
"""What is tried first, each as a change of `USUAL`, as far as the space allows it.

High temperatures compare logits (Kim et al. 2021, 2105.08919), of which a network that lost little has most to learn:
from a divergence of 0.046 an epoch at 0.01 led ResNet-20 to 0.0361 at 4, 0.0332 at 8 and 0.0320 at 16. A teacher of two
views has more to say: there 4 was as good. Muon and SGD take turns: which is better differs, and hints help SGD
(`reports/LOG.md`).
"""
GENTLE = 0.027
"""Peak learning rate per root of the divergence that is to be mended: recipes near it go first.

What lost little is disturbed by the rate that mends what lost much. On ResNet-20 an epoch takes a divergence of 0.142
to 0.095, 0.093 and 0.099 at 0.02, 0.01 and 0.006, one of 0.016 to 0.018, 0.014 and 0.014 at 0.02, 0.005 and 0.002.
"""
FARTHER = 0.05
"""The same where the teacher has several views: more is to be learnt than what was lost (`reports/LOG.md`)."""
CALMER = 0.5
"""Muon's share of these rates: its steps are as long in directions that gradients hardly point in."""
SAFE = 0.5
"""After a training diverged, later ones stay below this share of its learning rate."""
AGAIN = 0.5
"""Share of proposals that take the recipe that was worth most so far, on another policy, instead of a new one."""
RIDGE = 0.1
"""In square octaves. More of it leaves a recipe that was tried on a small file the credit for what small files gain."""
FAR = 1.0
"""What an octave of epochs or bytes away from where a proposal is for costs a lesson, in standard deviations."""

NEAR = 0.5
"""Octaves of size within which another search's best recipe goes first: what mends a 2.5% file lengthens a 6% one."""


Worth = tuple[float, dict[str, Value]]
"""What a recipe was worth, lower is better, and the recipe as a point."""


def distribution(parameter: Parameter) -> BaseDistribution:
    """Ordered choices become integer indices, so that samplers see their order."""
    if isinstance(parameter, Ordered):
        return IntDistribution(0, len(parameter.values) - 1)
    if isinstance(parameter, Real):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
    return CategoricalDistribution(parameter.values)


class RecoveryProposer:
    """Learns from evaluations what trainings are worth; proposals are a function of these and of a seed."""

    def __init__(self, space: Space, earlier: Iterable[Lesson] = ()) -> None:
        """`earlier` is what earlier searches of the same model and data have learned."""
        self._space, self.earlier = space, list(earlier)
        self.lessons: list[Lesson] = []
        self._tried: list[Recovery] = []
        self._losses: dict[str, float] = {}
        self._ceiling = math.inf

    def learn(self, evaluation: Evaluation) -> None:
        """Remember a one-shot policy's loss, a training's worth, or a learning rate that diverged."""
        recovery, measured = evaluation.policy.recovery, evaluation.measurement
        if recovery.epochs:
            self._tried.append(recovery)
        if evaluation.status == "failed" and recovery.epochs and "FloatingPointError" in evaluation.error:
            self._ceiling = min(self._ceiling, SAFE * recovery.lr)
        if evaluation.status != "ok" or measured is None:
            return
        key = evaluation.policy.without_recovery().key()
        loss = measured.loss if math.isnan(measured.teacher_loss) else measured.teacher_loss
        if not recovery.epochs:
            self._losses[key] = loss
        elif loss > 0 and self._losses.get(key, 0.0) > 0:
            share = measured.bytes / self._space.graph.dense_bytes
            self.lessons.append(Lesson(recovery, share, math.log(loss / self._losses[key])))

    def expect(self, policy: Policy) -> None:
        """An earlier process proposed this, and it is still to be learned."""
        if policy.recovery.epochs:
            self._tried.append(policy.recovery)

    def propose(self, parent: Policy, epochs: int, share: float, seed: int) -> Policy:
        """`parent` with `epochs` of recovery training; its file takes about `share` of the dense bytes."""
        choices = self._distributions()
        worth = self._worth(choices, epochs, share)
        damage = self._losses.get(parent.without_recovery().key(), 0.0)
        new = (
            r for r in self._recipes(choices, damage) if not any(_taken(r, choices, known) for known in self._known())
        )
        # what earlier searches found for about such a size goes before new recipes
        first = not self._tried and any(abs(math.log2(x.share / share)) <= NEAR for x in self.earlier)
        point = _best(worth) if first and worth else None
        point = point or next(new, None) or self._learned(choices, worth, seed)
        policy = self._space.with_recovery(parent, point, epochs)
        self._tried.append(policy.recovery)  # another worker may ask before this one is told
        return policy

    def _known(self) -> list[Recovery]:
        return [*self._tried, *(lesson.recovery for lesson in self.earlier)]

    def _distributions(self) -> dict[Parameter, BaseDistribution]:
        """What is open, with the learning rate below the ceiling as far as the space reaches."""
        found: dict[Parameter, BaseDistribution] = {}
        for p in self._space.recovery_parameters:
            if p.name == "recovery/lr" and isinstance(p, Real):
                p = replace(p, high=max(p.low, min(p.high, self._ceiling)))
            found[p] = distribution(p)
        return found

    def _recipes(self, choices: Mapping[Parameter, BaseDistribution], damage: float) -> list[dict[str, Value]]:
        """The known recipes within the space, without repeats; where `damage` is known, nearest to its rate first."""
        found: list[dict[str, Value]] = []
        for changes in RECIPES:
            wanted = USUAL | changes
            recipe = {p.name: _nearest(p, wanted.get(p.name.removeprefix("recovery/"))) for p in choices}
            if recipe not in found:
                found.append(recipe)
        if damage > 0:
            rate = (FARTHER if max(self._space.views) > 1 else GENTLE) * math.sqrt(damage)
            found.sort(key=lambda recipe: self._distance(recipe, rate))
        return found

    def _distance(self, recipe: Mapping[str, Value], rate: float) -> float:
        """Octaves between a recipe's learning rate and `rate`, which is SGD's; equally far ones stay in order."""
        optimizer = recipe.get("recovery/optimizer", self._space.optimizers[0])
        own = rate * (CALMER if optimizer == "muon" else 1.0)
        return round(abs(math.log2(float(recipe.get("recovery/lr", own)) / own)), 6)

    def _worth(self, choices: Mapping[Parameter, BaseDistribution], epochs: int, share: float) -> list[Worth]:
        """All lessons within what is open, and what they were worth for such a place."""
        lessons = [*self.earlier, *self.lessons]
        points = [_point(lesson.recovery, choices) for lesson in lessons]
        fit = [(lesson, point) for lesson, point in zip(lessons, points, strict=True) if point is not None]
        worths = _worths([lesson for lesson, _ in fit], epochs, share)
        return [(worth, point) for worth, (_, point) in zip(worths, fit, strict=True)]

    def _learned(
        self, choices: Mapping[Parameter, BaseDistribution], worth: Sequence[Worth], seed: int
    ) -> dict[str, Value]:
        """The recipe that was worth most for such a place, or a draw of the TPE; of its prior without lessons."""
        if worth and Random(seed).random() < AGAIN:
            return _best(worth)
        return _sampled(worth, {p.name: choice for p, choice in choices.items()}, seed)


def _best(worth: Sequence[Worth]) -> dict[str, Value]:
    return min(worth, key=lambda known: known[0])[1]


def _sampled(known: Sequence[Worth], choices: dict[str, BaseDistribution], seed: int) -> dict[str, Value]:
    """A draw of a multivariate TPE that knows what points were worth."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = TPESampler(seed=seed, multivariate=True, n_startup_trials=1)
    study = optuna.create_study(sampler=sampler)
    for worth, point in known:
        study.add_trial(optuna.trial.create_trial(params=point, distributions=choices, value=worth))
    return dict(study.ask(choices).params)


def _worths(lessons: Sequence[Lesson], epochs: int, share: float) -> list[float]:
    """Per lesson what it says of a training of `epochs` at `share`, lower is better.

    The gain less its ridge regression on the logarithms of epochs and share, plus a price for being elsewhere.
    """
    if not lessons:
        return []
    places = np.log2([[lesson.recovery.epochs, lesson.share] for lesson in lessons])
    gains = np.array([lesson.gain for lesson in lessons])
    x, y = places - places.mean(axis=0), gains - gains.mean()
    slope = np.linalg.solve(x.T @ x + RIDGE * np.eye(2), x.T @ y)
    rest = y - x @ slope
    away = np.abs(places - np.log2([epochs, share])).sum(axis=1)
    return [float(v) for v in rest + FAR * max(float(rest.std()), 1e-3) * away]


def _nearest(p: Parameter, wanted: Any) -> Value:
    """The parameter's value that is nearest to `wanted`; its first if that has none near."""
    if isinstance(p, Real):
        return min(p.high, max(p.low, float(wanted))) if wanted is not None else p.low
    if isinstance(p, Ordered):
        return min(range(len(p.values)), key=lambda i: abs(p.values[i] - (wanted or 0)))
    return wanted if wanted in p.values else p.values[0]


def _point(recovery: Recovery, choices: Mapping[Parameter, BaseDistribution]) -> dict[str, Value] | None:
    """The values of a recipe; None if it lies outside of what is open."""
    found: dict[str, Value] = {}
    for p in choices:
        value = getattr(recovery, p.name.removeprefix("recovery/"))
        if isinstance(p, Real):
            if not p.low <= value <= p.high:
                return None
        elif value not in p.values:
            return None
        found[p.name] = p.values.index(value) if isinstance(p, Ordered) else value
    return found


def _taken(recipe: Mapping[str, Value], choices: Mapping[Parameter, BaseDistribution], known: Recovery) -> bool:
    point = _point(known, choices)
    return point is not None and all(
        math.isclose(value, float(point[name]), rel_tol=1e-9) if isinstance(value, float) else value == point[name]
        for name, value in recipe.items()
    )
