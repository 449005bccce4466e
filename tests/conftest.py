"""Shared by all tests: the fakes are importable, and nothing outside a temporary folder is touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fakes import World

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["TERM"] = "dumb"
os.environ["COLUMNS"] = "200"
if os.access("/dev/shm", os.W_OK):  # temporary folders in memory: the ledger waits for the disk at every trial
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")
for _name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True, scope="session")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The built-in network and matplotlib's fonts are cached for the session, not in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    """Task files that a test imports do not stay importable for the next one."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "pytest-of-" in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """`study.search` on the fake network."""
    from fakes import World

    return World(tmp_path).install(monkeypatch)
