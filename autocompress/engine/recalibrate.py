"""Batch-norm statistics: re-estimation after compression, and folding into the weights before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autocompress.engine.quantize import rescale
from autocompress.graph import Graph, Layer
from autocompress.policy import Policy
from autocompress.stored import Byte, Full, Half, Quantised, Raw, Stored, StoredModel, round_to_byte, round_to_half
from autocompress.surgery import fold_scale
from autocompress.task import Batch, call, length, to_device

_NORM = nn.modules.batchnorm._BatchNorm
MOST_CHANGE = 10.0
"""A variance grows at most by this factor: batches that leave a channel of the dense model silent say nothing."""
SILENT = 0.01
"""Share of its variance below which a channel counts as silenced, the more the less is left."""


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms with running statistics."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _NORM) and m.track_running_stats}


def statistics(model: nn.Module) -> list[str]:
    """State-dict names of the running statistics."""
    return [f"{name}.{key}" if name else key for name in norms(model) for key in ("running_mean", "running_var")]


def reestimate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Replace running statistics by their mean over `batches`; every other module stays in evaluation mode.

    Compression shifts every layer's activations, and the statistics must follow (Sun et al. 2019, 1904.05049).
    Batches with the training augmentation give the statistics that training would.
    """
    found = norms(model)
    if not found:
        return
    model.eval()
    momenta = {}
    for name, norm in found.items():
        momenta[name] = norm.momentum
        norm.momentum = None  # type: ignore[assignment]  # None is the cumulative mean
        norm.reset_running_stats()  # type: ignore[operator]
        norm.train()
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            for batch in batches:
                try:
                    call(model, to_device(batch.inputs, device))
                except ValueError:  # a lone example may have no variance
                    if length(batch.inputs) > 1:
                        raise
    finally:
        for name, norm in found.items():
            norm.momentum = momenta[name]
            norm.eval()


def anchored(
    found: Mapping[str, Tensor], batch: Mapping[str, Tensor], running: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Statistics `found` for a compressed model, moved by what the same batches say wrongly of the dense one.

    `batch` are the dense model's statistics over these batches, `running` those it was trained with. The difference
    (a control variate) keeps a dense layer exactly as it was, and makes up for few or unaugmented inputs. Means
    (channels,) shift, variances scale. What compression silenced has no deviation left to divide a shift by: its mean
    hardly moves.
    """
    result = {}
    for name, value in found.items():
        variance = name.removesuffix("running_mean") + "running_var" if name.endswith("running_mean") else name
        smallest = torch.finfo(torch.float32).tiny  # silent before and after is no change
        change = ((found[variance] + smallest) / (batch[variance] + smallest)).clamp_max(MOST_CHANGE)  # (channels,)
        if variance == name:
            result[name] = running[name] * change
        else:
            share = (change / SILENT).sqrt().clamp_max(1.0)
            result[name] = running[name] * share + (value - batch[name] * share)
    return result


def constant(layer: Layer, state: Mapping[str, Tensor], mean: Tensor, eps: Mapping[str, float]) -> dict[str, Tensor]:
    """Tensors with which a `layer` without inputs gives what it gave on average, behind its norm if that follows alone.

    `mean` (out,) is that of its outputs without bias before. The norm's shift holds it, as folding and training keep
    it there; without one the bias does. Where there is neither, the constant is 0, which such a norm's mean is too.
    """
    norm, bias = layer.batch_norm, state.get(layer.bias)
    if norm is None:
        return {} if bias is None else {layer.bias: bias + mean}
    found = {f"{norm}.running_mean": torch.zeros_like(mean)} | ({} if bias is None else {layer.bias: bias * 0})
    if f"{norm}.bias" in state:
        scale, offset = (value.float() for value in fold_scale(state, layer, eps[norm]))
        found[f"{norm}.bias"] = scale * mean + offset
    return found


def fold(
    weights: StoredModel, state: Mapping[str, Tensor], graph: Graph, policy: Policy, eps: Mapping[str, float]
) -> dict[str, Stored]:
    """Everything the file holds, in its order: the stored `weights`, and the rest at 16 bits.

    Scales and biases of layers with few bits take 8 (`LayerChoice.small_floats`). If the policy folds, each batch norm
    that follows a layer alone disappears into that layer's scales and bias. `state` holds the compressed model's
    tensors, `eps` each norm's epsilon.
    """
    folds = {
        layer.name: [value.float() for value in fold_scale(state, layer, eps[norm])]
        for norm, layer in graph.folded(policy).items()
    }
    result: dict[str, Stored] = {}
    small = graph.small_floats(policy)
    for name in graph.contents(policy):
        owner, _, key = name.rpartition(".")
        if name in weights:
            result[name] = _weight(weights[name], folds[owner][0] if owner in folds else None, name in small)
        elif owner in folds and key == "bias":
            result[name] = _rest(folds[owner][1], "float32", name in small)
        else:
            result[name] = _rest(state[name], graph.tensors[name][1], name in small)
    return result


def _weight(stored: Stored, factor: Tensor | None, small: bool) -> Stored:
    """A weight with each row multiplied by `factor` (out,), its scales rounded to 8 bits if `small`."""
    if small and isinstance(stored, Quantised):
        stored = replace(stored, scale_bits=8)
        return rescale(stored, torch.ones_like(stored.scale) if factor is None else factor)
    return stored if factor is None else rescale(stored, factor)


def _rest(value: Tensor, dtype: str, small: bool) -> Stored:
    """What is not a compressible weight, as `artifact.layout.rest_entry` announces it."""
    if not value.is_floating_point():
        return Raw(value.clone())
    if dtype == "exact":
        return Full(value.float().clone())
    return Byte(round_to_byte(value.float())) if small else Half(round_to_half(value.float()))
