"""Bytes of a candidate: how long the file is that it leads to."""

from __future__ import annotations

from importlib.metadata import version

from autocompress.artifact.layout import Coded, Header, file_bytes, header_for
from autocompress.graph import Graph
from autocompress.policy import Policy


class Size:
    """Predicts file lengths for one task; the same header is written with the artifact.

    `coded` maps weight names to the lengths of their entropy coded codes. With those of all weights a length is exact,
    without them it is an upper bound that needs no tensors.
    """

    def __init__(self, graph: Graph, task: str, metric: str) -> None:
        self._graph, self._task, self._metric = graph, task, metric
        self._versions = {name: version(name).split("+")[0] for name in ("autocompress", "torch")}

    def header(self, policy: Policy, coded: Coded | None = None) -> Header:
        """What the file of `policy` says of itself."""
        return header_for(self._graph, policy, self._task, self._metric, self._versions, coded)

    def __call__(self, policy: Policy, coded: Coded | None = None) -> int:
        """Length in bytes of the packed file of `policy`."""
        return file_bytes(self.header(policy, coded))
