"""From a model and one batch to a `Graph`: what can be compressed, what belongs together, what must stay.

Coupling groups come from Torch-Pruning's dependency graph. Each is then tried: channels are removed from a
copy and the outputs compared with the dense model whose readers of those channels were silenced. A group that
fails is frozen with the reason, so that no later stage can break the model. Chooses nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.graph import Graph, Group, Layer, Member, Shape
from autocompress.surgery import fold_scale, install, without
from autocompress.task import call, head, tensors

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
    inputs = head(inputs, examples)
    calls = _observe(model, inputs)
    layers = tuple(_layer(name, module, calls, examples) for name, module in _compressible(model))
    if not layers:
        raise TaskError("the model has no Conv1d/2d/3d, Linear or Embedding weight, so there is nothing to compress")
    layers = _verified_folds(model, inputs, layers)
    groups, notes = _groups(model, inputs, calls)
    return Graph(layers, groups, _tensors(model), _dense_bytes(model), notes)


# --- layers ---------------------------------------------------------------------------------------------


def _compressible(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with a compressible weight, each shared weight once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _KINDS):
            found.setdefault(id(module.weight), (name, module))
    return list(found.values())


class _Calls:
    """What one forward pass showed: calls and output size per module, and whose output fed which norm."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.output: dict[str, Shape] = {}
        self.normalised_by: dict[str, list[str]] = {}


def _observe(model: nn.Module, inputs: Any) -> _Calls:
    calls, made_by, handles = _Calls(), {}, []  # type: ignore[var-annotated]
    keep_alive: list[Any] = []  # an id() names a tensor only while it lives

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, given: Any, output: Any) -> None:
            calls.count[name] += 1
            if isinstance(module, BATCH_NORMS) and id(given[0]) in made_by:
                calls.normalised_by.setdefault(made_by[id(given[0])], []).append(name)
            if isinstance(module, _KINDS) and isinstance(output, Tensor):
                made_by[id(output)] = name
                keep_alive.append(output)
                calls.output[name] = tuple(output.shape)

        return record

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(hook(name)))
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _layer(name: str, module: nn.Module, calls: _Calls, examples: int) -> Layer:
    kind = next(kind for cls, kind in COMPRESSIBLE.items() if isinstance(module, cls))
    weight: Tensor = module.weight  # type: ignore[assignment]
    shape = tuple(weight.shape)
    output = calls.output.get(name, ())
    batch = output[0] if output else examples
    numel = 1
    for size in output:
        numel *= size
    positions = 0 if kind == "embedding" else calls.count[name] * numel // max(1, batch * shape[0])
    norms = calls.normalised_by.get(name, [])
    alone = len(norms) == 1 and calls.count[name] == calls.count[norms[0]] == 1
    return Layer(
        name,
        kind,
        shape,
        getattr(module, "groups", 1),
        positions,
        getattr(module, "bias", None) is not None,
        norms[0] if alone else None,
    )


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
    return _distance(_run(folded, inputs), _run(model, inputs)) < _TOLERANCE


# --- coupling groups ------------------------------------------------------------------------------------


def _groups(model: nn.Module, inputs: Any, calls: _Calls) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """All channel groups, frozen ones included, and notes about what could not be traced."""
    try:
        found = list(_dependency_groups(model, inputs))
    except Exception as error:  # any model may be beyond the tracer; compression of weights still works
        first = str(error).splitlines()[0] if str(error) else ""
        return (), (f"no channels can be pruned: the dependency tracer failed ({type(error).__name__}: {first})",)
    names = {id(module): name for name, module in model.named_modules()}
    groups = [_describe(group, names) for group in found]
    owners = Counter((m.tensor, m.dim, i) for g in groups for m in g.members for c in m.index for i in c)
    checked = []
    for group in groups:
        reason = group.frozen or _conflict(group, model, calls, owners)
        checked.append(replace(group, frozen=reason or _trial(model, inputs, group)))
    return tuple(checked), ()


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
            members[tensor, dim] = Member(tensor, dim, tuple(tuple(sorted(c)) for c in index))
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
    for member in group.members:
        owner, _, key = member.tensor.rpartition(".")
        module = model.get_submodule(owner)
        value = getattr(module, key)
        if isinstance(value, nn.Parameter) and uses[id(value)] > 1:
            return f"{member.tensor} is shared with another layer"
        if calls.count[owner] > 1:
            return f"{owner} is used {calls.count[owner]} times in one forward pass"
        if any(owners[member.tensor, member.dim, i] > 1 for c in member.index for i in c):
            return f"{member.tensor} also belongs to another group along the same channels"
    return ""


def _trial(model: nn.Module, inputs: Any, group: Group) -> str:
    """Remove every other channel; empty if the result equals the dense model with those channels unread."""
    dropped = torch.arange(0, group.channels, 2)
    state = model.state_dict()
    pruned: dict[str, Tensor] = {}
    silenced: dict[str, Tensor] = {}
    for member in group.members:
        source = pruned.get(member.tensor, state[member.tensor])
        index = torch.tensor(member.index)
        pruned[member.tensor] = source.index_select(member.dim, _complement(source.shape[member.dim], index[dropped]))
        if member.dim == 1:
            silent = silenced.get(member.tensor, state[member.tensor].clone())
            silenced[member.tensor] = silent.index_fill(1, index[dropped].flatten(), 0.0)
    small, reference = copy.deepcopy(model), copy.deepcopy(model)
    install(small, pruned)
    install(reference, silenced)
    expected = _run(reference, inputs)
    try:
        found = _run(small, inputs)
    except Exception as error:  # a size is written down in the model's code
        return f"the model breaks when they are removed ({str(error).splitlines()[0][:120]})"
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


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Root of the squared difference over the reference's power; NaN counts as far."""
    error = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    power = sum(float(y.square().sum()) for y in b)
    share = (error / max(power, 1e-30)) ** 0.5
    return share if share == share else float("inf")


# --- bytes ----------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, tuple[Shape, str]]:
    """Every tensor that must be stored: shared ones once, step counters of batch norms not at all."""
    found, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) in seen or name.endswith(".num_batches_tracked"):
            continue
        seen.add(id(value))
        found[name] = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    return found


def _dense_bytes(model: nn.Module) -> int:
    """Four bytes for each value of the state dict: what the float32 model takes before any container."""
    return 4 * sum(value.numel() for value in model.state_dict().values() if isinstance(value, Tensor))
