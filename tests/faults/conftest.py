"""A run that nobody disturbed, to compare the others with; and what starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import Starter, check_ended, trials

from autocompress.front import Trial


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    found = Starter(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def reference(starter: Starter) -> Path:
    """The folder of a run that nobody disturbed."""
    starter.search("whole")
    assert starter.ended() == 0
    found = trials(starter.folder / "whole")
    assert sum(t.evaluation.rung for t in found) >= 2
    check_ended(starter.folder / "whole", starter.folder / "whole")
    return starter.folder / "whole"


@pytest.fixture(scope="module")
def whole(reference: Path) -> list[Trial]:
    """Its trials."""
    return trials(reference)
