"""What the matrices of `nn.MultiheadAttention` are multiplied with: torch shows its inputs and outputs alone.

Knows nothing about layers or moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.task import first_input

TOLERANCE = 0.01
"""Largest difference from the module's own outputs, as a share of the largest of them: of half precision's size."""
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of the module itself, of which it has the first or the others; `out_proj` is a linear layer's."""

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
_THREE = "query", "key", "value"
_ARGUMENTS = *_THREE, "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"


def inputs_of(given: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
    """Query, key and value of one call; a subclass that takes one input takes it for all three."""
    arguments = dict(zip(_ARGUMENTS, given, strict=False)) | dict(named)
    return [arguments.get(name, first_input(given, named)) for name in _THREE]


def attention_columns(module: nn.MultiheadAttention, call: Call, output: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """What each matrix of `module` was multiplied with in one call, after the parameter's name.

    For a projection of all three the columns (n, d) of query, key and value; for others those of one. `call` is what
    the module was called with, `output` what it gave, in evaluation mode. Raises `ValueError` if that is not what
    attention gives, as in a subclass that computes something else.
    """
    mixed = _mixed(module, call)  # as query, without the last projection
    wanted = output[0] if isinstance(output, tuple) else output
    found = F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    if not float((found - wanted).abs().nan_to_num().max()) <= TOLERANCE * float(wanted.abs().nan_to_num().max()):
        raise ValueError("its outputs are not those of attention")
    flat = [x.detach().float().flatten(0, -2) for x in inputs_of(*call)]
    if module.in_proj_weight is not None:
        yield PROJECTIONS[0], flat
    else:
        yield from ((name, [x]) for name, x in zip(PROJECTIONS[1:], flat, strict=True))
    yield "out_proj.weight", [mixed.detach().float().flatten(0, -2)]


def _mixed(module: nn.MultiheadAttention, call: Call) -> Tensor:
    """What the heads give, side by side: the module's outputs if its last projection were none."""
    arguments = dict(zip(_ARGUMENTS, call[0], strict=False)) | dict(call[1])
    query, key, value = inputs_of(*call)
    turned = module.batch_first and query.ndim == 3
    if turned:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    apart = module.in_proj_weight is None
    found, _ = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        0.0,
        torch.eye(module.embed_dim, dtype=query.dtype, device=query.device),
        None,
        training=False,
        key_padding_mask=arguments.get("key_padding_mask"),
        need_weights=False,
        attn_mask=arguments.get("attn_mask"),
        use_separate_proj_weight=apart,
        q_proj_weight=module.q_proj_weight,
        k_proj_weight=module.k_proj_weight,
        v_proj_weight=module.v_proj_weight,
        is_causal=bool(arguments.get("is_causal", False)),
    )
    return found.transpose(0, 1) if turned else found
