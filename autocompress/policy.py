"""What a candidate is: a frozen value that says how to compress each layer and how to recover.

Knows nothing about tensors, budgets or searches. Solvers, samplers and people all write the same `Policy`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from autocompress.errors import PolicyError

Scheme = Literal["symmetric", "asymmetric", "entropy"]
Solver = Literal["nearest", "database"]
Criterion = Literal["l1", "l2", "taylor", "entropy", "gini", "reconstruction"]
Decay = Literal["constant", "step", "exponential", "cosine", "polynomial", "one-cycle"]
Gradient = Literal["none", "centralise", "standardise", "clip"]
Scales = Literal["fixed", "learned"]
Optimizer = Literal["sgd", "adam", "muon"]

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
"""Weight widths: a sign times the row's scale, integers on an affine grid up to 8, IEEE half and single precision."""

ACTIVATIONS = (8, 32)
"""Widths of what layers pass on: unsigned bytes between integer kernels, or single precision."""

HALVES = (0.5, 1.5, 2.5, 3.5)
"""Widths between those, for grids whose codes are entropy coded."""

CODE_BITS = 8
"""Most bits of a code, however few it takes once it is entropy coded."""

MOST_ENTROPY = 6
"""Most bits that such codes take on average: above, what a byte cannot reach costs more than the coding saves."""

SMALL_FLOATS = 2.5
"""With so many bits or fewer a layer's scales and bias take 8: that moves rows by 1.3%, such codes weights by 7%."""


def _require(condition: bool, what: str, given: object, required: str) -> None:
    if not condition:
        raise PolicyError(f"{what} is {given!r}; it must be {required}")


def _canonical(choice: LayerChoice | Recovery) -> None:
    """Check each field's type, and make whole numbers floats and -0 zero, so that equal choices have equal keys."""
    for field_ in fields(choice):
        value, kind = getattr(choice, field_.name), type(field_.default)
        if kind is float:
            number = _number(field_.name, value)
            _require(math.isfinite(number), field_.name, value, "finite")
            object.__setattr__(choice, field_.name, number + 0.0)
        else:
            _require(type(value) is kind, field_.name, value, f"of type {kind.__name__}")


