"""From a search space file and a graph to named choices, and between choices and policies.

Knows nothing about Optuna, Ray or tensors.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import random
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from autocompress.artifact.layout import weight_entry
from autocompress.errors import SpaceError
from autocompress.graph import Graph, Group, Layer, Shape
from autocompress.policy import (
    BITS,
    HALVES,
    Criterion,
    Decay,
    Gradient,
    LayerChoice,
    Optimizer,
    Policy,
    Recovery,
    Scales,
    Scheme,
    Solver,
)

Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Ordered:
    """A choice among numbers, cheapest first: one step down does not add bytes.

    The exception are zeros beside 1-bit weights: a mask of them costs as much as all the signs.
    """

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Categorical:
    """A choice among things without an order."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Real:
    """A number between two bounds."""

    name: str
    low: float
    high: float
    log: bool = False


Parameter = Ordered | Categorical | Real


# --- the file -------------------------------------------------------------------------------------------


def _known_bits(values: list[float]) -> list[float]:
    wrong = [value for value in values if value not in (*BITS, *HALVES)]
    if wrong:
        known, halves = (", ".join(map(str, bits)) for bits in (BITS, HALVES))
        raise ValueError(f"{wrong[0]:g} is not among {known}; nor, for scheme entropy, among {halves}")
    return [int(bits) if bits == int(bits) else bits for bits in values]


def _rising(bounds: list[float]) -> list[float]:
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ValueError("give [low, high] with low <= high")
    return bounds


Bits = Annotated[list[float], Field(min_length=1), AfterValidator(_known_bits)]
Sparsities = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)]
Ratios = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
Share = Annotated[list[Annotated[float, Field(ge=0, le=1)]], AfterValidator(_rising)]
Rate = Annotated[list[Annotated[float, Field(gt=0, le=10)]], AfterValidator(_rising)]
Temperature = Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], AfterValidator(_rising)]
HintWeight = Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], AfterValidator(_rising)]
Warmup = Annotated[list[Annotated[float, Field(ge=0, le=0.5)]], AfterValidator(_rising)]
PositiveShare = Annotated[list[Annotated[float, Field(gt=0, le=1)]], AfterValidator(_rising)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerSection(_Section):
    """`[layers]`: what every weight may become."""

    bits: Bits = [32]
    sparsity: Sparsities = [0.0]
    scheme: Annotated[list[Scheme], Field(min_length=1)] = ["symmetric"]
    solver: Annotated[list[Solver], Field(min_length=1)] = ["nearest"]
    activations: Annotated[list[Literal[8, 32]], Field(min_length=1)] = [8]


class ChannelSection(_Section):
    """`[channels]`: how many channels of each coupling group may stay, and by which importance.

    A ratio of 0 counts only where a whole group can go, as a residual branch can. Runtimes are fast at round widths of
    convolutions only, so `multiple_of` leaves groups without one alone.
    """

    keep: Ratios = [1.0]
    criterion: Annotated[list[Criterion], Field(min_length=1)] = ["l2"]
    multiple_of: Annotated[int, Field(ge=1, lt=2**31)] = 1


class BatchNormSection(_Section):
    """`[batch_norm]`: whether statistics are re-estimated and whether norms are folded into weights."""

    reestimate: Annotated[list[bool], Field(min_length=1)] = [True]
    fold: Annotated[list[bool], Field(min_length=1)] = [True]


class RecoverySection(_Section):
    """`[recovery]`: ranges of the recovery training."""

    lr: Rate = [0.02, 0.02]
    decay: Annotated[list[Decay], Field(min_length=1)] = ["cosine"]
    decay_rate: PositiveShare = [0.01, 0.01]
    adjust_factor: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [1.0]
    adjust_patience: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [2]
    adjust_cooldown: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0]
    distill_weight: Share = [0.9, 0.9]
    temperature: Temperature = [4.0, 4.0]
    hint_weight: HintWeight = [0.0, 0.0]
    gradient: Annotated[list[Gradient], Field(min_length=1)] = ["none"]
    warmup: Warmup = [0.0, 0.0]
    scales: Annotated[list[Scales], Field(min_length=1)] = ["fixed"]
    ema: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)] = [0.0]
    optimizer: Annotated[list[Optimizer], Field(min_length=1)] | None = None
    views: Annotated[list[Annotated[int, Field(ge=1, lt=2**10)]], Field(min_length=1)] = [1]


