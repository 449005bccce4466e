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
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.graph import Graph, Group, Layer, Member
from autocompress.surgery import fold_scale, install, tensors_of, without
from autocompress.task import call, few, first_input, length, mapped, tensors

COMPRESSIBLE: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}
_KINDS: tuple[type[nn.Module], ...] = tuple(COMPRESSIBLE)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PER_CHANNEL = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_TOLERANCE = 1e-3  # of the output's power; float32 noise is about 1e-6, a wrong channel about 1


def trace(model: nn.Module, inputs: Any, examples: int = 4) -> Graph:
    """The graph of `model` (in evaluation mode) on the first `examples` of a batch's `inputs`.

    Raises `TaskError` if nothing in the model can be compressed.
    """
    model = copy.deepcopy(model).eval()
    inputs = few(model, inputs, examples)
    calls = _observe(model, inputs)
    layers = tuple(_layer(name, module, model, calls, length(inputs)) for name, module in _compressible(model))
    if not layers:
        raise TaskError("the model has no Conv1d/2d/3d, Linear or Embedding weight, so there is nothing to compress")
    exact, exact_inputs = _in_double(model, inputs)
    layers = _verified_folds(exact, exact_inputs, layers)
    groups, notes = _groups(exact, exact_inputs, calls)
    left = (*_computed_weights(model), *_other_weights(model, layers))
    return Graph(layers, groups, tensors_of(model), _dense_bytes(model), (*left, *notes))


def _in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """Model and inputs in double precision, where a wrong channel cannot hide in rounding; as given if that fails."""
    exact, wide = copy.deepcopy(model).double(), mapped(inputs, lambda t: t.double() if t.is_floating_point() else t)
    try:
        _run(exact, wide)
        return exact, wide
    except Exception:  # the model's code insists on its own precision
        return model, inputs


# --- layers ---------------------------------------------------------------------------------------------


def _compressible(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with a compressible weight, each shared weight once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _KINDS) and "weight" in module._parameters:
            found.setdefault(id(module.weight), (name, module))
    return list(found.values())


def _computed_weights(model: nn.Module) -> list[str]:
    """Notes about layers whose weight is the result of a computation (weight norm, say)."""
    return [
        f"{name} is left as it is: its weight is computed by a parametrization; remove that to compress the layer"
        for name, module in model.named_modules()
        if isinstance(module, _KINDS) and "weight" not in module._parameters
    ]


def _other_weights(model: nn.Module, layers: tuple[Layer, ...]) -> list[str]:
    """Notes about matrices of other layers (recurrent, transposed, attention's input), which stay at 16 bits."""
    known = {id(model.get_submodule(layer.name)._parameters["weight"]) for layer in layers}
    total = sum(p.numel() for p in model.parameters())
    notes = []
    for name, p in model.named_parameters():
        if p.ndim >= 2 and id(p) not in known and "parametrizations" not in name:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            notes.append(f"{name} stays at 16 bits ({p.numel() / total:.1%} of the weights): {kind} is not compressed")
    return notes


class _Calls:
    """What one forward pass showed: calls and output values per module, and whose output fed which norm."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.outputs: Counter[str] = Counter()
        self.normalised_by: dict[str, list[str]] = {}


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
                calls.outputs[name] += output.numel()

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


def _layer(name: str, module: nn.Module, model: nn.Module, calls: _Calls, examples: int) -> Layer:
    kind = next(kind for cls, kind in COMPRESSIBLE.items() if isinstance(module, cls))
    weight = module._parameters["weight"]
    assert weight is not None
    shape = tuple(weight.shape)
    norms = calls.normalised_by.get(name, [])
    alone = kind != "embedding" and len(norms) == 1 and calls.count[name] == calls.count[norms[0]] == 1
    if alone and getattr(model.get_submodule(norms[0]), "num_features", None) != shape[0]:
        alone = False
    return Layer(
        name,
        kind,
        shape,
        getattr(module, "groups", 1),
        _positions(model, weight, calls, examples),
        getattr(module, "bias", None) is not None,
        norms[0] if alone else None,
    )


def _positions(model: nn.Module, weight: Tensor, calls: _Calls, examples: int) -> int:
    """How often `weight` is multiplied for one input, over all modules that share it; looking up is not multiplying."""
    outputs = sum(
        calls.outputs[name]
        for name, module in model.named_modules()
        if module._parameters.get("weight") is weight and not isinstance(module, nn.Embedding)
    )
    return outputs // (max(1, examples) * weight.shape[0])


def _verified_folds(model: nn.Module, inputs: Any, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Drop each batch norm whose folding changes the outputs: its layer's output is used elsewhere too."""
    shared = Counter(layer.batch_norm for layer in layers)
    layers = tuple(replace(x, batch_norm=x.batch_norm if shared[x.batch_norm] == 1 else None) for x in layers)
    candidates = [layer for layer in layers if layer.batch_norm]
    if not candidates or _fold_is_exact(model, inputs, candidates):
        return layers
    good = {layer.name for layer in candidates if _fold_is_exact(model, inputs, [layer])}
    return tuple(layer if layer.name in good else replace(layer, batch_norm=None) for layer in layers)


