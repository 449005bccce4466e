"""The seam between a search and whoever proposes. Knows nothing about Optuna or tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from autocompress.policy import Policy
from autocompress.trial import Evaluation


class Controller(Protocol):
    """Proposes policies and learns from what became of them.

    A proposal is a function of the seed and of everything asked and told before, so a run that is told its past
    again goes on as if it had never stopped. Several may be asked for before the first is told, in any order.
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

    def restore(self, past: Iterable[Policy | Evaluation]) -> None:
        """Learn a run's past, in its order, before the first `ask`: policies that it returned, and what was told.

        Some of the policies may not have been told yet.
        """
        ...
