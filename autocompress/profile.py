"""What each level of each layer costs and does: measured once for a model, reused under every budget.

A level's error comes free with its solution; one evaluation per layer turns errors into loss. Plain data, and the loop
that gathers it. Knows nothing about tensors, budgets or who proposes.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from autocompress.errors import AutocompressError, PolicyError, RunError, TaskError
from autocompress.graph import Graph, Layer
from autocompress.policy import LayerChoice, Policy, Solver
from autocompress.space import Space

VERSION = 3
"""Raise when a profile of the same model would come out differently."""
PROBED_ERROR = 0.03
"""Relative output error at which a layer is measured: well above the noise, and where tight budgets put layers."""

PROBED_RATIOS = 3
"""Keep ratios at which a group is measured: how fast its loss rises as it narrows differs between groups."""

BROKEN_LOSS = 100.0
"""Stands for the loss of a model whose outputs are not finite."""


@dataclass(frozen=True, slots=True)
class Level:
    """One choice for a layer: bytes of its section in the file, and its output error relative to the outputs' power."""

    choice: LayerChoice
    bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """The levels of a layer, and `sensitivity`: the loss that one unit of output error here costs the model."""

    name: str
    levels: tuple[Level, ...]
    sensitivity: float

    def losses(self) -> list[float]:
        """Predicted loss of each level: its error times the measured sensitivity."""
        return [self.sensitivity * level.error for level in self.levels]


@dataclass(frozen=True, slots=True)
class GroupProfile:
    """`loss` of the model when a channel group keeps only `keep` of its channels."""

    name: str
    keep: float
    loss: float


