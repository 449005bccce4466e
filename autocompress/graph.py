"""A model as plain data: compressible layers, coupling groups, shapes and multiply-accumulates.

Answers "how large is it under this policy" by arithmetic alone. Knows nothing about tensors or choices;
`trace.py` builds it from a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from autocompress.errors import PolicyError
from autocompress.policy import LayerChoice, Policy

Shape = tuple[int, ...]


PARAMETERS = ("recurrent", "attention")
"""Kinds of layers that are parameters of a module with more of them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One compressible weight: of a Conv1d/2d/3d, Linear or Embedding, or a matrix of a recurrent or attention module.

    A recurrent module (GRU, LSTM, RNN or a cell) holds several matrices, and so does `nn.MultiheadAttention`. Each is a
    layer of the kind `recurrent` or `attention`, named as its parameter; all other layers are named as their module.
    `shape` is the weight's, output channels first; the rows of its `groups` parts, equally many each, meet inputs of
    their own. `positions` is how often the weight is applied for one input (output pixels, steps; 0 for an embedding,
    which multiplies nothing). `batch_norm` names the module that normalises this layer's output and nothing else, so
    that it can be folded into the weight.
    """

    name: str
    kind: str
    shape: Shape
    groups: int = 1
    positions: int = 1
    has_bias: bool = False
    batch_norm: str | None = None

    @property
    def module(self) -> str:
        """The name of the module that holds the weight."""
        return self.name.rpartition(".")[0] if self.kind in PARAMETERS else self.name

    @property
    def weight(self) -> str:
        """The weight's name in the state dict."""
        if self.kind in PARAMETERS:
            return self.name
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def is_affine(self) -> bool:
        """Whether its module does nothing but multiply the weight with its inputs and add a bias."""
        return self.kind not in ("embedding", *PARAMETERS)

    @property
    def bias(self) -> str:
        """The bias's name in the state dict; it exists if `has_bias`, or after folding."""
        return f"{self.name}.bias" if self.name else "bias"


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor dimension that a group's channels run along.

    Channel c of the group owns the indices in the c-th tuple of `index` along `dim` (several for a flattened map).
    `reads` is set for the weights that take these channels in.
    """

    tensor: str
    dim: int
    index: tuple[tuple[int, ...], ...]
    reads: bool = False

    @property
    def per_channel(self) -> int:
        return len(self.index[0])


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that can only be removed together (DepGraph, arXiv 2301.12900, section 3).

    `frozen` is empty, or says why removing channels here would break the model. `removable` says whether all of them
    can go: what reads them reads nothing else and gives a constant then, and the outputs still depend on the inputs.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    frozen: str = ""
    removable: bool = False

    @property
    def producers(self) -> tuple[Member, ...]:
        """Weights whose output channels these are."""
        return tuple(m for m in self.members if not m.reads and m.tensor.endswith(".weight"))

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Weights that read these channels."""
        return tuple(m for m in self.members if m.reads)


