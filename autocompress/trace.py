"""From a model and one batch to a `Graph`: what can be compressed, what belongs together, what must stay.

Coupling groups come from Torch-Pruning's dependency graph. Each is then tried: channels are removed from a
copy and the outputs compared with the dense model whose readers of those channels were silenced. A group that
fails is frozen with the reason, so that no later stage can break the model. Those that can go as a whole are marked.
Chooses nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch_pruning
from torch import Tensor, nn

from autocompress.attention import PROJECTIONS, inputs_of
from autocompress.errors import TaskError
from autocompress.graph import Graph, Group, Layer, Member
from autocompress.opaque import RECURRENT, opaque
from autocompress.precise import Doubles
from autocompress.surgery import fold_scale, foreign_state, heads, lent, shadow, tensors_of, without
from autocompress.task import call, few, first_input, length, mapped, tensors

COMPRESSIBLE: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}
_KINDS: tuple[type[nn.Module], ...] = tuple(COMPRESSIBLE)
_ROOTS = (torch_pruning.ops.TORCH_CONV, torch_pruning.ops.TORCH_LINEAR)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PER_CHANNEL = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MOST_ALONE = 4
"""Examples that are run one by one, to see whether each takes the same way through the model."""
_VARIES = 1e-8  # of an output's power: with less, rounding takes part
_TOLERANCE = 1e-3  # of the output's power; float32 noise is about 1e-6, a wrong channel about 1


def trace(model: nn.Module, inputs: Any, examples: int = 4) -> Graph:
    """The graph of `model` (in evaluation mode) on the first `examples` of a batch's `inputs`.

    Holds a few of the model's tensors beside it, never a second model, as far as `Doubles` bears the model.
    Raises `TaskError` if nothing in the model can be compressed.
    """
    model = shadow(model).eval()
    inputs = few(model, inputs, examples)
    calls = _observe(model, inputs)
    layers = _layers(model, calls, length(inputs))
    if not layers:
        raise TaskError(
            "the model has no weight of a Conv1d/2d/3d, Linear, Embedding, recurrent or attention layer, so there is "
            "nothing to compress"
        )
    subject = _subject(model, inputs)
    layers = _verified_folds(subject, layers)
    groups, notes = _groups(model, inputs, subject, calls)
    left = (*_computed_weights(model), *_other_weights(model, layers), *_foreign_weights(model))
    return Graph(layers, groups, tensors_of(model), _dense_bytes(model), (*left, *notes))


# --- trials ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Subject:
    """A model to try things on: `values` take the place of its tensors for one run."""

    model: nn.Module
    inputs: Any
    lean: bool
    """Whether every operation computes in double precision on the fly; if not, as the model's tensors are."""

    def outputs(self, values: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        with torch.no_grad(), lent(self.model, values or {}), Doubles() if self.lean else nullcontext():
            return [t.double() for t in tensors(call(self.model, self.inputs))]

    @cached_property
    def dense(self) -> list[Tensor]:
        """Outputs of the model as it is."""
        return self.outputs()

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """The model's tensors themselves."""
        return self.model.state_dict()


def _subject(model: nn.Module, inputs: Any) -> _Subject:
    """`model` in double precision, where a wrong channel cannot hide in rounding; as given if it does not bear that."""
    wide = mapped(inputs, lambda t: t.double() if t.is_floating_point() else t)
    lean = _Subject(model, wide, lean=True)
    if _runs(lean):
        return lean
    whole = _Subject(copy.deepcopy(model).double(), wide, lean=False)
    return whole if _runs(whole) else _Subject(model, inputs, lean=False)


def _runs(subject: _Subject) -> bool:
    try:
        subject.dense  # noqa: B018 - computed here
    except Exception:  # the model's code insists on its own precision
        return False
    return True


Item = TypeVar("Item")


def _passing(items: Sequence[Item], passes: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """The items that pass: all at once if they do together, else those of either half."""
    if not items or passes(items):
        return list(items)
    middle = len(items) // 2
    return [*_passing(items[:middle], passes), *_passing(items[middle:], passes)] if middle else []


# --- layers ---------------------------------------------------------------------------------------------


def _compressible(model: nn.Module) -> list[tuple[str, str]]:
    """Modules and names of their compressible weights, each shared weight once."""
    found: dict[int, tuple[str, str]] = {}
    for name, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None and key in _weights(module):
                found.setdefault(id(value), (name, key))
    return list(found.values())


def _weights(module: nn.Module) -> list[str]:
    """Names of the weights that a module of its kind has and that are compressed."""
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(module, nn.MultiheadAttention):
        return list(PROJECTIONS)
    return ["weight"] if isinstance(module, _KINDS) else []


def _computed_weights(model: nn.Module) -> list[str]:
    """Notes about layers whose weight is the result of a computation (weight norm, say)."""
    return [
        f"{name} is left as it is: its {key} is computed by a parametrization; remove that to compress the layer"
        for name, module in model.named_modules()
        for key in _weights(module)
        if key not in module._parameters
    ]


def _other_weights(model: nn.Module, layers: tuple[Layer, ...]) -> list[str]:
    """Notes about matrices of other layers (transposed convolutions, say), which stay at 16 bits."""
    known = {id(model.get_parameter(layer.weight)) for layer in layers}
    total = sum(p.numel() for p in model.parameters())
    notes = []
    for name, p in model.named_parameters():
        if p.ndim >= 2 and id(p) not in known and "parametrizations" not in name:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            notes.append(f"{name} stays at 16 bits ({p.numel() / total:.1%} of the weights): {kind} is not compressed")
    return notes


def _foreign_weights(model: nn.Module) -> list[str]:
    """Notes about modules with a state of their own kind (dynamically quantised layers), which no file can hold."""
    owners = dict.fromkeys(name.rpartition(".")[0].removesuffix("._packed_params") for name in foreign_state(model))
    kinds = {owner: type(model.get_submodule(owner)).__name__ for owner in owners}
    return [
        f"{owner or 'the model'} stays as it is: {kind} has no parameters, so its weights are not in the file and come "
        "from the task's model"
        for owner, kind in kinds.items()
    ]


class _Calls:
    """What one forward pass showed: how often each module and its weights were used, whose output fed which norm."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.applied: Counter[str] = Counter()
        self.normalised_by: dict[str, list[str]] = {}
        self.crossed: set[str] = set()
        """Attention whose queries, keys and values are not the same."""


def _observe(model: nn.Module, inputs: Any) -> _Calls:
    calls, handles = _Calls(), []
    made_by: dict[int, str] = {}
    keep_alive: list[Tensor] = []  # an id() names a tensor only while it lives

    def hook(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def record(module: nn.Module, given: Any, named: Any, output: Any) -> None:
            calls.count[name] += 1
            source = made_by.get(id(first_input(given, named)))
            if isinstance(module, BATCH_NORMS) and source is not None:
                calls.normalised_by.setdefault(source, []).append(name)
            if isinstance(module, _KINDS) and isinstance(output, Tensor):
                made_by[id(output)] = name
                keep_alive.append(output)
                rows = len(module.weight)  # type: ignore[arg-type]
                calls.applied[name] += 0 if isinstance(module, nn.Embedding) else output.numel() // rows
            elif isinstance(module, RECURRENT):
                calls.applied[name] += tensors(given or named["input"])[0].numel() // module.input_size
            elif isinstance(module, nn.MultiheadAttention):
                met = inputs_of(given, named)
                positions = [x.numel() // x.shape[-1] for x in met]
                calls.applied[name] += sum(positions) // 3
                calls.applied[f"{name}.out_proj".lstrip(".")] += positions[0]
                if not met[0] is met[1] is met[2]:
                    calls.crossed.add(name)

        return record

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _layers(model: nn.Module, calls: _Calls, examples: int) -> tuple[Layer, ...]:
    applied = Counter[int]()  # how often each weight was multiplied, over all modules that share it
    for name, module in model.named_modules():
        for value in module._parameters.values():
            applied[id(value)] += calls.applied[name]
    return tuple(
        _layer(name, key, model, calls, applied[id(model.get_submodule(name)._parameters[key])] // max(1, examples))
        for name, key in _compressible(model)
    )


def _layer(name: str, key: str, model: nn.Module, calls: _Calls, positions: int) -> Layer:
    module = model.get_submodule(name)
    weight = module._parameters[key]
    assert weight is not None
    shape = tuple(weight.shape)
    if isinstance(module, RECURRENT):
        return Layer(f"{name}.{key}" if name else key, "recurrent", shape, positions=positions)
    if isinstance(module, nn.MultiheadAttention):
        parts = 3 if key == "in_proj_weight" and name in calls.crossed else 1
        return Layer(f"{name}.{key}" if name else key, "attention", shape, parts, positions)
    owner, _, own = name.rpartition(".")
    if own == "out_proj" and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
        return Layer(f"{name}.{key}", "attention", shape, positions=positions)  # it reads the weight, calls no module
    kind = next(kind for cls, kind in COMPRESSIBLE.items() if isinstance(module, cls))
    norms = calls.normalised_by.get(name, [])
    alone = kind != "embedding" and len(norms) == 1 and calls.count[name] == calls.count[norms[0]] == 1
    if alone and getattr(model.get_submodule(norms[0]), "num_features", None) != shape[0]:
        alone = False
    return Layer(
        name,
        kind,
        shape,
        getattr(module, "groups", 1),
        positions,
        getattr(module, "bias", None) is not None,
        norms[0] if alone else None,
    )


def _verified_folds(subject: _Subject, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Drop each batch norm whose folding changes the outputs: its layer's output is used elsewhere too."""
    shared = Counter(layer.batch_norm for layer in layers)
    layers = tuple(replace(x, batch_norm=x.batch_norm if shared[x.batch_norm] == 1 else None) for x in layers)
    candidates = [layer for layer in layers if layer.batch_norm]
    good = {layer.name for layer in _passing(candidates, lambda some: _fold_is_exact(subject, some))}
    return tuple(layer if layer.name in good else replace(layer, batch_norm=None) for layer in layers)


def _fold_is_exact(subject: _Subject, layers: Sequence[Layer]) -> bool:
    folded, state = shadow(subject.model), subject.state
    values: dict[str, Tensor] = {}
    for layer in layers:
        assert layer.batch_norm is not None
        norm = folded.get_submodule(layer.batch_norm)
        if not getattr(norm, "track_running_stats", False):
            return False
        scale, bias = fold_scale(state, layer, norm.eps)  # type: ignore[arg-type]
        weight = state[layer.weight] * scale.reshape(-1, *[1] * (len(layer.shape) - 1))
        values |= {layer.weight: weight, layer.bias: bias}
    without(folded, [layer.batch_norm for layer in layers if layer.batch_norm])
    try:
        return _distance(replace(subject, model=folded).outputs(values), subject.dense) < _TOLERANCE
    except Exception:  # the model asks its norm for more than a call
        return False


# --- coupling groups ------------------------------------------------------------------------------------


def _groups(
    model: nn.Module, inputs: Any, subject: _Subject, calls: _Calls
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """All channel groups, frozen ones included, and notes about what could not be traced."""
    if _looks_at_data(model, inputs, calls):
        return (), ("no channels can be pruned: which modules run depends on the inputs, so none shows them all",)
    names = {id(module): name for name, module in model.named_modules()}
    try:
        traced, nodes = _dependency_groups(model, inputs)
        groups = [_describe(group, names) for group in traced]
    except Exception as error:  # any model may be beyond the tracer; compression of weights still works
        first = str(error).splitlines()[0] if str(error) else ""
        return (), (f"no channels can be pruned: the dependency tracer failed ({type(error).__name__}: {first})",)
    if not groups:
        return (), ("no channels can be pruned: the outputs are detached from the weights, so nothing can be traced",)
    groups = _without_conflicts(groups, model, calls)
    groups = _tried(subject, groups)
    going = _removable(subject, [g for g in groups if not g.frozen and _may_go(g, subject, nodes)])
    return tuple(replace(group, removable=group.name in going) for group in groups), ()


def _looks_at_data(model: nn.Module, inputs: Any, calls: _Calls) -> bool:
    """Whether some example alone runs other modules than all of them together do."""
    for i in range(min(length(inputs), MOST_ALONE)):
        try:
            found = _observe(model, _example(inputs, i))
        except Exception:  # not every model takes a lone example
            return False
        if set(found.count) != set(calls.count):
            return True
    return False


def _example(inputs: Any, i: int) -> Any:
    """Example `i` of `inputs`, as a batch of its own."""
    count = length(inputs)
    return mapped(inputs, lambda t: t[i : i + 1] if t.ndim and len(t) == count else t)


def _dependency_groups(model: nn.Module, inputs: Any) -> tuple[list[Any], list[Any]]:
    """Torch-Pruning's groups, rooted at the layers that produce channels, and the nodes of its graph."""
    positional = (
        inputs if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    )
    trained = [p for p in model.parameters() if not p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(True)  # the tracer follows autograd
    try:
        with warnings.catch_warnings(), torch.enable_grad(), opaque(model) as recurrent:
            warnings.simplefilter("ignore")
            if not any(output.requires_grad for output in tensors(call(model, inputs))):
                return [], []
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(
                model,
                positional,
                output_transform=tensors,
                customized_pruners=dict.fromkeys(recurrent, _Untouched()),
                verbose=False,
            )
            roots = [*_ROOTS, *recurrent]
            return list(graph.get_all_groups(root_module_types=roots)), list(graph.module2node.values())
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)


class _Untouched(torch_pruning.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """What the tracer asks of a recurrent module: how many channels go in and come out. None is ever removed."""

    def get_in_channels(self, layer: Any) -> int:
        return int(layer.input_size)

    def get_out_channels(self, layer: Any) -> int:
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        return int(getattr(layer, "proj_size", 0) or layer.hidden_size) * directions

    def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:  # noqa: ARG002
        return layer

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:  # noqa: ARG002
        return layer


def _describe(group: Any, names: dict[int, str]) -> Group:
    """A Torch-Pruning group as plain data."""
    root = group[0].dep.target.module
    channels = len(group[0].idxs)
    members: dict[tuple[str, int], Member] = {}
    reason = ""
    for item in group.items:
        module, is_input = item.dep.target.module, "in_channels" in item.dep.handler.__name__
        if isinstance(module, nn.Parameter):
            reason = reason or "its channels run along a bare parameter"
            continue
        if id(module) not in names:  # an operation without weights
            continue
        if isinstance(module, RECURRENT):
            reason = "recurrent units are not pruned"
            continue
        index: list[list[int]] = [[] for _ in range(channels)]
        for own, at_root in zip(item.idxs, item.root_idxs, strict=True):
            index[at_root].append(own)
        if len({len(c) for c in index}) != 1 or not index[0]:
            reason = reason or f"its channels map unevenly onto {names[id(module)]}"
            continue
        for tensor, dim in _dimensions(names[id(module)], module, is_input):
            reads = dim == 1 and not isinstance(module, nn.Embedding)
            members[tensor, dim] = Member(tensor, dim, tuple(tuple(sorted(c)) for c in index), reads)
        if not _dimensions(names[id(module)], module, is_input):
            reason = reason or f"it passes through {names[id(module)]} ({type(module).__name__})"
    return Group(names[id(root)], channels, tuple(members.values()), reason)


def _dimensions(name: str, module: nn.Module, is_input: bool) -> list[tuple[str, int]]:
    """Tensors of `module` that shrink with the group's channels; empty if this kind is not handled."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1 and (module.groups != module.in_channels or module.out_channels != module.in_channels):
            return []
        own = [(f"{name}.weight", 1)] if is_input and module.groups == 1 else [(f"{name}.weight", 0)]
    elif isinstance(module, nn.Linear):
        own = [(f"{name}.weight", 1 if is_input else 0)]
    elif isinstance(module, nn.Embedding):
        own = [(f"{name}.weight", 1)]
    elif isinstance(module, _PER_CHANNEL):
        return [(f"{name}.{key}", 0) for key, value in module.state_dict().items() if value.ndim == 1]
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return [(f"{name}.weight", 0)]
    else:
        return []
    if own[0][1] == 0 and getattr(module, "bias", None) is not None:
        own.append((f"{name}.bias", 0))
    return own


def _without_conflicts(groups: Sequence[Group], model: nn.Module, calls: _Calls) -> list[Group]:
    """The groups, frozen where that shows without running the model."""
    owners = Counter((m.tensor, m.dim, i) for g in groups for m in g.members for c in m.index for i in c)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tensors_ = model.state_dict(keep_vars=True)
    shared = {name for name, value in tensors_.items() if isinstance(value, nn.Parameter) and uses[id(value)] > 1}
    sizes = {name: value.shape for name, value in tensors_.items() if isinstance(value, Tensor)}
    return [replace(g, frozen=g.frozen or _conflict(g, sizes, shared, calls, owners)) for g in groups]


def _conflict(
    group: Group,
    sizes: Mapping[str, torch.Size],
    shared: set[str],
    calls: _Calls,
    owners: Counter[tuple[str, int, int]],
) -> str:
    """Why `group` cannot be pruned. `sizes` of all tensors, which are `shared`, how many groups each channel has."""
    if group.channels < 2:
        return "it has a single channel"
    if not group.consumers:
        return "no layer reads its channels: they are the model's output"
    for member in group.members:
        if member.tensor not in sizes:
            return f"{member.tensor} is computed, not stored"
        owner = member.tensor.rpartition(".")[0]
        if max(i for c in member.index for i in c) >= sizes[member.tensor][member.dim]:
            return f"its channels do not map onto {member.tensor}"
        if member.tensor in shared:
            return f"{member.tensor} is shared with another layer"
        if calls.count[owner] > 1:
            return f"{owner} is used {calls.count[owner]} times in one forward pass"
        if any(owners[member.tensor, member.dim, i] > 1 for c in member.index for i in c):
            return f"{member.tensor} also belongs to another group along the same channels"
    return ""


def _tried(subject: _Subject, groups: Sequence[Group]) -> list[Group]:
    """The groups with why they cannot be pruned, after trying; an attention's heads go whole, if they can."""
    whole = [_in_heads(group, subject.model) for group in groups]
    reasons = _reasons(subject, [group for group in whole if not group.frozen])
    again = [g for g, w in zip(groups, whole, strict=True) if g is not w and reasons.get(g.name)]
    reasons |= _reasons(subject, again)
    found = [group if group in again else other for group, other in zip(groups, whole, strict=True)]
    return [replace(group, frozen=group.frozen or reasons.get(group.name, "")) for group in found]


def _in_heads(group: Group, model: nn.Module) -> Group:
    """The group with heads in place of channels, if it holds the projections of one attention; else as it is."""
    owners = {member.tensor.rpartition(".")[0] for member in group.producers}
    parents = {owner.rpartition(".")[0] for owner in owners}
    count = heads(model.get_submodule(parents.pop())) if len(parents) == 1 and len(owners) > 1 else 0
    if group.frozen or count < 2 or group.channels % count:
        return group
    size = group.channels // count
    members = [
        replace(
            m,
            index=tuple(tuple(i for c in m.index[at : at + size] for i in c) for at in range(0, group.channels, size)),
        )
        for m in group.members
    ]
    return replace(group, channels=count, members=tuple(members))


def _reasons(subject: _Subject, groups: Sequence[Group]) -> dict[str, str]:
    """Why groups cannot be pruned, by name, after trying.

    All at once first: a model of hundreds of layers runs a few times then, in place of twice for each.
    """
    reasons: dict[str, str] = {}

    def passes(some: Sequence[Group]) -> bool:
        if len(some) > 1:
            return _together(subject, some)
        reasons[some[0].name] = _trial(subject, some[0])
        return not reasons[some[0].name]

    _passing(groups, passes)
    return reasons


def _together(subject: _Subject, groups: Sequence[Group]) -> bool:
    """Whether removing a few channels of each group at once equals the dense model with all of those unread.

    Each group loses other channels, and another number of them: groups that are coupled unknown to the tracer do not
    agree by chance then. Of no use where the outputs are all but constant without these channels.
    """
    generator = torch.Generator().manual_seed(len(groups))
    for _ in range(1 if min(group.channels for group in groups) >= 16 else 3):
        dropped = [_some(group.channels, generator) for group in groups]
        expected = subject.outputs(_silenced(subject.state, groups, dropped))
        if not _vary(expected, subject.dense) or _removed(subject, groups, dropped, expected):
            return False
    return True


def _some(channels: int, generator: torch.Generator) -> Tensor:
    """One to an eighth of the channels."""
    count = int(torch.randint(1, max(2, channels // 8 + 1), (), generator=generator))
    return torch.randperm(channels, generator=generator)[:count]


def _vary(outputs: Sequence[Tensor], dense: Sequence[Tensor]) -> bool:
    """Whether each output still tells the examples apart well above rounding, if the dense one does."""

    def share(values: Sequence[Tensor]) -> list[float]:
        return [
            a / max(float(torch.nan_to_num(y).norm()), 1e-300) for a, y in zip(_spreads(values), values, strict=True)
        ]

    return all(a > _VARIES for a, b in zip(share(outputs), share(dense), strict=True) if b > _VARIES)


def _trial(subject: _Subject, group: Group) -> str:
    """Remove half of the channels at random; empty if that equals the dense model with those channels unread.

    Small groups are tried several times: a random half of few channels can respect a coupling by chance.
    """
    generator = torch.Generator().manual_seed(group.channels)
    for _ in range(1 if group.channels >= 16 else 3):
        dropped = torch.randperm(group.channels, generator=generator)[: group.channels // 2]
        reason = _removed(subject, [group], [dropped])
        if reason:
            return reason
    return ""


# --- groups that can go as a whole ----------------------------------------------------------------------


def _may_go(group: Group, subject: _Subject, nodes: Sequence[Any]) -> bool:
    """Whether the group's readers read nothing else, and a path around them leads through the model.

    `nodes` are Torch-Pruning's. Where all paths go through the readers the outputs would be constant.
    """
    owners = [subject.model.get_submodule(m.tensor.rpartition(".")[0]) for m in group.members]
    if any(isinstance(owner, nn.Embedding) for owner in owners):
        return False
    if any(sum(map(len, m.index)) != subject.state[m.tensor].shape[1] for m in group.consumers):
        return False
    readers = {id(subject.model.get_submodule(m.tensor.rpartition(".")[0])) for m in group.consumers}
    return _leads_through(nodes, readers)


def _leads_through(nodes: Sequence[Any], closed: set[int]) -> bool:
    """Whether a path from the model's inputs to its outputs avoids the modules with `closed` ids."""
    waiting = [node for node in nodes if id(node.module) not in closed and _reads_inputs(node)]
    seen = {id(node) for node in waiting}
    while waiting:
        node = waiting.pop()
        if not node.outputs:
            return True
        following = [n for n in node.outputs if id(n) not in seen and id(n.module) not in closed]
        seen |= {id(n) for n in following}
        waiting += following
    return False


def _reads_inputs(node: Any) -> bool:
    """Whether a node of Torch-Pruning's graph may read the model's inputs, to which no gradient flows.

    That is a layer before which there are none but transposed weights, or an operation that gets something else beside
    what has gradients.
    """
    if _is_operation(node):
        return any(source is None for source, _ in node.grad_fn.next_functions)
    return all(_is_operation(n) and not n.inputs and not _reads_inputs(n) for n in node.inputs)


def _is_operation(node: Any) -> bool:
    return type(node.module).__module__.startswith("torch_pruning")


def _removable(subject: _Subject, groups: Sequence[Group]) -> set[str]:
    """Names of the groups that can go as a whole, all of them together.

    The outputs must go on telling the inputs apart, so two branches that are all there is do not both go.
    """
    going: list[Group] = []
    dense = _spreads(subject.dense)

    def goes(some: Sequence[Group]) -> bool:
        every = [*going, *some]
        left = _spreads(subject.outputs(_silenced(subject.state, every, [torch.arange(g.channels) for g in every])))
        if not any(dense) or not all(a > _TOLERANCE * b for a, b in zip(left, dense, strict=True) if b > 0):
            return False
        if _removed(subject, some, [torch.arange(group.channels) for group in some]):
            return False
        going.extend(some)
        return True

    return {group.name for group in _passing(groups, goes)}


def _spreads(outputs: Sequence[Tensor]) -> list[float]:
    """How far apart the examples' outputs are, of each output."""
    finite = [torch.nan_to_num(y, nan=0.0, posinf=0.0, neginf=0.0) for y in outputs]
    return [float((y - y.mean(dim=0)).norm()) if y.ndim and y.numel() else 0.0 for y in finite]


def _silenced(state: Mapping[str, Tensor], groups: Sequence[Group], dropped: Sequence[Tensor]) -> dict[str, Tensor]:
    """The readers' weights without what they take from the `dropped` channels of each group."""
    silenced: dict[str, Tensor] = {}
    for group, channels in zip(groups, dropped, strict=True):
        for member in group.consumers:
            gone = torch.tensor(member.index)[channels].flatten()
            silenced[member.tensor] = silenced.get(member.tensor, state[member.tensor]).index_fill(1, gone, 0.0)
    return silenced


def _removed(
    subject: _Subject,
    groups: Sequence[Group],
    dropped: Sequence[Tensor],
    expected: list[Tensor] | None = None,
) -> str:
    """Why the model does without the `dropped` channels of each group as if nothing read them, or nothing.

    `expected` are the outputs when nothing reads them, if they are known.
    """
    if expected is None:
        expected = subject.outputs(_silenced(subject.state, groups, dropped))
    try:
        found = subject.outputs(_narrowed(subject.state, groups, dropped))
    except Exception as error:  # a size is written down in the model's code
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the model breaks when they are removed ({said[:120]})"
    if [t.shape for t in found] != [t.shape for t in expected]:
        return "removing them changes the shape of the model's outputs"
    distance = _distance(found, expected)
    return "" if distance < _TOLERANCE else f"the model uses them elsewhere too (outputs move by {distance:.1%})"


def _narrowed(state: Mapping[str, Tensor], groups: Sequence[Group], dropped: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors that lose the `dropped` channels of each group."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group, channels in zip(groups, dropped, strict=True):
        for member in group.members:
            gone.setdefault((member.tensor, member.dim), []).append(torch.tensor(member.index)[channels].flatten())
    narrowed: dict[str, Tensor] = {}
    for (name, dim), channels_ in gone.items():
        source = narrowed.get(name, state[name])
        narrowed[name] = source.index_select(dim, _complement(source.shape[dim], torch.cat(channels_)))
    return narrowed


def _complement(size: int, removed: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[removed.flatten()] = False
    return stays.nonzero().flatten()


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest over the outputs of |difference| / |spread|; the spread is the distance from the mean output.

    An offset or another, larger output hides nothing. Values that are infinite in both count as equal.
    """
    return max((_relative(x, y) for x, y in zip(found, expected, strict=True)), default=0.0)


def _relative(found: Tensor, expected: Tensor) -> float:
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite) or not torch.equal(found[~finite], expected[~finite]):
        return math.inf
    x, y = found[finite], expected[finite]
    error = float((x - y).norm())
    by_example = expected.masked_fill(~finite, 0.0)
    by_example = by_example - by_example.mean(dim=0) if expected.ndim else by_example
    spreads = [float((y - y.mean()).norm()) if y.numel() else 0.0, float(by_example[finite].norm())]
    seen = [spread for spread in spreads if spread > 1e-9 * float(y.norm())]
    return error / max(min(seen, default=float(y.norm())), 1e-30)


# --- bytes ----------------------------------------------------------------------------------------------


def _dense_bytes(model: nn.Module) -> int:
    """Four bytes for each value of the state dict, shared ones once: the float32 model before any container."""
    values = {id(v): v.numel() for v in model.state_dict(keep_vars=True).values() if isinstance(v, Tensor)}
    return 4 * sum(values.values())
