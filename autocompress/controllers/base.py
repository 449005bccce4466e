"""The seam between a search and whoever proposes. Knows nothing about Optuna or tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from autocompress.policy import Policy
from autocompress.trial import Evaluation


class Controller(Protocol):
    """Proposes policies and learns from what became of them.

    A proposal is a function of the seed and of everything told before, so a run that is told its past again goes
    on as if it had never stopped.
    """

    def ask(self, parent: Policy | None = None, epochs: int = 0) -> Policy:
        """A one-shot policy; or `parent` with a proposal of recovery training for `epochs`, those of the first rung.

        Who climbs to a rung above keeps what it was trained with: that is not asked for, only told.

        May exceed the budget: tell it `infeasible`, and the next proposal is a repaired one.
        """
        ...

    def tell(self, evaluation: Evaluation) -> None:
        """What became of a policy: one that `ask` returned, was measured again on all of `val`, or climbed a rung."""
        ...

    def restore(self, evaluations: Iterable[Evaluation]) -> None:
        """Learn a run's past, in its order, before the first `ask`."""
        ...
