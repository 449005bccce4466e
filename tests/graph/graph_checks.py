"""What every topology must keep to: shared by the tests of this folder."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autocompress.engine.prune import remove_channels
from autocompress.graph import Graph, Group
from autocompress.policy import Policy, Recovery
from autocompress.surgery import fold_scale, install, without
from autocompress.task import arguments, call, tensors
from autocompress.trace import trace

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Net(nn.Module):
    """A model whose forward is `forward(self, *inputs)` over the given layers."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self, *inputs, **named)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A 2d convolution that keeps the image's size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def pool(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def images(n: int = 4, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights by `seed`, and batch norms as after training: random statistics, scales and shifts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for norm in model.modules():
            if not isinstance(norm, NORMS):
                continue
            if norm.affine:
                norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model.eval()


def group(graph: Graph, name: str) -> Group:
    """The group that owns the output channels of layer `name`."""
    return next(g for g in graph.groups if any(m.tensor == f"{name}.weight" and m.dim == 0 for m in g.members))


def prunable(graph: Graph) -> set[str]:
    """Layers whose output channels may be removed."""
    return {m.tensor.removesuffix(".weight") for g in graph.prunable for m in g.producers if is_layer(graph, m.tensor)}


def is_layer(graph: Graph, tensor: str) -> bool:
    return tensor in {layer.weight for layer in graph.layers}


def readers(group: Group) -> set[str]:
    return {m.tensor for m in group.consumers}


def draw_kept(graph: Graph, policy: Policy, seed: int = 0) -> dict[str, Tensor]:
    """As many random channels of each group as `policy` keeps: no pattern that a model could agree with by luck."""
    generator = torch.Generator().manual_seed(seed)
    counts = graph.kept(policy)
    return {
        g.name: torch.randperm(g.channels, generator=generator)[: counts[g.name]].sort().values
        for g in graph.prunable
        if counts[g.name] < g.channels
    }


def doubles(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: doubles(item) for key, item in value.items()}
    return tuple(doubles(item) for item in value) if isinstance(value, tuple | list) else value


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every float output, in float64 so that rounding hides nothing."""
    if any(p.dtype == torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).double()
    with torch.no_grad():
        return tensors(call(model, doubles(inputs)))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [t.shape for t in found] == [t.shape for t in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def pruned(model: nn.Module, graph: Graph, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy without the other channels."""
    small = copy.deepcopy(model)
    install(small, remove_channels(model.state_dict(), graph, kept))
    return small


def silenced(model: nn.Module, graph: Graph, kept: Mapping[str, Tensor], inputs: Any) -> list[Tensor]:
    """Outputs of the model of full size when no layer reads the other channels."""
    state, changed = model.state_dict(), {}
    for g in graph.prunable:
        for member in g.consumers if g.name in kept else ():
            stays = set(kept[g.name].tolist())
            gone = [i for c, own in enumerate(member.index) if c not in stays for i in own]
            weight = changed.get(member.tensor, state[member.tensor])
            changed[member.tensor] = weight.index_fill(1, torch.tensor(gone), 0.0)
    with torch.no_grad():
        return tensors(functional_call(model, changed, *arguments(inputs)))


def folded(model: nn.Module, graph: Graph) -> nn.Module:
    """A copy whose foldable batch norms are folded."""
    copied = copy.deepcopy(model)
    state = copied.state_dict()
    for name, layer in graph.folded(Policy()).items():
        scale, bias = fold_scale(state, layer, copied.get_submodule(name).eps)  # type: ignore[arg-type]
        weight = state[layer.weight] * scale.reshape(-1, *[1] * (len(layer.shape) - 1))
        install(copied, {layer.weight: weight, layer.bias: bias})
    without(copied, graph.folded(Policy()))
    return copied


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a file must hold: tied weights once, step counters not at all."""
    found, seen = {}, set()
    for name, value in model.state_dict().items():
        fresh = value.data_ptr() not in seen or not value.numel()  # nothing lies at 0
        if fresh and not name.endswith("num_batches_tracked"):
            seen.add(value.data_ptr())
            found[name] = tuple(value.shape)
    return found


def macs_by_hooks(model: nn.Module, inputs: Any, examples: int) -> int:
    """Multiply-accumulates of one input, counted at every call of every layer, independently of the package."""
    total, handles = 0, []

    def recurrent(module: nn.Module, given: Any, _: Any) -> None:
        nonlocal total
        rows = given[0].numel() // module.input_size  # steps of all examples; every one reads every matrix
        total += sum(rows * p.numel() for p in module.parameters() if p.ndim == 2)

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        weight: Tensor = module.weight  # type: ignore[assignment]
        per_value = weight[0].numel()  # every output value reads one row of the weight
        total += 0 if isinstance(module, nn.Embedding) else output.numel() * per_value

    for module in model.modules():
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding):
            handles.append(module.register_forward_hook(record))
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            handles.append(module.register_forward_hook(recurrent))
    with torch.no_grad():
        call(model, inputs)
    for handle in handles:
        handle.remove()
    assert total % examples == 0
    return total // examples


def examples_in(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return len(inputs)
    return examples_in(next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs)))


def check(model: nn.Module, inputs: Any, ratio: float = 0.5, seed: int = 0) -> Graph:
    """The graph of `model`, after checking all that it claims against really pruned models."""
    graph = trace(model, inputs)
    check_graph(model, inputs, graph, ratio, seed)
    return graph


def check_graph(model: nn.Module, inputs: Any, graph: Graph, ratio: float = 0.5, seed: int = 0) -> None:
    model, inputs = copy.deepcopy(model).double(), doubles(inputs)
    dense = outputs(model, inputs)
    whole = Policy(keep={g.name: 1.0 for g in graph.groups})
    assert_same(outputs(pruned(model, graph, draw_kept(graph, whole)), inputs), dense)
    assert_same(outputs(folded(model, graph), inputs), dense)
    _check_plan(model, inputs, graph, whole)

    policy = Policy(keep={g.name: ratio for g in graph.prunable})
    kept = draw_kept(graph, policy, seed)
    for name in kept:  # each alone, so that no group's mistake hides behind another's
        one = {name: kept[name]}
        assert_same(outputs(pruned(model, graph, one), inputs), silenced(model, graph, one, inputs))
    gone = {g.name: torch.zeros(0, dtype=torch.long) for g in graph.prunable if g.removable}
    for removed in (*({name: none} for name, none in gone.items()), gone, {**kept, **gone}):
        assert_same(outputs(pruned(model, graph, removed), inputs), silenced(model, graph, removed, inputs))
    _check_plan(pruned(model, graph, gone), inputs, graph, Policy(keep=dict.fromkeys(gone, 0.0)))
    small = pruned(model, graph, kept)
    assert_same(outputs(small, inputs), silenced(model, graph, kept, inputs))
    assert_same(outputs(folded(small, graph), inputs), outputs(small, inputs))
    if kept:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    _check_plan(small, inputs, graph, policy)


def _check_plan(real: nn.Module, inputs: Any, graph: Graph, policy: Policy) -> None:
    """Shapes, contents and multiply-accumulates that `graph` predicts are those of `real`."""
    unfolded = Policy(keep=policy.keep, recovery=Recovery(fold_bn=False))
    assert graph.shapes(policy) == stored_shapes(real)
    assert graph.contents(unfolded) == stored_shapes(real)
    assert graph.contents(policy) == stored_shapes(folded(real, graph))
    assert graph.macs(policy) == macs_by_hooks(real, inputs, examples_in(inputs))