def _one_of(what: str, given: str, kind: Any) -> None:
    allowed = get_args(kind)
    _require(given in allowed, what, given, "one of " + ", ".join(allowed))


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """How one weight tensor is stored: share of zeros, bit width, and the kind of grid.

    1 bit is always symmetric: the unpruned weights of a row are plus or minus one scale, whatever `scheme` says.
    An `entropy` grid is symmetric with one step for all rows, chosen so that entropy coded codes take about `bits` per
    weight on average, which may be a half between two whole ones; the codes themselves are as wide as the largest
    weight needs. Above 6 bits it is a plain symmetric one.
    """

    bits: float = 32.0
    sparsity: float = 0.0
    scheme: Scheme = "symmetric"

    def __post_init__(self) -> None:
        _canonical(self)
        if self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))
        known = (*BITS, *HALVES) if self.scheme == "entropy" else BITS
        _require(self.bits in known, "bits", self.bits, f"one of {BITS}; {HALVES} with scheme entropy")
        _require(0.0 <= self.sparsity < 1.0, "sparsity", self.sparsity, "in [0, 1)")
        _one_of("scheme", self.scheme, Scheme)

    @property
    def entropy(self) -> bool:
        """Whether it is the grid for entropy coded codes."""
        return self.scheme == "entropy" and self.bits <= MOST_ENTROPY

    @property
    def width(self) -> int:
        """Bits of the floats, or of the codes: of an `entropy` grid the most that they may have."""
        return CODE_BITS if self.entropy else math.ceil(self.bits)

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is in the middle of the codes, so that it is not stored."""
        return self.scheme != "asymmetric" or self.width == 1

    @property
    def small_floats(self) -> bool:
        """Whether the scales and the bias beside the codes take 8 bits in place of 16."""
        return self.scheme == "entropy" and self.bits <= SMALL_FLOATS

    def to_json(self) -> dict[str, Any]:
        """Plain data: a search makes thousands, so it does not go through `asdict`."""
        return {"bits": self.bits, "sparsity": self.sparsity, "scheme": self.scheme}

    def zeros(self, count: int) -> int:
        """How many of `count` weights are removed: exact, so that a file's size follows from the policy alone."""
        return math.floor(count * self.sparsity + 1e-9)


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a compressed model is repaired: batch-norm handling, then `epochs` of recovery training.

    `decay_rate` is the share of the peak learning rate that is left at the end, whatever the decay kind.
    `warmup` is the share of all steps in which the rate rises to its peak; a one-cycle decay of 0 takes 0.3.
    `adjust_factor` of 1 turns the plateau adjustment off; `adjust_patience` and `adjust_cooldown` count its reports.
    `distill_weight` mixes the task's loss (0) with the teacher's soft targets (1); `hint_weight` adds the distance
    between hidden features. `scales` says whether the grids' scales are trained with the weights. `ema` is the decay
    per step of an exponential moving average of the weights, which is what is kept then; 0 is off. `optimizer` is SGD
    with momentum, AdamW at a fixed share of `lr`, or Muon, whose steps are `lr` times a weight's root mean square. With
    `views` above 1 the teacher's answer to an input is the mean of what it says of so many versions of it, those that
    the task gives; the student sees the input alone.
    """

    epochs: int = 0
    lr: float = 0.02
    decay: Decay = "cosine"
    decay_rate: float = 0.01
    adjust_factor: float = 1.0
    adjust_patience: int = 2
    distill_weight: float = 0.9
    temperature: float = 4.0
    hint_weight: float = 0.0
    gradient: Gradient = "none"
    reestimate_bn: bool = True
    fold_bn: bool = True
    warmup: float = 0.0
    adjust_cooldown: int = 0
    scales: Scales = "fixed"
    ema: float = 0.0
    optimizer: Optimizer = "sgd"
    views: int = 1

    def __post_init__(self) -> None:
        _canonical(self)
        _require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        _require(0.0 < self.lr <= 10.0, "lr", self.lr, "in (0, 10]")
        _one_of("decay", self.decay, Decay)
        _require(0.0 < self.decay_rate <= 1.0, "decay_rate", self.decay_rate, "in (0, 1]")
        _require(0.0 < self.adjust_factor <= 1.0, "adjust_factor", self.adjust_factor, "in (0, 1]")
        _require(self.adjust_patience >= 0, "adjust_patience", self.adjust_patience, "0 or more")
        _require(0.0 <= self.distill_weight <= 1.0, "distill_weight", self.distill_weight, "in [0, 1]")
        _require(self.temperature > 0.0, "temperature", self.temperature, "above 0")
        _require(self.hint_weight >= 0.0, "hint_weight", self.hint_weight, "0 or more")
        _one_of("gradient", self.gradient, Gradient)
        _require(0.0 <= self.warmup <= 0.5, "warmup", self.warmup, "in [0, 0.5]")
        _require(self.adjust_cooldown >= 0, "adjust_cooldown", self.adjust_cooldown, "0 or more")
        _one_of("scales", self.scales, Scales)
        _require(0.0 <= self.ema < 1.0, "ema", self.ema, "in [0, 1)")
        _one_of("optimizer", self.optimizer, Optimizer)
        _require(self.views >= 1, "views", self.views, "1 or more")

    def to_json(self) -> dict[str, Any]:
        """Plain data. What came later is named only where it is used, so that older policies keep their keys."""
        known = asdict(self)
        return {name: value for name, value in known.items() if name not in _LATER or value != _LATER[name]}


_LATER = {"warmup": 0.0, "adjust_cooldown": 0, "scales": "fixed", "ema": 0.0, "optimizer": "sgd", "views": 1}
"""Defaults of the fields that the first format of a policy did not have."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One candidate. `layers` and `keep` are read-only; layers and groups that are not named stay dense.

    `keep` maps a coupling group to the share of its channels that stays; which ones is decided by `criterion`. With 0
    none stay: what reads them gives a constant, so that a residual branch is gone.
    `solver` says how zeros and codes are found: by magnitude and to the nearest grid point, or from the layer
    database, which compensates for what each layer's inputs show. With the database, what channel removal leaves is
    fitted to the dense model first.
    `activations` of 8 runs every layer whose weights are integers on integer kernels, which `.onnx` files can, but for
    the layers named in `floats`.
    """

    layers: Mapping[str, LayerChoice] = field(default_factory=dict)
    keep: Mapping[str, float] = field(default_factory=dict)
    criterion: Criterion = "l2"
    recovery: Recovery = field(default_factory=Recovery)
    solver: Solver = "nearest"
    activations: int = 32
    floats: tuple[str, ...] = ()
    _key: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        keep = {name: _number(f"keep.{name}", ratio) + 0.0 for name, ratio in self.keep.items()}  # -0 is 0
        object.__setattr__(self, "keep", keep)
        for group, ratio in self.keep.items():
            _require(0.0 <= ratio <= 1.0, f"keep ratio of {group}", ratio, "in [0, 1]")
        _one_of("criterion", self.criterion, Criterion)
        _one_of("solver", self.solver, Solver)
        _require(self.activations in ACTIVATIONS, "activations", self.activations, f"one of {ACTIVATIONS}")
        object.__setattr__(self, "floats", tuple(sorted(set(self.floats))) if self.activations == 8 else ())
        object.__setattr__(self, "layers", MappingProxyType(dict(sorted(self.layers.items()))))
        object.__setattr__(self, "keep", MappingProxyType(dict(sorted(self.keep.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return Policy.from_json, (self.to_json(),)

    def __hash__(self) -> int:
        return hash(self.key())

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal policy back."""
        return {
            "layers": {name: choice.to_json() for name, choice in self.layers.items()},
            "keep": dict(self.keep),
            "criterion": self.criterion,
            "solver": self.solver,
            "recovery": self.recovery.to_json(),
        } | self._kernels()

    def _kernels(self) -> dict[str, Any]:
        """What integer kernels there are, if any."""
        found: dict[str, Any] = {} if self.activations == 32 else {"activations": self.activations}
        return found | ({"floats": list(self.floats)} if self.floats else {})

    @classmethod
    def from_json(cls, data: Any) -> Policy:
        """The policy that `to_json` wrote. Raises `PolicyError` on anything else."""
        top = _record("policy", data, {f.name for f in fields(cls) if f.init})
        layers = _record("policy.layers", top.get("layers", {}), None)
        keep = _record("policy.keep", top.get("keep", {}), None)
        try:
            return cls(
                layers={
                    name: LayerChoice(**_typed(LayerChoice, f"policy.layers.{name}", choice))
                    for name, choice in layers.items()
                },
                keep={name: _number(f"policy.keep.{name}", ratio) for name, ratio in keep.items()},
                criterion=top.get("criterion", "l2"),
                solver=top.get("solver", "nearest"),
                recovery=Recovery(**_typed(Recovery, "policy.recovery", top.get("recovery", {}))),
                activations=_as(int, "policy.activations", top.get("activations", 32)),
                floats=tuple(
                    _as(str, "policy.floats", name) for name in _as(list, "policy.floats", top.get("floats", []))
                ),
            )
        except TypeError as error:
            raise PolicyError(f"policy: {error}") from None

    def choice(self, layer: str) -> LayerChoice:
        """How the layer's weight is stored; dense where the policy does not name it."""
        return self.layers.get(layer, _DENSE)

    def without_recovery(self) -> Policy:
        """The one-shot policy: everything but the recovery training; batch norms are treated alike."""
        r = self.recovery
        plain = Recovery(reestimate_bn=r.reestimate_bn, fold_bn=r.fold_bn)
        return self if r == plain else replace(self, recovery=plain)

    def key(self) -> str:
        """16 hexadecimal digits that are equal if and only if (SHA-256) the policies are."""
        if not self._key:
            canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
            object.__setattr__(self, "_key", hashlib.sha256(canonical.encode()).hexdigest()[:16])
        return self._key


def _record(what: str, data: Any, allowed: set[str] | None) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise PolicyError(f"{what} must be an object with named members, not {type(data).__name__}")
    unknown = sorted(set(data) - allowed) if allowed is not None else []
    if unknown:
        raise PolicyError(f"{what} has unknown member {unknown[0]!r}; allowed: {', '.join(sorted(allowed or ()))}")
    return data


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PolicyError(f"{what} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise PolicyError(f"{what} is too large for a number") from None


def _typed(kind: type[LayerChoice] | type[Recovery], what: str, data: Any) -> dict[str, Any]:
    """`data` with each member checked against the type of the field's default value."""
    defaults = {field_.name: field_.default for field_ in fields(kind)}
    record = _record(what, data, set(defaults))
    return {name: _as(type(defaults[name]), f"{what}.{name}", value) for name, value in record.items()}


def _as(kind: type, what: str, value: Any) -> Any:
    if kind is float:
        return _number(what, value)
    if type(value) is not kind:
        raise PolicyError(f"{what} must be {kind.__name__}, not {value!r}")
    return value


_DENSE = LayerChoice()
