"""Controllers on one Optuna study: multivariate TPE, NSGA-II and random search.

Every trial is asked and told through the study, its parameters named per layer, so Optuna's importances and plots
work on a run. The study lives in memory and is rebuilt from the journal; it never is the truth.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.controllers.recovery import RecoveryProposer, distribution
from autocompress.policy import Policy
from autocompress.space import Space
from autocompress.trial import Budget, Evaluation, Measurement

Predict = Callable[[Policy], Measurement]
"""What is known exactly of a policy before it is built: bytes and multiply-accumulates."""
UNKNOWN_LOSS = 100.0
"""Loss told for a policy that was refused by its size: samplers rank such trials by their excess alone."""


def _tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, multivariate=True, n_startup_trials=10)


def _nsga2(seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=20)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _gp(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return GPSampler(seed=seed, deterministic_objective=True)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {"tpe": _tpe, "nsga2": _nsga2, "gp": _gp, "random": _random}


class OptunaController:
    """Starts with the uniform policies that fit, then samples; what exceeds the budget is told so and repaired."""

    def __init__(
        self,
        sampler: str,
        space: Space,
        budget: Budget,
        predict: Predict,
        seed: int,
    ) -> None:
        """`sampler` is a name in `SAMPLERS`."""
        self._sampler, self._space, self._budget, self._predict, self._seed = sampler, space, budget, predict, seed
        self._baselines = deque(p for p in space.baselines() if self._excess(p) <= 0)
        self._pending: dict[str, list[Trial]] = {}
        self._waiting: list[str] = []  # keys of proposals that the study learns of when they are told
        self._early: list[str] = []  # and of restored ones that it knows already
        self.recovery = RecoveryProposer(space)
        self._repair: Policy | None = None
        self._number = 0  # of the next proposal: everything asked for, or told without having been asked for
        self._late: deque[Evaluation] = deque()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions: list[Any] = ["minimize"] * (2 if budget.ms is None else 3)
        self._study = optuna.create_study(directions=directions, sampler=RandomSampler(seed=seed))
        self._name_objectives(["loss", "bytes", "ms"][: len(directions)])

    def _name_objectives(self, names: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(names)

    @property
    def study(self) -> optuna.Study:
        """Everything asked and told. Only samplers read it, so what they did not propose is written when it is read."""
        while self._late:
            self._study.add_trial(self._frozen(self._late.popleft()))
        return self._study

    def _excess(self, policy: Policy) -> float:
        return self._budget.static().excess(self._predict(policy))

    def ask(self, parent: Policy | None = None, epochs: int = 0) -> Policy:
        """See `Controller`. The sampler's generator depends on the seed and the trial's number alone."""
        number = self._number
        self._number += 1
        proposal = self._propose(number) if parent is None else self._recovered(parent, epochs, number)
        if proposal is not None:
            self._waiting.append(proposal.key())
            return proposal
        self.study.sampler = SAMPLERS[self._sampler](mix(self._seed, number))
        trial = self._sampled()
        policy = self._space.decode(trial.params)
        self._pending.setdefault(policy.key(), []).append(trial)
        return policy

    def _sampled(self) -> Trial:
        return self.study.ask({p.name: distribution(p) for p in self._space.policy_parameters})

    def _recovered(self, parent: Policy, epochs: int, number: int) -> Policy:
        """`parent` with recovery training; its parameters have a sampler of their own."""
        share = self._predict(parent).bytes / self._space.graph.dense_bytes
        return self.recovery.propose(parent, epochs, share, mix(self._seed, number))

    def _propose(self, number: int) -> Policy | None:
        """A policy to evaluate as it is; None leaves it to the sampler."""
        if self._repair is not None:
            repair, self._repair = self._repair, None
            return self._space.shrink(repair, self._excess, mix(self._seed, number))
        return self._baselines.popleft() if self._baselines else None

    def tell(self, evaluation: Evaluation) -> None:
        """See `Controller`."""
        trial = self._asked(evaluation.policy.key())
        if trial is None:
            if evaluation.policy.key() in self._waiting:
                self._waiting.remove(evaluation.policy.key())
            else:
                self._number += 1
            self._late.append(evaluation)
        else:
            self._finish(trial, evaluation)
        self._know(evaluation)

    def _know(self, evaluation: Evaluation) -> None:
        self._after(evaluation)
        self.recovery.learn(evaluation)
        self._learn(evaluation)

    def _asked(self, key: str) -> Trial | None:
        """The study's trial of a policy that it was asked for; of several the first."""
        waiting = self._pending.get(key)
        if not waiting:
            return None
        found = waiting.pop(0)
        if not waiting:
            del self._pending[key]
        return found

    def _finish(self, trial: Trial, evaluation: Evaluation) -> None:
        values, constraint, attributes = self._outcome(evaluation)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_constraint("budget", constraint)
            self.study.tell(trial, values)

    def _learn(self, evaluation: Evaluation) -> None:
        """For controllers that keep knowledge beside the study."""

    def restore(self, past: Iterable[Policy | Evaluation]) -> None:
        """See `Controller`."""
        events = list(past)
        outcomes = _outcomes(events)
        for i, event in enumerate(events):
            if isinstance(event, Evaluation):
                self._told_again(event)
            elif self._sampler == "nsga2" and not event.recovery.epochs:
                self._ask_again(event)
            elif self._needs_no_sampler(event):
                self._number += 1
                self._waiting.append(event.key())
                self.recovery.expect(event)
            elif i in outcomes:  # in the place among the study's trials that it had
                self._number += 1
                self.study.add_trial(self._frozen(outcomes[i]))
                self._early.append(event.key())
            else:
                self._number += 1
                self.study.enqueue_trial(dict(self._space.encode(event)))
                self._pending.setdefault(event.key(), []).append(self._sampled())

    def _told_again(self, evaluation: Evaluation) -> None:
        if evaluation.policy.key() not in self._early:
            self.tell(evaluation)
            return
        self._early.remove(evaluation.policy.key())
        self._know(evaluation)

    def _needs_no_sampler(self, policy: Policy) -> bool:
        """Whether the earlier process proposed this itself; if so, it is not proposed again."""
        if policy.recovery.epochs:
            return True
        if self._repair is not None:
            self._repair = None
            return True
        if policy in self._baselines:
            self._baselines.remove(policy)
            return True
        return False

    def _ask_again(self, policy: Policy) -> None:
        """Ask as then, since NSGA-II marks generations on what it is asked for; the answer was `policy`."""
        asked, key = self.ask().key(), policy.key()
        trial = self._asked(asked)
        if trial is not None:
            self._pending.setdefault(key, []).append(trial)
        else:
            self._waiting[self._waiting.index(asked)] = key

    def _after(self, evaluation: Evaluation) -> None:
        self._repair = evaluation.policy if evaluation.status == "infeasible" else None

    def _frozen(self, evaluation: Evaluation) -> FrozenTrial:
        recovery = evaluation.policy.recovery.epochs > 0
        parameters = self._space.policy_parameters + (self._space.recovery_parameters if recovery else ())
        values, constraint, attributes = self._outcome(evaluation)
        return optuna.trial.create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=values,
            params=dict(self._space.encode(evaluation.policy)),
            distributions={p.name: distribution(p) for p in parameters},
            user_attrs=attributes,
            constraints=None if values is None else {"budget": constraint},
        )

    def _outcome(self, evaluation: Evaluation) -> tuple[list[float] | None, float, dict[str, object]]:
        """Objective values (None if it failed), the constraint (0 or less fits) and attributes for the study."""
        attributes: dict[str, object] = {
            "rung": evaluation.rung,
            "policy": evaluation.policy.key(),
            "status": evaluation.status,
            "screened": evaluation.screened,
        }
        measured = evaluation.measurement
        if evaluation.status == "failed" or measured is None:
            return None, math.inf, attributes
        if evaluation.status == "infeasible":
            values = [UNKNOWN_LOSS, float(measured.bytes), UNKNOWN_LOSS]
            return values[: len(self._study.directions)], self._budget.static().excess(measured), attributes
        attributes["quality"] = measured.quality
        values = [measured.loss, float(measured.bytes), measured.latency_ms]
        return values[: len(self._study.directions)], self._budget.excess(measured), attributes


def _outcomes(events: Sequence[Policy | Evaluation]) -> dict[int, Evaluation]:
    """Of each policy that was asked for, by its place, what it was told later."""
    found: dict[int, Evaluation] = {}
    later: dict[str, list[Evaluation]] = {}
    for i in range(len(events) - 1, -1, -1):
        event = events[i]
        if isinstance(event, Evaluation):
            later.setdefault(event.policy.key(), []).append(event)
        elif later.get(event.key()):
            found[i] = later[event.key()].pop()
    return found


def mix(seed: int, number: int) -> int:
    """A 31-bit seed that differs for every (seed, number)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "little") >> 1