class Override(_Section):
    """`[[override]]`: other choices for the layers or channel groups whose name matches a glob."""

    match: str
    bits: Bits | None = None
    sparsity: Sparsities | None = None
    keep: Ratios | None = None


class SpaceFile(_Section):
    """The whole file."""

    description: str = ""
    layers: LayerSection = LayerSection()
    channels: ChannelSection = ChannelSection()
    batch_norm: BatchNormSection = BatchNormSection()
    recovery: RecoverySection = RecoverySection()
    override: list[Override] = []

    @model_validator(mode="after")
    def _halves(self) -> Self:
        every = [*self.layers.bits, *(bits for override in self.override for bits in override.bits or ())]
        if set(every) & set(HALVES) and set(self.layers.scheme) != {"entropy"}:
            raise ValueError('half bits are averages of entropy coded codes: they need scheme = ["entropy"]')
        return self


def shipped() -> list[str]:
    """Names of the search spaces that come with the package."""
    folder = resources.files("autocompress") / "search_spaces"
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".toml"))


def load_space(name: str) -> SpaceFile:
    """The shipped space called `name`, or the file at that path. Raises `SpaceError`."""
    if name in shipped():
        text = (resources.files("autocompress") / "search_spaces" / f"{name}.toml").read_text(encoding="utf-8")
        return parse_space(text, f"{name}.toml")
    path = Path(name)
    if not path.is_file():
        raise SpaceError(f"no search space {name!r}: give a .toml file or one of {', '.join(shipped())}")
    try:
        return parse_space(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"cannot read the search space {name}: {error}") from None


def parse_space(text: str, source: str) -> SpaceFile:
    """Read TOML; every complaint names `source`, the key, what was given and what is allowed."""
    try:
        return SpaceFile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise SpaceError(f"{source} is not TOML: {error}") from None
    except ValidationError as error:
        raise SpaceError(_complaint(source, error)) from None


def _complaint(source: str, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = (
            _SECTIONS.get(str(first["loc"][0]), SpaceFile) if len(first["loc"]) > 1 else SpaceFile
        )
        allowed = list(section.model_fields)
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{source}: unknown key {key!r}{hint}; allowed here: {', '.join(allowed)}"
    return f"{source}: {key} = {first['input']!r}: {first['msg']}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "layers": LayerSection,
    "channels": ChannelSection,
    "batch_norm": BatchNormSection,
    "recovery": RecoverySection,
    "override": Override,
}


# --- the space of one model -----------------------------------------------------------------------------


