"""The runs kept under reports/ are what their journals say; the journals are what the searches wrote."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from autocompress.report.tables import Run, csv_bytes, table
from autocompress.report.write import summary_text

REPORTS = Path(__file__).parent.parent / "reports"
EXAMPLES = sorted(path.parent for path in REPORTS.glob("*/journal.sqlite"))


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.name)
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Run]:
    """The folder as it is kept, and the run in a copy of it, by the same relative name."""
    kept: Path = request.param
    shutil.copytree(kept, tmp_path / "reports" / kept.name, ignore=shutil.ignore_patterns("report.html"))
    monkeypatch.chdir(tmp_path)
    return kept, Run.read(Path("reports") / kept.name)


def test_there_are_two() -> None:
    assert [path.name for path in EXAMPLES] == ["cifar10", "digits"]


def test_tables_and_summary_are_what_the_journal_says(example: tuple[Path, Run]) -> None:
    """After a change of a format: the command in reports/README.md writes them anew."""
    kept, run = example
    for name, trials in (("front.csv", run.front), ("trials.csv", run.trials)):
        assert (kept / name).read_bytes() == csv_bytes(table(trials, run.budget, run.parents, run.metric))
    assert (kept / "summary.md").read_text(encoding="utf-8") == summary_text(run)


def test_what_is_said_of_the_run_is_in_its_journal(example: tuple[Path, Run]) -> None:
    kept, run = example
    section = (REPORTS / "README.md").read_text(encoding="utf-8").split(f"\n## {kept.name}\n")[1].split("\n## ")[0]
    assert run.picked is not None
    m = run.picked.measured
    said = re.search(r"Picked: trial (\d+), ([\d,]+) bytes, val ([\d.]+), test (\d\.\d+)", section)
    assert said is not None
    assert said.groups() == (
        str(run.picked.number),
        f"{m.bytes:,}",
        f"{m.quality:.4f}",
        f"{run.picked.quality_test:.4f}",
    )
    assert f"{run.dense.bytes:,} bytes" in section
    assert run.config["command"] in section


def test_what_is_kept_is_small(example: tuple[Path, Run]) -> None:
    kept, _ = example
    sizes = {path: path.stat().st_size for path in kept.rglob("*") if path.is_file() and path.name != "report.html"}
    assert sum(sizes.values()) < 1_200_000
