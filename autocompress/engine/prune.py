"""Removes weights and channels: magnitude masks, channel importance, physical slicing. Chooses no ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.graph import Graph, Group
from autocompress.policy import Criterion, Policy
from autocompress.task import Batch, Task, call, first_input, to_device

HISTOGRAM_BINS = 32


def magnitude_mask(weight: Tensor, removed: int) -> Tensor | None:
    """True where a weight stays: all but the `removed` smallest magnitudes (Han et al., 1506.02626, section 3).

    Ties are broken by position; None when nothing is removed.
    """
    if removed == 0:
        return None
    order = weight.detach().abs().flatten().sort(stable=True).indices
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[:removed]] = False
    return mask.reshape(weight.shape)


# --- channel importance: one value per channel of a group, larger is kept --------------------------------


def norm_importance(state: Mapping[str, Tensor], group: Group, order: int) -> Tensor:
    """Sum over the group's producers of the L1 or L2 norm of each filter (Li et al., 1608.08710, section 3.1)."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.producers:
        if state[member.tensor].ndim < 2:  # a batch norm's weight
            continue
        weight = state[member.tensor].double().movedim(member.dim, 0)  # an embedding's channels are its columns
        per_row = weight.flatten(1).norm(p=order, dim=1)
        total += per_row[torch.tensor(member.index)].sum(dim=1)
    return total


def taylor_importance(state: Mapping[str, Tensor], gradients: Mapping[str, Tensor], group: Group) -> Tensor:
    """Squared first-order change of one batch's loss when a channel goes: (sum of w g over its filters)^2.

    Molchanov et al. 2019, 1906.10771, equation 8, summed inside a filter as in their gate formulation. The criterion
    is its mean over batches: at a trained optimum gradients cancel between batches, their squares do not.
    """
    change = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.producers:
        if state[member.tensor].ndim < 2:
            continue
        product = (state[member.tensor] * gradients[member.tensor]).double().movedim(member.dim, 0)
        change += product.flatten(1).sum(dim=1)[torch.tensor(member.index)].sum(dim=1)
    return torch.square(change)