class Space:
    """The choices that `file` leaves open for `graph`.

    A point is a mapping from parameter name to value: an index for `Ordered`, the value itself otherwise.
    """

    def __init__(
        self, file: SpaceFile, graph: Graph, *, integers: bool = False, branches: bool = True, views: bool = False
    ) -> None:
        """`integers` says whether what ships can run on integer kernels; otherwise activations are floats.

        It is not entropy coded then, so that `entropy` grids give way to symmetric ones of 2 bits or more.

        `branches` says whether a keep ratio of 0 counts: bytes alone are saved by bits and zeros. `views` says whether
        the task has any; without, the teacher sees each input alone.
        """
        self.file, self.graph = file, graph
        self.branches = branches
        self.views: tuple[int, ...] = tuple(sorted(set(file.recovery.views))) if views else (1,)
        self.floats: tuple[str, ...] = ()
        """Layers that keep float kernels among integer ones: where that measures faster."""
        self.activations: tuple[int, ...] = tuple(dict.fromkeys(file.layers.activations)) if integers else (32,)
        schemes = ["symmetric" if integers and s == "entropy" else s for s in file.layers.scheme]
        self.schemes: tuple[Scheme, ...] = tuple(dict.fromkeys(schemes))
        self._whole = integers and "entropy" in file.layers.scheme
        self.bits = {layer.name: self._widths(layer) for layer in graph.layers}
        self.sparsity = {
            layer.name: tuple(sorted(set(self._layer(layer.name, "sparsity")), reverse=True)) for layer in graph.layers
        }
        self.keep = {group.name: self._ratios(group) for group in graph.prunable}
        for override in file.override:
            names = [*self.bits, *self.keep]
            if not fnmatch.filter(names, override.match):
                raise SpaceError(
                    f"override match = {override.match!r} matches no layer and no channel group; "
                    f"names here start with {', '.join(names[:4])}"
                )

    def _widths(self, layer: Layer) -> tuple[float, ...]:
        """Allowed widths in rising order, without those that a wider one undercuts."""
        allowed = self._layer(layer.name, "bits")
        if self._whole:
            allowed = [bits for bits in allowed if bits >= 2 and bits == int(bits)] or [2]
        return _worthwhile(layer, allowed, self.preferred("scheme"))

    def _layer(self, name: str, key: str) -> list[Any]:
        chosen: list[Any] = getattr(self.file.layers, key)
        for override in self.file.override:
            if fnmatch.fnmatchcase(name, override.match) and getattr(override, key) is not None:
                chosen = getattr(override, key)
        return chosen

    def _ratios(self, group: Group) -> tuple[float, ...]:
        """Keep ratios snapped to whole channels, or multiples of them where a convolution makes or reads them.

        0 counts for a group that can be removed, if branches may; another that has no ratio beside it stays whole.
        """
        ratios, channels = self.file.channels.keep, group.channels
        for override in self.file.override:
            if fnmatch.fnmatchcase(group.name, override.match) and override.keep is not None:
                ratios = override.keep
        convolutions = {layer.weight for layer in self.graph.layers if layer.kind.startswith("conv")}
        convolved = any(member.tensor in convolutions for member in group.members)
        step = self.file.channels.multiple_of if convolved else 1
        some = [r for r in ratios if r > 0 or (group.removable and self.branches)] or [1.0]
        wide = {1.0: channels, 0.0: 0}
        counts = {wide.get(r, min(channels, max(step, round(r * channels / step) * step))) for r in some}
        return tuple(sorted(count / channels for count in counts))

    @cached_property
    def policy_parameters(self) -> tuple[Parameter, ...]:
        """Open choices about the compressed model itself, in network order."""
        found: list[Parameter] = []
        for layer in self.graph.layers:
            found.append(Ordered(f"bits/{layer.name}", self.bits[layer.name]))
            found.append(Ordered(f"sparsity/{layer.name}", self.sparsity[layer.name]))
        found += [Ordered(f"keep/{name}", ratios) for name, ratios in self.keep.items()]
        found.append(Categorical("scheme", self.schemes))
        found.append(Categorical("solver", _distinct(self.file.layers.solver)))
        if any(len(ratios) > 1 for ratios in self.keep.values()):
            found.append(Categorical("criterion", _distinct(self.file.channels.criterion)))
        found.append(Categorical("activations", self.activations))
        found.append(Categorical("batch_norm/reestimate", _distinct(self.file.batch_norm.reestimate)))
        found.append(Categorical("batch_norm/fold", _distinct(self.file.batch_norm.fold)))
        return tuple(p for p in found if not isinstance(p, Real) and len(p.values) > 1)

    @cached_property
    def recovery_parameters(self) -> tuple[Parameter, ...]:
        """Open choices about recovery training."""
        r = self.file.recovery
        found: list[Parameter] = [
            Real("recovery/lr", r.lr[0], r.lr[1], log=True),
            Categorical("recovery/decay", _distinct(r.decay)),
            Real("recovery/decay_rate", r.decay_rate[0], r.decay_rate[1], log=True),
            Ordered("recovery/adjust_factor", tuple(sorted(set(r.adjust_factor)))),
            Ordered("recovery/adjust_patience", tuple(sorted(set(r.adjust_patience)))),
            Ordered("recovery/adjust_cooldown", tuple(sorted(set(r.adjust_cooldown)))),
            Real("recovery/distill_weight", r.distill_weight[0], r.distill_weight[1]),
            Real("recovery/temperature", r.temperature[0], r.temperature[1], log=True),
            Real("recovery/hint_weight", r.hint_weight[0], r.hint_weight[1]),
            Categorical("recovery/gradient", _distinct(r.gradient)),
            Real("recovery/warmup", r.warmup[0], r.warmup[1]),
            Categorical("recovery/scales", _distinct(r.scales)),
            Categorical("recovery/ema", _distinct(r.ema)),
            Categorical("recovery/optimizer", _distinct(self.optimizers)),
            Ordered("recovery/views", self.views),
        ]
        return tuple(p for p in found if (p.low < p.high if isinstance(p, Real) else len(p.values) > 1))

    @cached_property
    def optimizers(self) -> Sequence[Optimizer]:
        """What recovery may train with, unless the file says: AdamW where norms are layer norms, as in transformers.

        Elsewhere SGD, or, where learning rates are searched, that or Muon.
        """
        given = self.file.recovery
        if given.optimizer:
            return given.optimizer
        tensors = self.graph.tensors
        batch_norms = any(name.endswith(".running_mean") for name in tensors)
        others = any(len(shape) == 1 and name.endswith(".weight") for name, (shape, _) in tensors.items())
        if others and not batch_norms:
            return ["adam"]
        return ["sgd", "muon"] if given.lr[0] < given.lr[1] else ["sgd"]

    def decode(self, point: Mapping[str, Value], epochs: int = 0) -> Policy:
        """The policy at `point`; parameters that are absent take the largest (densest) or first choice."""
        layers = {}
        scheme = point.get("scheme", self.schemes[0])
        for name in self.bits:
            bits = _at(self.bits[name], point, f"bits/{name}")
            zeros = _at(self.sparsity[name], point, f"sparsity/{name}")
            layers[name] = _choice(bits, zeros, scheme)
        keep = {name: _at(ratios, point, f"keep/{name}") for name, ratios in self.keep.items()}
        criterion = point.get("criterion", self.file.channels.criterion[0])
        solver = point.get("solver", self.file.layers.solver[0])
        width = point.get("activations", self.activations[0])
        ways = criterion, self._recovery(point, epochs), solver, width, self.floats
        return Policy(layers, keep, *ways)  # type: ignore[arg-type]

    def _recovery(self, point: Mapping[str, Value], epochs: int) -> Recovery:
        bn: dict[str, Any] = {
            "reestimate_bn": point.get("batch_norm/reestimate", self.file.batch_norm.reestimate[0]),
            "fold_bn": point.get("batch_norm/fold", self.file.batch_norm.fold[0]),
        }
        if epochs == 0:
            return Recovery(**bn)
        r = self.file.recovery
        given: dict[str, Any] = {
            "lr": r.lr[0],
            "decay": r.decay[0],
            "decay_rate": r.decay_rate[0],
            "adjust_factor": max(r.adjust_factor),
            "adjust_patience": max(r.adjust_patience),
            "adjust_cooldown": max(r.adjust_cooldown),
            "distill_weight": r.distill_weight[0],
            "temperature": r.temperature[0],
            "hint_weight": r.hint_weight[0],
            "gradient": r.gradient[0],
            "warmup": r.warmup[0],
            "scales": r.scales[0],
            "ema": r.ema[0],
            "optimizer": self.optimizers[0],
            "views": max(self.views),
        }
        for parameter in self.recovery_parameters:
            if parameter.name in point:
                value = point[parameter.name]
                chosen = parameter.values[int(value)] if isinstance(parameter, Ordered) else value
                given[parameter.name.removeprefix("recovery/")] = chosen
        return Recovery(epochs=epochs, **given, **bn)

    def encode(self, policy: Policy) -> dict[str, Value]:
        """The point at which `decode` gives `policy` (its recovery parameters only if it trains)."""
        self.graph.check(policy)
        schemes = {choice.scheme for choice in policy.layers.values()}
        known: dict[str, Any] = {
            "scheme": next(iter(schemes), "symmetric"),
            "criterion": policy.criterion,
            "solver": policy.solver,
            "activations": policy.activations,
            "batch_norm/reestimate": policy.recovery.reestimate_bn,
            "batch_norm/fold": policy.recovery.fold_bn,
        }
        for layer, choice in self.graph.choices(policy):
            known |= {f"bits/{layer.name}": choice.bits, f"sparsity/{layer.name}": choice.sparsity}
        known |= {f"keep/{name}": policy.keep.get(name, 1.0) for name in self.keep}
        parameters = self.policy_parameters
        if policy.recovery.epochs:
            parameters += self.recovery_parameters
            known |= {
                p.name: getattr(policy.recovery, p.name.removeprefix("recovery/")) for p in self.recovery_parameters
            }
        return {p.name: _index(p, known[p.name]) if isinstance(p, Ordered) else known[p.name] for p in parameters}

    def preferred(self, name: str) -> Any:
        """What to take for a choice without an order until something speaks against it."""
        if name == "activations":
            return min(self.activations)
        sections = {"solver": self.file.layers, "criterion": self.file.channels}
        section = sections.get(name, self.file.batch_norm)
        allowed: Sequence[Any] = (
            self.schemes if name == "scheme" else getattr(section, name.removeprefix("batch_norm/"))
        )
        # fewer bytes for the same error; fewer errors, twice; repaired norms
        best = {"scheme": ("entropy", "symmetric"), "solver": ("database",), "criterion": ("reconstruction",)}
        return next((value for value in best.get(name, (True,)) if value in allowed), allowed[0])

    def only(self, layers: Mapping[str, LayerChoice], keep: Mapping[str, float] | None = None) -> Policy:
        """The dense model with these choices alone; it need not be in the space."""
        recovery = Recovery(
            reestimate_bn=self.preferred("batch_norm/reestimate"), fold_bn=self.preferred("batch_norm/fold")
        )
        ways = self.preferred("criterion"), recovery, self.preferred("solver"), self.preferred("activations")
        return Policy(layers, keep or {}, *ways, self.floats)

    def uniform(self, bits: float = 32, sparsity: float = 0.0, keep: float = 1.0) -> Policy:
        """The same choice everywhere, or in each place the allowed one that is nearest to it."""
        point: dict[str, Value] = {}
        for name in self.bits:
            point[f"bits/{name}"] = _nearest(self.bits[name], bits)
            point[f"sparsity/{name}"] = _nearest(self.sparsity[name], sparsity)
        point |= {f"keep/{name}": _nearest_width(ratios, keep) for name, ratios in self.keep.items()}
        return self.decode(point)

    def smallest(self) -> Policy:
        """The policy with the fewest bytes and multiply-accumulates.

        Narrower is not always smaller: a weight with short rows pays more for scales than it saves on bits.
        """
        # an asymmetric grid stores zero points, and the codes of an entropy one are longer until they are coded
        scheme = min(self.schemes, key=("symmetric", "entropy", "asymmetric").index)
        point: dict[str, Value] = {"scheme": scheme, **{f"keep/{name}": 0 for name in self.keep}}
        shapes = self.graph.shapes(self.decode(point))
        for layer in self.graph.layers:
            bits, zeros = self._cheapest(layer, shapes[layer.weight], scheme)
            point[f"bits/{layer.name}"], point[f"sparsity/{layer.name}"] = bits, zeros
        if True in self.file.batch_norm.fold:
            point["batch_norm/fold"] = True
        if any(p.name == "criterion" for p in self.policy_parameters):  # its name stands in the file
            point["criterion"] = min(self.file.channels.criterion, key=len)
        return self.decode(point)

    def sparsest(self) -> Policy:
        """`smallest` with most zeros and fewest bits in every layer: often shorter once it is entropy coded."""
        smallest = self.smallest()
        layers = {n: replace(c, bits=self.bits[n][0], sparsity=self.sparsity[n][0]) for n, c in smallest.layers.items()}
        return replace(smallest, layers=layers)

    def _cheapest(self, layer: Layer, shape: Shape, scheme: Scheme) -> tuple[int, int]:
        """Indices of the bits and sparsity that store this weight in fewest bytes; the first of equals."""

        def size(pair: tuple[int, int]) -> int:
            choice = LayerChoice(self.bits[layer.name][pair[0]], self.sparsity[layer.name][pair[1]], scheme)
            return section_bytes(layer, shape, choice)

        pairs = [(b, s) for b in range(len(self.bits[layer.name])) for s in range(len(self.sparsity[layer.name]))]
        return min(pairs, key=size)

    def baselines(self) -> Iterator[Policy]:
        """Uniform policies from light to heavy, without repeats: where a person would start."""
        widths = sorted({bits for allowed in self.bits.values() for bits in allowed}, reverse=True)
        zeros = sorted({s for allowed in self.sparsity.values() for s in allowed})
        ratios = sorted({r for allowed in self.keep.values() for r in allowed}, reverse=True)
        candidates = [self.uniform(bits=bits) for bits in widths]
        candidates += [self.uniform(bits=widths[0], sparsity=s) for s in zeros[1:]]
        candidates += [self.uniform(bits=widths[0], keep=r) for r in ratios[1:]]
        candidates.append(self.smallest())
        yield from dict.fromkeys(candidates)

    def shrink(self, policy: Policy, excess: Callable[[Policy], float], seed: int) -> Policy:
        """A neighbour of `policy` that fits: random ordered choices step down until `excess` is 0 or less.

        Where that ends too large, the smallest policy.
        """
        point, draw = self.encode(policy), random.Random(seed)
        movable = [p.name for p in self.policy_parameters if isinstance(p, Ordered) and int(point[p.name]) > 0]
        shrunk = policy
        while (over := excess(shrunk)) > 0 and movable:
            name = draw.choice(movable)
            point[name] = int(point[name]) - 1
            if point[name] == 0:
                movable.remove(name)
            shrunk = self.decode(point, policy.recovery.epochs)
        return shrunk if over <= 0 else self.smallest()

    def with_recovery(self, parent: Policy, point: Mapping[str, Value], epochs: int) -> Policy:
        """`parent` with `epochs` of the recovery training at `point`."""
        return replace(parent, recovery=self._recovery(self.encode(parent) | dict(point), epochs))


