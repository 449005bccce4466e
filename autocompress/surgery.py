"""Puts tensors of any shape into a module, for good or for a while. Knows nothing about why."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from statistics import mode
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.graph import Layer, Shape
from autocompress.stored import round_to_half


def install(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make each named parameter or buffer of `model` the given tensor, and its module's sizes agree with it.

    A tensor whose shape is unchanged is copied into place, so that modules that share it go on sharing it.
    """
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        present = getattr(model.get_submodule(owner), key)
        if isinstance(present, Tensor) and present.shape == value.shape:
            with torch.no_grad():
                present.copy_(value)
        else:
            _renew(model, name, value.detach().clone())


def hold(model: nn.Module, name: str, value: Tensor) -> None:
    """`install` without a copy: a parameter of `model` lies where `value` does, so nobody may write to it.

    Buffers are copied, since running a model may write to them.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    present = getattr(module, key)
    if key in module._buffers:
        install(model, {name: value})
    elif isinstance(present, Tensor) and present.shape == value.shape:
        present.data = value.detach().to(present.device, present.dtype)
    else:
        _renew(model, name, value.detach())


def _renew(model: nn.Module, name: str, value: Tensor) -> None:
    """Give `model` a tensor of another shape under `name`, on the device and of the type of what was there."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    present = getattr(module, key)
    beside = present if isinstance(present, Tensor) else next(module.parameters(recurse=False))
    own = value.to(beside.device, beside.dtype)
    trains = beside.requires_grad and own.is_floating_point()
    _put(model, owner, key, own if key in module._buffers else nn.Parameter(own, requires_grad=trains))


def _put(model: nn.Module, owner: str, key: str, value: Tensor | None) -> None:
    """Make `value` the tensor that module `owner` of `model` has under `key`, and the sizes beside it agree with it."""
    module = model.get_submodule(owner)
    tensors: dict[str, Any] = module._buffers if key in module._buffers else module._parameters
    before, tensors[key] = tensors.get(key), value
    if value is None or (before is not None and before.shape == value.shape):
        return
    if key in ("weight", "running_mean"):
        attention = model.get_submodule(owner.rpartition(".")[0])
        size = _head_size(attention)
        _resize(module.original if isinstance(module, Removed) else module, value)
        if size:
            _recount(attention, size)
        if isinstance(module, Removed) != _is_beyond_kernels(module, value):
            _exchange(model, module)


def shadow(model: nn.Module) -> nn.Module:
    """A copy whose parameters lie where those of `model` do, to be read and not written; its buffers are its own."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()})


@contextmanager
def lent(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each named parameter or buffer of `model` is the given tensor itself, under every name it has.

    Afterwards all are what they were; none is ever written to.
    """
    holders: dict[int, list[tuple[str, str]]] = {}
    for owner, module in model.named_modules() if values else ():
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            holders.setdefault(id(tensor), []).append((owner, key))
    before: list[tuple[str, str, Tensor | None]] = []
    try:
        for name, value in values.items():
            owner, _, key = name.rpartition(".")
            present = getattr(model.get_submodule(owner), key)
            for own, held in [(owner, key)] if present is None else holders[id(present)]:
                before.append((own, held, present))
                buffer = held in model.get_submodule(own)._buffers
                _put(model, own, held, value if buffer else nn.Parameter(value, False))
        yield
    finally:
        for own, held, present in reversed(before):
            _put(model, own, held, present)


class Removed(nn.Module):
    """Stands for a layer or batch norm without input or output channels, which torch's kernels refuse.

    Has the very tensors of the module whose place it takes. A layer without inputs gives its bias everywhere, and one
    without outputs an empty tensor; a batch norm without channels gives back what it gets.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._place = (original,)  # in a tuple, so that it is no child
        self._parameters, self._buffers = original._parameters, original._buffers
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The module that comes back with the channels."""
        return self._place[0]

    def __getattr__(self, name: str) -> Any:
        """What a model's code asks of the module itself, as its stride."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_place":  # not there yet while a copy is made
                raise
            return getattr(self._place[0], name)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """`x` (..., channels, positions ...), or (..., channels) for a linear layer."""
        layer, bias = self.original, self._parameters.get("bias")
        if isinstance(layer, nn.Linear):
            _check_channels(x.shape[-1], layer.in_features)
            empty = x.new_zeros((*x.shape[:-1], layer.out_features))
            return empty if bias is None else empty + bias
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _check_channels(x.shape[1], 0)
            return x
        sizes = _positions(layer, x)
        _check_channels(x.shape[-1 - len(sizes)], layer.in_channels)
        empty = x.new_zeros((*x.shape[: -1 - len(sizes)], layer.out_channels, *sizes))
        return empty if bias is None else empty + bias.reshape(-1, *[1] * len(sizes))


def _check_channels(given: int, wanted: int) -> None:
    if given != wanted:
        raise RuntimeError(
            f"a removed layer gets {given} channels in place of {wanted}: the model uses them elsewhere too"
        )


def _positions(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> list[int]:
    """The output's size along each position of `x`."""
    n = len(layer.kernel_size)
    pads = layer._reversed_padding_repeated_twice[::-1]  # two for each dimension
    steps = zip(x.shape[-n:], layer.kernel_size, layer.stride, layer.dilation, range(n), strict=True)
    return [(size + pads[2 * i] + pads[2 * i + 1] - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation, i in steps]  # fmt: skip


def _is_beyond_kernels(module: nn.Module, weight: Tensor) -> bool:
    """Whether torch does not compute a module of this kind with such a weight."""
    kind = module.original if isinstance(module, Removed) else module
    return weight.numel() == 0 and isinstance(
        kind, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | nn.modules.batchnorm._BatchNorm
    )


def _exchange(model: nn.Module, module: nn.Module) -> None:
    """Put `Removed` in the place of a module, or the module back in its place, under every name it has."""
    other = module.original.train(module.training) if isinstance(module, Removed) else Removed(module)
    for name in [name for name, each in model.named_modules(remove_duplicate=False) if each is module]:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, other)


