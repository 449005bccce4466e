"""Controllers by name."""

from __future__ import annotations

from collections.abc import Callable

from autocompress.controllers.optuna_samplers import SAMPLERS, OptunaController, Predict
from autocompress.controllers.solver import SolverController
from autocompress.errors import AutocompressError
from autocompress.policy import Policy
from autocompress.profile import Profile
from autocompress.space import Space
from autocompress.trial import Budget

CONTROLLERS = ("solver", *SAMPLERS)


def needs_profile(name: str) -> bool:
    """Whether `make_controller` wants a profile. Raises `AutocompressError` naming the known controllers."""
    if name not in CONTROLLERS:
        raise AutocompressError(f"no controller {name!r}: use one of {', '.join(CONTROLLERS)}")
    return name == "solver"


def make_controller(
    name: str,
    space: Space,
    budget: Budget,
    predict: Predict,
    seed: int,
    profile: Profile | None = None,
    times: Callable[[Policy], float] | None = None,
) -> OptunaController:
    """The controller called `name`; `times` predicts milliseconds. Raises `AutocompressError` for an unknown one."""
    if not needs_profile(name):
        return OptunaController(name, space, budget, predict, seed)
    if profile is None:
        raise AutocompressError("the solver needs a profile of the model: measure one, or use another --controller")
    return SolverController(space, budget, predict, seed, profile, times)