@cache
def _choice(bits: float, sparsity: float, scheme: Any) -> LayerChoice:
    """Few differ and each is checked when it is made."""
    return LayerChoice(bits, sparsity, scheme)


def section_bytes(layer: Layer, shape: Shape, choice: LayerChoice) -> int:
    """What a layer's weight takes in the file at most, when channel removal left it `shape`."""
    count = prod(shape)
    return weight_entry(layer.weight, shape, choice, count - choice.zeros(count)).nbytes


def _worthwhile(layer: Layer, bits: Sequence[float], scheme: Scheme) -> tuple[float, ...]:
    """Widths in rising order, without those that a wider one undercuts (short rows pay more for scales than bits)."""
    kept: list[float] = []
    smallest, count = math.inf, prod(layer.shape)
    for width in sorted(set(bits), reverse=True):
        choice = LayerChoice(width, 0.0, scheme)
        coded = (choice.width, math.ceil(width * count / 8)) if choice.entropy else None
        size = weight_entry(layer.weight, layer.shape, choice, count, coded).nbytes
        if size < smallest:
            kept.append(width)
            smallest = size
    return tuple(reversed(kept))


def _at(values: tuple[float, ...], point: Mapping[str, Value], name: str) -> float:
    return values[int(point.get(name, len(values) - 1))]


def _distinct(values: Sequence[Value]) -> tuple[Value, ...]:
    return tuple(dict.fromkeys(values))


def _nearest(values: tuple[float, ...], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


def _nearest_width(ratios: tuple[float, ...], wanted: float) -> int:
    """The nearest ratio; a branch is removed only where that is wanted, or all there is."""
    return max(range(len(ratios)), key=lambda i: (wanted == 0 or ratios[i] > 0, -abs(ratios[i] - wanted)))


def _index(parameter: Ordered, value: float) -> int:
    for i, allowed in enumerate(parameter.values):
        if abs(allowed - value) < 1e-9:
            return i
    raise SpaceError(f"{parameter.name} = {value:g} is not in the search space: {list(parameter.values)}")