@dataclass(frozen=True, slots=True)
class Profile:
    """All layers in network order, and each measured width of each channel group. `key` says what it belongs to."""

    key: str
    layers: tuple[LayerProfile, ...]
    groups: tuple[GroupProfile, ...]
    evaluations: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal profile back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Profile:
        """The profile that `to_json` wrote. Raises `RunError` on anything else."""
        try:
            return cls(
                str(data["key"]),
                tuple(_layer(row) for row in data["layers"]),
                tuple(_group_profile(row) for row in data["groups"]),
                int(data["evaluations"]),
                _finite(data["seconds"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, PolicyError) as error:
            raise RunError(f"the stored profile cannot be read: {error}") from None


def _layer(row: Any) -> LayerProfile:
    levels = tuple(Level(LayerChoice(**x["choice"]), int(x["bytes"]), _finite(x["error"])) for x in row["levels"])
    if not levels or min(level.bytes for level in levels) < 0:
        raise ValueError(f"layer {row['name']!r} has no levels, or one of less than no bytes")
    return LayerProfile(str(row["name"]), levels, _finite(row["sensitivity"]))


def _group_profile(row: Any) -> GroupProfile:
    if not 0 <= (keep := float(row["keep"])) <= 1:
        raise ValueError(f"the share {keep} of channels is not in [0, 1]")
    return GroupProfile(str(row["name"]), keep, _finite(row["loss"]))


def _finite(value: Any) -> float:
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{value} is not a finite number of 0 or more")
    return number


class Measures(Protocol):
    """What a profile is made with; `evaluate.Evaluator` is one."""

    @property
    def graph(self) -> Graph:
        """The model."""
        ...

    def level(self, layer: Layer, choice: LayerChoice, solver: Solver) -> Level:
        """Bytes and output error of one layer's solution."""
        ...

    def loss(self, policy: Policy) -> float:
        """Distance from the dense model's outputs, as a search measures it."""
        ...


Watch = Callable[[int, int, str], None]
"""(steps done, steps in all, what was done last)."""


def profile_key(space: Space, identity: object) -> str:
    """Equal if a profile can be reused: the same model, data, levels, and ways to build what is probed.

    `identity` stands for model and data.
    """
    levels = [(layer.name, space.bits[layer.name], space.sparsity[layer.name]) for layer in space.graph.layers]
    ways = [space.preferred(name) for name in ("scheme", "solver", "criterion", "batch_norm/reestimate")]
    what = [VERSION, identity, levels, sorted(space.keep.items()), ways]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def measure(measures: Measures, space: Space, key: str, watch: Watch, clock: Callable[[], float]) -> Profile:
    """Solve the levels of every layer, and evaluate each layer alone, once. `watch` follows it; `clock` in seconds.

    Levels that cannot be solved or evaluated are left out, with a warning. Raises `TaskError` if a layer has no other.
    """
    start = clock()
    layers: list[LayerProfile] = []
    total = 2 * len(space.graph.layers)
    for layer in space.graph.layers:
        levels = levels_of(measures, space, layer)
        watch(len(layers) * 2, total, f"{layer.name}: {len(levels)} levels solved")
        layers.append(_probed(measures, space, layer, levels))
        watch(len(layers) * 2, total, f"{layer.name} measured")
    return Profile(key, tuple(layers), (), len(layers), clock() - start)


def with_groups(
    profile: Profile, measures: Measures, space: Space, watch: Watch, clock: Callable[[], float]
) -> Profile:
    """`profile` with a few widths of each channel group alone: what budgets need that bytes alone do not meet."""
    start = clock()
    groups: list[GroupProfile] = []
    probes = [(name, keep) for name, ratios in space.keep.items() for keep in _probed_ratios(ratios)]
    for name, keep in probes:
        groups.append(_group(measures, space, name, keep))
        watch(len(groups), len(probes), f"{keep:.0%} of the channels of {name} measured")
    evaluations, seconds = profile.evaluations + len(groups), profile.seconds + clock() - start
    return replace(profile, groups=tuple(groups), evaluations=evaluations, seconds=seconds)


def levels_of(measures: Measures, space: Space, layer: Layer) -> tuple[Level, ...]:
    """The choices that the space leaves `layer`, solved; not those that plain rounding shows to be of no use.

    A choice goes if another takes no more bytes and errs less when both are only rounded. On ResNet-20 that is half of
    them, and no budget's best sum of losses moved by 0.1%.
    """
    scheme, solver = space.preferred("scheme"), space.preferred("solver")
    every = [LayerChoice(b, zeros, scheme) for b in space.bits[layer.name] for zeros in space.sparsity[layer.name]]
    rough = _solved(measures, layer, every, "nearest")
    useful = [a for a in rough if not any(b.bytes <= a.bytes and b.error < a.error for b in rough)]
    return tuple(useful if solver == "nearest" else _solved(measures, layer, [a.choice for a in useful], solver))


def _solved(measures: Measures, layer: Layer, choices: Sequence[LayerChoice], solver: Solver) -> list[Level]:
    """The levels of those `choices` that can be solved."""
    found: list[Level] = []
    for choice in choices:
        try:
            level = measures.level(layer, choice, solver)
            if not math.isfinite(level.error):
                raise ValueError(f"its error is {level.error}")
            found.append(level)
        except AutocompressError:
            raise
        except Exception as error:  # whatever the solver raises on these weights
            _warn_unusable(layer, choice, error)
    return found


def _probed(measures: Measures, space: Space, layer: Layer, levels: Sequence[Level]) -> LayerProfile:
    """The layer with its loss per unit of error, at the level whose error is nearest to the probed one.

    If the model cannot be evaluated there, that level is left out and the next nearest one is taken.
    """
    left = list(levels)
    while harmful := [level for level in left if level.error > 0]:
        probe = min(harmful, key=lambda level: abs(math.log(level.error / PROBED_ERROR)))
        try:
            loss = measures.loss(space.only({layer.name: probe.choice}))
        except FloatingPointError:  # a model that breaks here is as sensitive as can be
            loss = BROKEN_LOSS
        except AutocompressError:
            raise
        except Exception as error:  # whatever the user's model or metric raises
            _warn_unusable(layer, probe.choice, error)
            left.remove(probe)
            continue
        return LayerProfile(layer.name, tuple(left), max(loss, 1e-9) / probe.error)
    if not left:
        raise TaskError(
            f"every level of layer {layer.name} failed, the warnings say why: mend that, or leave the layer dense "
            f'with an [[override]] of the space: match = "{layer.name}", bits = [32], sparsity = [0.0]'
        )
    return LayerProfile(layer.name, tuple(left), 0.0)


def _warn_unusable(layer: Layer, choice: LayerChoice, error: Exception) -> None:
    what = f"{choice.bits} bits with {choice.sparsity:.0%} zeros"
    text = " ".join(str(error).split())
    warnings.warn(f"layer {layer.name} is not used at {what}: {type(error).__name__}: {text}", stacklevel=3)


def _probed_ratios(ratios: Sequence[float]) -> list[float]:
    """The narrowest, a middle and the widest ratio below 1, in rising order, and 0, of which no other tells."""
    narrow = [ratio for ratio in ratios if 0 < ratio < 1]
    last, count = len(narrow) - 1, min(PROBED_RATIOS, len(narrow))
    return [0.0] * (0.0 in ratios) + [narrow[i * last // max(1, count - 1)] for i in range(count)]


def _group(measures: Measures, space: Space, name: str, keep: float) -> GroupProfile:
    try:
        return GroupProfile(name, keep, max(0.0, measures.loss(space.only({}, {name: keep}))))
    except AutocompressError:
        raise
    except Exception as error:
        if not isinstance(error, FloatingPointError):
            text = " ".join(str(error).split())
            warnings.warn(f"channels of {name} seem indispensable: {type(error).__name__}: {text}", stacklevel=3)
        return GroupProfile(name, keep, BROKEN_LOSS)
