"""The pages under docs/ say what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress import ClassificationTask
from autocompress.report.tables import COLUMNS
from autocompress.space import parse_space

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "reports").rglob("*.md")]
)


def block(page: str, kind: str) -> list[str]:
    """Blocks of code of one kind on a page of docs/."""
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_every_verb_has_a_page_with_its_options() -> None:
    """After a change of an option: `python docs/verbs.py`."""
    told = subprocess.run(
        [sys.executable, ROOT / "docs" / "verbs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stdout + told.stderr
    for path in (ROOT / "docs" / "verbs").glob("*.md"):
        assert path.read_text(encoding="utf-8").startswith(f"# `{path.stem}`: "), path


def test_every_column_is_described_with_its_type() -> None:
    text = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (\w+) \| .+ \|$", text, re.MULTILINE)) == COLUMNS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_example_spaces_are_spaces() -> None:
    spaces = [parse_space(text, "docs/space.md") for text in block("space.md", "toml")]
    assert spaces[0].override[0].match == "classifier*"


def test_the_example_tasks_are_tasks() -> None:
    first, viewed, second = block("task.md", "python")
    known = {name: torch.zeros(6, 4) for name in ("x_train", "x_val", "x_test")}
    known |= {name: torch.arange(6) % 3 for name in ("y_train", "y_val", "y_test")}
    splits = {name: (known[f"x_{name}"], known[f"y_{name}"]) for name in ("train", "val", "test")}
    scope = {"model": nn.Linear(4, 3), "ClassificationTask": ClassificationTask, **known, **splits}
    exec(viewed, scope)
    (mirrored,) = scope["task"]().views(torch.arange(4.0)[None])  # type: ignore[operator]
    assert mirrored.tolist() == [[3, 2, 1, 0]]
    exec(first + second, scope)
    task = scope["task"]()  # type: ignore[operator]
    assert task.name == "pets"
    assert set(task.details(task.model(), "val")) == {"class 0", "class 1", "class 2"}
    assert scope["Pets"].class_name(task, 1) == "dog"  # type: ignore[attr-defined]