@dataclass(frozen=True)
class Graph:
    """`tensors` maps every state-dict name that an artifact must hold to shape and dtype name.

    The dtype `exact` stands for floats that 16 bits cannot hold (infinities in a mask, say).
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    tensors: Mapping[str, tuple[Shape, str]]
    dense_bytes: int
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def prunable(self) -> tuple[Group, ...]:
        """Groups from which channels can be removed."""
        return tuple(group for group in self.groups if not group.frozen)

    @cached_property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the compressible layers for one input."""
        return self.macs(Policy())

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal architectures; guards runs and artifacts against another model."""
        text = repr((self.layers, self.groups, sorted(self.tensors.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def shapes_fingerprint(self) -> str:
        """Equal for models whose dense tensors have equal names and shapes; what an artifact is matched by."""
        return tensors_fingerprint(self.tensors)

    def check(self, policy: Policy) -> None:
        """Raise `PolicyError` if `policy` names a layer or group that is not here, or prunes what must stay."""
        layers, groups = {layer.name for layer in self.layers}, {group.name: group for group in self.groups}
        for name in (*policy.layers, *policy.floats):
            if name not in layers:
                raise PolicyError(f"the policy names layer {name!r}, which this model does not have")
        for name, ratio in policy.keep.items():
            if name not in groups:
                raise PolicyError(f"the policy names channel group {name!r}, which this model does not have")
            if groups[name].frozen and ratio < 1:
                raise PolicyError(f"channel group {name!r} cannot be pruned: {groups[name].frozen}")
            if ratio == 0 and not groups[name].removable:
                raise PolicyError(
                    f"channel group {name!r} cannot be removed: its readers read others too, or the outputs would "
                    "no longer depend on the inputs; keep more than 0"
                )

    def kept(self, policy: Policy) -> dict[str, int]:
        """Channels that stay per prunable group: at least one each, or none where the ratio is 0."""
        ratios = {g.name: policy.keep.get(g.name, 1.0) for g in self.prunable}
        return {g.name: max(1, round(g.channels * ratios[g.name])) if ratios[g.name] else 0 for g in self.prunable}

    def shapes(self, policy: Policy) -> dict[str, Shape]:
        """Shape of every tensor after channel removal, before batch norms are folded."""
        shapes = {name: list(shape) for name, (shape, _) in self.tensors.items()}
        kept = self.kept(policy)
        for group in self.prunable:
            for member in group.members:
                shapes[member.tensor][member.dim] -= (group.channels - kept[group.name]) * member.per_channel
        return {name: tuple(shape) for name, shape in shapes.items()}

    def folded(self, policy: Policy) -> dict[str, Layer]:
        """Batch norms that disappear into the layer before them, with that layer."""
        if not policy.recovery.fold_bn:
            return {}
        return {layer.batch_norm: layer for layer in self.layers if layer.batch_norm}

    def contents(self, policy: Policy) -> dict[str, Shape]:
        """Names and shapes of all that an artifact holds, in the file's order: folded norms leave a bias."""
        shapes, folded = self.shapes(policy), self.folded(policy)
        by_weight = {layer.weight: layer for layer in folded.values()}
        result: dict[str, Shape] = {}
        for name, shape in shapes.items():
            if name.rpartition(".")[0] in folded:
                continue
            result.setdefault(name, shape)
            if name in by_weight:
                result[by_weight[name].bias] = shape[:1]
        return result

    @cached_property
    def biases(self) -> dict[str, str]:
        """Names of the weights that have a bias, or will once norms are folded, with the bias's."""
        found = {}
        for layer in self.layers:
            owner, _, key = layer.weight.rpartition(".")
            name = f"{owner}.{key.replace('weight', 'bias', 1)}".lstrip(".")  # weight_hh_l0 has bias_hh_l0
            if name in self.tensors or layer.batch_norm:
                found[layer.weight] = name
        return found

    def small_floats(self, policy: Policy) -> set[str]:
        """Names of the weights whose scales take 8 bits in the file, and of the biases that do."""
        small = {layer.weight for layer, choice in self.choices(policy) if choice.small_floats}
        return small | {bias for weight, bias in self.biases.items() if weight in small}

    def macs(self, policy: Policy) -> int:
        """Multiply-accumulates for one input after channel removal; zeros and bits do not count."""
        shapes = self.shapes(policy)
        return sum(layer.positions * prod(shapes[layer.weight]) for layer in self.layers)

    def architecture(self, policy: Policy) -> tuple[object, ...]:
        """Equal for policies that give the same tensor shapes, and so the same dense-kernel latency."""
        return (*sorted(self.kept(policy).items()), policy.recovery.fold_bn)

    def choices(self, policy: Policy) -> Iterator[tuple[Layer, LayerChoice]]:
        """Each layer with what the policy says of it."""
        for layer in self.layers:
            yield layer, policy.choice(layer.name)


def tensors_fingerprint(tensors: Mapping[str, tuple[Shape, str]]) -> str:
    """16 hexadecimal digits that stand for names and shapes."""
    text = repr(sorted((name, tuple(shape)) for name, (shape, _) in tensors.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