def _fold_is_exact(model: nn.Module, inputs: Any, layers: list[Layer]) -> bool:
    folded = copy.deepcopy(model)
    state = folded.state_dict()
    for layer in layers:
        assert layer.batch_norm is not None
        norm = folded.get_submodule(layer.batch_norm)
        if not getattr(norm, "track_running_stats", False):
            return False
        scale, bias = fold_scale(state, layer, norm.eps)  # type: ignore[arg-type]
        weight = state[layer.weight] * scale.reshape(-1, *[1] * (len(layer.shape) - 1))
        install(folded, {layer.weight: weight, layer.bias: bias})
    without(folded, [layer.batch_norm for layer in layers if layer.batch_norm])
    try:
        return _distance(_run(folded, inputs), _run(model, inputs)) < _TOLERANCE
    except Exception:  # the model asks its norm for more than a call
        return False


# --- coupling groups ------------------------------------------------------------------------------------


def _groups(model: nn.Module, inputs: Any, calls: _Calls) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """All channel groups, frozen ones included, and notes about what could not be traced."""
    names = {id(module): name for name, module in model.named_modules()}
    try:
        groups = [_describe(group, names) for group in _dependency_groups(model, inputs)]
    except Exception as error:  # any model may be beyond the tracer; compression of weights still works
        first = str(error).splitlines()[0] if str(error) else ""
        return (), (f"no channels can be pruned: the dependency tracer failed ({type(error).__name__}: {first})",)
    if not groups:
        return (), ("no channels can be pruned: the outputs are detached from the weights, so nothing can be traced",)
    owners = Counter((m.tensor, m.dim, i) for g in groups for m in g.members for c in m.index for i in c)
    checked = []
    for group in groups:
        reason = group.frozen or _conflict(group, model, calls, owners)
        checked.append(replace(group, frozen=reason or _trial(model, inputs, group)))
    return _with_removable(model, inputs, checked), ()


def _dependency_groups(model: nn.Module, inputs: Any) -> Any:
    """Torch-Pruning's groups, rooted at the layers that produce channels."""
    positional = (
        inputs if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    )
    trained = [p for p in model.parameters() if not p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(True)  # the tracer follows autograd
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            if not any(output.requires_grad for output in tensors(call(model, inputs))):
                return []
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(model, positional, output_transform=tensors, verbose=False)
            return list(graph.get_all_groups())
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)


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


def _conflict(group: Group, model: nn.Module, calls: _Calls, owners: Counter[tuple[str, int, int]]) -> str:
    """Why `group` cannot be pruned, as far as that shows without running it."""
    if group.channels < 2:
        return "it has a single channel"
    if not group.consumers:
        return "no layer reads its channels: they are the model's output"
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    state = model.state_dict()
    for member in group.members:
        if member.tensor not in state:
            return f"{member.tensor} is computed, not stored"
        owner, _, key = member.tensor.rpartition(".")
        module = model.get_submodule(owner)
        value = getattr(module, key)
        if max(i for c in member.index for i in c) >= state[member.tensor].shape[member.dim]:
            return f"its channels do not map onto {member.tensor}"
        if isinstance(value, nn.Parameter) and uses[id(value)] > 1:
            return f"{member.tensor} is shared with another layer"
        if calls.count[owner] > 1:
            return f"{owner} is used {calls.count[owner]} times in one forward pass"
        if any(owners[member.tensor, member.dim, i] > 1 for c in member.index for i in c):
            return f"{member.tensor} also belongs to another group along the same channels"
    return ""