def _distribution(activations: Tensor) -> Tensor:
    """Histogram of each column over its own range: (n, channels) to (channels, bins), rows sum to 1."""
    low, high = activations.amin(dim=0), activations.amax(dim=0)
    width = (high - low).clamp_min(1e-12)
    bins = ((activations - low) / width * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
    counts = torch.zeros(activations.shape[1], HISTOGRAM_BINS, dtype=torch.float64)
    counts.scatter_add_(1, bins.T, torch.ones_like(bins.T, dtype=torch.float64))
    return counts / activations.shape[0]


def entropy_importance(activations: Tensor) -> Tensor:
    """Entropy in nats of each channel's pooled activation over the inputs (Luo and Wu, 1706.05791, section 3.2).

    A channel that answers alike to every input carries no information. `activations` (n, channels).
    """
    p = _distribution(activations)
    return -torch.xlogy(p, p).sum(dim=1)


def gini_importance(activations: Tensor) -> Tensor:
    """Gini impurity 1 - sum p^2 of the same distribution (Breiman et al. 1984, section 4.1); range [0, 1)."""
    return 1 - _distribution(activations).square().sum(dim=1)


class Importance:
    """Channel scores of the dense model under each criterion, computed once and on first use."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        graph: Graph,
        batches: Iterable[Batch],
        reconstruction: Callable[[Group], Tensor],
    ) -> None:
        """`model` is the dense model; `batches` are calibration batches from the training split.

        `reconstruction` ranks the channels (channels,) of a group by what their readers lose without them.
        """
        self._reconstruction = reconstruction
        self._task, self._model, self._graph, self._batches = task, model, graph, list(batches)
        state = model.state_dict()
        self._state = {name: value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)}
        self._scores: dict[Criterion, dict[str, Tensor]] = {}

    def kept(self, policy: Policy) -> dict[str, Tensor]:
        """Indices of the channels that stay in each pruned group, ascending; groups that stay whole are absent."""
        found = {}
        counts = self._graph.kept(policy)
        for group in self._graph.prunable:
            if counts[group.name] < group.channels:
                order = self.scores(policy.criterion)[group.name].sort(descending=True, stable=True).indices
                found[group.name] = order[: counts[group.name]].sort().values
        return found

    def scores(self, criterion: Criterion) -> dict[str, Tensor]:
        """Importance of every channel of every prunable group."""
        if criterion not in self._scores:
            self._scores[criterion] = self._compute(criterion)
        return self._scores[criterion]

    def _compute(self, criterion: Criterion) -> dict[str, Tensor]:
        groups = self._graph.prunable
        if criterion in ("l1", "l2"):
            return {g.name: norm_importance(self._state, g, 1 if criterion == "l1" else 2) for g in groups}
        if criterion == "reconstruction":
            return {g.name: self._reconstruction(g) for g in groups}
        if criterion == "taylor":
            total = {g.name: torch.zeros(g.channels, dtype=torch.float64) for g in groups}
            for gradients in self._gradients():
                for g in groups:
                    total[g.name] += taylor_importance(self._state, gradients, g) / len(self._batches)
            return total
        measure = entropy_importance if criterion == "entropy" else gini_importance
        return {name: measure(values) for name, values in self._activations().items()}

    def _gradients(self) -> Iterator[dict[str, Tensor]]:
        """Gradient of the task's loss on each calibration batch."""
        device = next(self._model.parameters()).device
        parameters = dict(self._model.named_parameters())
        trained = {name: p.requires_grad for name, p in parameters.items()}
        try:
            for p in parameters.values():
                p.requires_grad_(True)
            for batch in self._batches:
                loss = self._task.loss(call(self._model, to_device(batch.inputs, device)), batch)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                yield {
                    name: torch.zeros_like(p, device="cpu") if g is None else g.cpu()
                    for (name, p), g in zip(parameters.items(), found, strict=True)
                }
        finally:
            for name, p in parameters.items():
                p.requires_grad_(trained[name])

    def _activations(self) -> dict[str, Tensor]:
        """What each group's first reader sees, averaged over positions: (inputs, channels)."""
        seen: dict[str, list[Tensor]] = {group.name: [] for group in self._graph.prunable}
        handles = []
        for group in self._graph.prunable:
            reader = group.consumers[0]
            module = self._model.get_submodule(reader.tensor.rpartition(".")[0])
            index = torch.tensor(reader.index)  # (channels, per_channel)

            def record(
                module: nn.Module,
                given: tuple[Any, ...],
                named: dict[str, Any],
                name: str = group.name,
                index: Tensor = index,
            ) -> None:
                value = first_input(given, named).detach().cpu()
                feature = -1 if isinstance(module, nn.Linear) else 1
                pooled = value.movedim(feature, -1).flatten(1, -2).mean(dim=1) if value.ndim > 2 else value
                seen[name].append(pooled[:, index].mean(dim=2))

            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
        device = next(self._model.parameters()).device
        try:
            with torch.no_grad():
                for batch in self._batches:
                    call(self._model, to_device(batch.inputs, device))
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(values) for name, values in seen.items()}


# --- removal --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slice:
    """Which output channels (`rows`) and input channels (`inputs`) of a weight stay, ascending; None where all do."""

    rows: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None


Remaining = Mapping[tuple[str, int], Tensor]
"""Indices that stay, ascending, by tensor and dimension; what is not named stays whole."""


def remaining(graph: Graph, kept: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """What stays of each tensor when groups have only their `kept` channels."""
    drop: dict[tuple[str, int], list[Tensor]] = {}
    for group in graph.prunable:
        if group.name in kept:
            gone = torch.ones(group.channels, dtype=torch.bool)
            gone[kept[group.name]] = False
            for member in group.members:
                drop.setdefault((member.tensor, member.dim), []).append(torch.tensor(member.index)[gone].flatten())
    stays = {}
    for (tensor, dim), indices in drop.items():
        left = torch.ones(graph.tensors[tensor][0][dim], dtype=torch.bool)
        left[torch.cat(indices)] = False
        stays[tensor, dim] = left.nonzero().flatten()
    return stays


def sliced(state: Mapping[str, Tensor], stays: Remaining) -> dict[str, Tensor]:
    """The state with only what `stays`; tensors that lose nothing are the given ones, not copies."""
    result = dict(state)
    for (tensor, dim), left in stays.items():
        if tensor in result:
            result[tensor] = result[tensor].index_select(dim, left)
    return result


def slice_of(tensor: str, stays: Remaining) -> Slice:
    """The part of a weight that `stays`."""
    rows, inputs = (stays.get((tensor, dim)) for dim in (0, 1))
    return Slice(None if rows is None else tuple(rows.tolist()), None if inputs is None else tuple(inputs.tolist()))


def remove_channels(state: Mapping[str, Tensor], graph: Graph, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with only the `kept` channels of each group, coupled tensors sliced together.

    Tensors that no pruned group touches are the given ones, not copies.
    """
    return sliced(state, remaining(graph, kept))
