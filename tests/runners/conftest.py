"""One cluster of raylets for the runners' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A head without room for trials and two nodes with room for one each; `address` is what drivers give."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'autocompress[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    found.wait_for_nodes()
    yield found
    found.shutdown()
