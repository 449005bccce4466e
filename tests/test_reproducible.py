"""Equal seeds give equal searches: the same as before, as their folder says, and as a kept run.

After a change that is meant to change searches, write the kept run anew: AUTOCOMPRESS_GOLDEN=write pytest, and say so.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

from fakes import World

from autocompress.study import read_config, search

GOLDEN = Path(__file__).parent / "golden" / "search.json"


def replayed(world: World, folder: Path) -> list[list[object]]:
    """What a search did, without what depends on versions of libraries: policies, status, bytes, quality."""
    world.search(folder=folder, controller="solver", epochs=0, trials=25, seed=7)
    return [
        [row["number"], row["status"], row["policy"]]
        + ([row["measurement"]["bytes"], round(row["measurement"]["quality"] or 0, 9)] if row["measurement"] else [])
        for row in world.rows(folder)
    ]


def test_search_is_the_one_that_was_kept(world: World, tmp_path: Path) -> None:
    found = replayed(world, tmp_path / "now")
    assert found == replayed(world, tmp_path / "again")
    if os.environ.get("AUTOCOMPRESS_GOLDEN") == "write":
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    kept = json.loads(GOLDEN.read_text())
    for now, before in zip(found, kept, strict=True):
        size = now[3:4], before[3:4]
        if all(size):  # the header names versions, whose length may change
            assert abs(now[3] - before[3]) < 40  # type: ignore[operator]
        assert [*now[:3], *now[4:]] == [*before[:3], *before[4:]]


def test_folder_says_all_that_repeats_its_run(world: World, tmp_path: Path) -> None:
    world.search(controller="tpe", seed=3, epochs=2, trials=12)
    settings, space, config = read_config(world.run)
    search(settings, tmp_path / "repeated", space=space)
    assert world.rows(tmp_path / "repeated") == world.rows()
    frozen = dict(line.split("==") for line in (world.run / "freeze.txt").read_text().splitlines())
    installed = {name: found for name, found in config["versions"].items() if name != "python"}
    assert {name: frozen[name] for name in installed} == installed
    assert frozen["hypothesis"] == version("hypothesis")