def _trial(model: nn.Module, inputs: Any, group: Group) -> str:
    """Remove half of the channels at random; empty if that equals the dense model with those channels unread.

    Small groups are tried several times: a random half of few channels can respect a coupling by chance.
    """
    generator = torch.Generator().manual_seed(group.channels)
    for _ in range(1 if group.channels >= 16 else 3):
        dropped = torch.randperm(group.channels, generator=generator)[: group.channels // 2]
        reason = _remove(model, inputs, group, dropped)
        if reason:
            return reason
    return ""


def _with_removable(model: nn.Module, inputs: Any, groups: list[Group]) -> tuple[Group, ...]:
    """Say of each group whether it can go as a whole, beside all others of which that was said before.

    The outputs must go on telling the inputs apart, so two branches that are all there is do not both go.
    """
    silent, result = copy.deepcopy(model), []
    dense = _spreads(_run(model, inputs))
    for group in groups:
        if not group.frozen and _reads_alone(model, group):
            trial = copy.deepcopy(silent)
            install(trial, _silenced(trial.state_dict(), group, torch.arange(group.channels)))
            tells = all(a > _TOLERANCE * b for a, b in zip(_spreads(_run(trial, inputs)), dense, strict=True) if b > 0)
            if tells and any(dense) and not _remove(model, inputs, group, torch.arange(group.channels)):
                silent, group = trial, replace(group, removable=True)
        result.append(group)
    return tuple(result)


def _reads_alone(model: nn.Module, group: Group) -> bool:
    """Whether the group's layers are convolutions and linear layers whose readers read nothing but the group."""
    owners = [model.get_submodule(m.tensor.rpartition(".")[0]) for m in group.members]
    if any(isinstance(owner, nn.Embedding) for owner in owners):
        return False
    sizes = model.state_dict()
    return all(sum(map(len, m.index)) == sizes[m.tensor].shape[1] for m in group.consumers)


def _spreads(outputs: list[Tensor]) -> list[float]:
    """How far apart the examples' outputs are, of each output."""
    finite = [torch.nan_to_num(y, nan=0.0, posinf=0.0, neginf=0.0) for y in outputs]
    return [float((y - y.mean(dim=0)).norm()) if y.ndim and y.numel() else 0.0 for y in finite]


def _silenced(state: Mapping[str, Tensor], group: Group, dropped: Tensor) -> dict[str, Tensor]:
    """The readers' weights without what they take from the `dropped` channels."""
    silenced: dict[str, Tensor] = {}
    for member in group.consumers:
        gone = torch.tensor(member.index)[dropped].flatten()
        silenced[member.tensor] = silenced.get(member.tensor, state[member.tensor]).index_fill(1, gone, 0.0)
    return silenced


def _remove(model: nn.Module, inputs: Any, group: Group, dropped: Tensor) -> str:
    state = model.state_dict()
    pruned: dict[str, Tensor] = {}
    for member in group.members:
        source = pruned.get(member.tensor, state[member.tensor])
        gone = torch.tensor(member.index)[dropped].flatten()
        pruned[member.tensor] = source.index_select(member.dim, _complement(source.shape[member.dim], gone))
    small, reference = copy.deepcopy(model), copy.deepcopy(model)
    install(reference, _silenced(state, group, dropped))
    expected = _run(reference, inputs)
    try:
        install(small, pruned)
        found = _run(small, inputs)
    except Exception as error:  # a size is written down in the model's code
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the model breaks when they are removed ({said[:120]})"
    if [t.shape for t in found] != [t.shape for t in expected]:
        return "removing them changes the shape of the model's outputs"
    distance = _distance(found, expected)
    return "" if distance < _TOLERANCE else f"the model uses them elsewhere too (outputs move by {distance:.1%})"


def _complement(size: int, removed: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[removed.flatten()] = False
    return stays.nonzero().flatten()


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t.double() for t in tensors(call(model, inputs))]


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