def _resize(module: nn.Module, weight: Tensor) -> None:
    """Sizes that modules keep beside their weights (they check or print them)."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # remembered on the module: a depthwise layer that once shrank to one channel looks like any other
        depthwise = module.__dict__.setdefault("_depthwise", module.groups > 1 and module.groups == module.in_channels)
        if depthwise:
            module.groups = weight.shape[0]
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape[0], weight.shape[1]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif hasattr(module, "num_features"):  # batch and instance norms
        module.num_features = weight.shape[0]  # type: ignore[assignment]


_HEADS = ("num_attention_heads", "num_heads", "n_heads")
"""What attentions call the number of their heads."""
_CHANNELS = ("all_head_size",)
"""What they call the channels of all heads together."""


def heads(module: nn.Module) -> int:
    """How many heads an attention says it has whose projections are linear layers of its own; 0 for any other."""
    counts = [n for name in _HEADS if isinstance(n := getattr(module, name, None), int)]
    return counts[0] if counts and len(_projected(module)) > 1 else 0


def _projected(attention: nn.Module) -> list[int]:
    """Outputs of its linear layers."""
    layers = (child.original if isinstance(child, Removed) else child for child in attention.children())
    return [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]


def _head_size(attention: nn.Module) -> int:
    """Channels of a head, as remembered on the module from when no head was gone; 0 for what is no attention."""
    count = heads(attention)
    if count and "_head_size" not in attention.__dict__:
        channels = mode(_projected(attention))
        attention.__dict__["_head_size"] = 0 if channels % count else channels // count
    return int(attention.__dict__.get("_head_size", 0))


def _recount(attention: nn.Module, size: int) -> None:
    """As many heads as most projections hold: query, key and value against that of the outputs, which keeps its own."""
    channels = mode(_projected(attention))
    for names, value in ((_HEADS, channels // size), (_CHANNELS, channels)):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, value)


def without(model: nn.Module, modules: Iterable[str]) -> None:
    """Replace each named module by the identity, under every name it has."""
    gone = {id(model.get_submodule(name)) for name in modules}
    names = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in gone]
    for name in names:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Identity())


def tensors_of(model: nn.Module) -> dict[str, tuple[Shape, str]]:
    """Every tensor of the state that must be stored, with shape and dtype name (see `Graph.tensors`).

    Tensors with several names appear once; step counters of batch norms are left out.
    """
    found, seen, foreign = {}, set(), set(foreign_state(model))
    for name, value in model.state_dict(keep_vars=True).items():
        if name in foreign or id(value) in seen or name.endswith(".num_batches_tracked"):
            continue
        seen.add(id(value))
        found[name] = tuple(value.shape), _dtype(value)
    return found


def foreign_state(model: nn.Module) -> list[str]:
    """Names of the state that are no parameters or buffers: modules with packed or quantised weights have such."""
    own = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    return [name for name, value in model.state_dict(keep_vars=True).items() if id(value) not in own]


def _dtype(value: Tensor) -> str:
    if value.is_floating_point() and value.numel():
        extremes = torch.stack(torch.aminmax(value.detach().float().cpu()))
        if not bool(torch.isfinite(round_to_half(extremes)).all()):
            return "exact"
    return str(value.dtype).removeprefix("torch.")


def fold_scale(state: Mapping[str, Tensor], layer: Layer, eps: float) -> tuple[Tensor, Tensor]:
    """The factor per output channel and the bias that make `layer` do what its batch norm did after it.

    y = (w x + b - mean) gamma / sqrt(var + eps) + beta (Ioffe and Szegedy 2015, section 3.1, at inference).
    Both results have shape (out,) and are float64.
    """
    norm = layer.batch_norm
    mean, var = state[f"{norm}.running_mean"].double(), state[f"{norm}.running_var"].double()
    gamma = state[f"{norm}.weight"].double() if f"{norm}.weight" in state else torch.ones_like(mean)
    beta = state[f"{norm}.bias"].double() if f"{norm}.bias" in state else torch.zeros_like(mean)
    bias = state[layer.bias].double() if layer.bias in state else torch.zeros_like(mean)
    scale = gamma / (var + eps).sqrt()
    return scale, (bias - mean) * scale + beta
