"""Which channels go, and what the weights that read them become, so that the readers' outputs change least.

Works on the rows (out, d) of each reader and the matrix H (d, d) of what these rows are multiplied with, as
`compensate` does for single weights. Knows nothing about models, graphs or where H comes from; chooses no widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 64
"""Channels go one by one while no more than this many are left, else a share of 1 / ROUNDS at a time."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads the channels: its rows (out, d), their H (d, d), each channel's columns (channels, size)."""

    rows: Tensor
    h: Tensor
    columns: Tensor


def refit(rows: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """The rows (out, kept) whose outputs on the `kept` columns are nearest to those of `rows`; float64.

    W H_:K H_KK^-1, the least-squares reconstruction of He et al. 2017, 1707.06168, equation 4. H is positive definite.
    """
    wide = h.double()[:, kept]  # (d, kept)
    factor = torch.linalg.cholesky(wide[kept])
    return torch.cholesky_solve((rows.double() @ wide).T, factor).T


def removal_ranks(readers: Sequence[Reader]) -> Tensor:
    """Rank (channels,) of each channel: 0 is the first to go; the k of highest rank are the ones to keep.

    Backward elimination: the channel goes whose loss costs the outputs of its readers least after a least-squares fit
    to those that stay, as a share of each reader's output power, summed over readers. ThiNet, 1707.06342, section 3.2,
    chooses greedily too, but without the fit.
    """
    left = torch.arange(len(readers[0].columns))
    ranks = torch.empty(len(left), dtype=torch.long)
    states = [_Remaining(reader) for reader in readers]
    while len(left):
        count = max(1, len(left) // ROUNDS)
        costs = torch.stack([state.costs() for state in states]).sum(dim=0)
        order = costs.argsort(stable=True)[:count]
        ranks[left[order]] = torch.arange(count) + len(ranks) - len(left)
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[order] = False
        for state in states:
            state.remove(stays)
        left = left[stays]
    return ranks


class _Remaining:
    """One reader, fitted to the channels that are left, with the inverse of its kept block of H."""

    def __init__(self, reader: Reader) -> None:
        h = reader.h.double()
        self._rows, self._columns = reader.rows.double(), reader.columns
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        self._power = float(((self._rows @ h) * self._rows).sum()) or 1.0

    def costs(self) -> Tensor:
        """Share of the output power (left,) that goes with each channel b: tr(W_b (H^-1)_bb^-1 W_b^T).

        The block form of the optimal brain surgeon's saliency (Hassibi and Stork 1993).
        """
        own = self._rows[:, self._columns].permute(1, 2, 0)  # (left, size, out)
        blocks = self._inverse[self._columns[:, :, None], self._columns[:, None, :]]  # (left, size, size)
        costs: Tensor = (torch.linalg.solve(blocks, own) * own).sum(dim=(1, 2)) / self._power
        return costs

    def remove(self, stays: Tensor) -> None:
        """Keep the channels of the mask `stays` (left,): the others' columns leave, and the rest makes up for them."""
        gone = self._columns[~stays].flatten()
        rest = torch.ones(len(self._inverse), dtype=torch.bool)
        rest[gone] = False
        half = torch.linalg.solve(self._inverse[gone][:, gone], self._inverse[gone][:, rest])  # (gone, rest)
        self._rows = self._rows[:, rest] - self._rows[:, gone] @ half
        self._inverse = self._inverse[rest][:, rest] - self._inverse[rest][:, gone] @ half
        self._columns = (rest.cumsum(dim=0) - 1)[self._columns[stays]]
