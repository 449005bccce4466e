"""What is shipped: the wheel holds the package and nothing else, and NOTICE names what installing it brings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {".toml", ".j2", ".css", ".js", ".py.txt"}
"""What the package reads beside its modules."""


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "autocompress", tmp_path / "autocompress", ignore=shutil.ignore_patterns("__pycache__"))
    for stray in ("autocompress/secret.key", "autocompress/report/notes.md", "tests/test_x.py"):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).write_text("not to be shipped")
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if ".dist-info/" in name}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "autocompress").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or any(path.name.endswith(end) for end in DATA)
    }
    assert names - about == package, done.stdout
    assert {name.partition("/")[2] for name in about} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"),
        *("licenses/LICENSE", "licenses/NOTICE"),
    }


def test_notice_names_every_dependency_in_the_version_that_is_pinned() -> None:
    notice = dict(re.findall(r"^([\w.-]+) ([\w.]+): \S", (ROOT / "NOTICE").read_text(encoding="utf-8"), re.M))
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    pinned = {name.lower().replace("_", "-"): number for name, number in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = {re.split(r"[<>=\[ ]", text)[0] for text in project["dependencies"]}
    assert direct <= set(notice)
    assert {name: pinned.get(name) for name in notice if name != "setuptools"} == {
        name: number for name, number in notice.items() if name != "setuptools"
    }


def test_lock_holds_the_same_versions_each_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==(\S+) \\\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M)
    assert "".join(f"{name}=={number} \\\n{hashes}" for name, number, hashes in entries) == re.sub("#.*\n", "", text)
    locked = {name: number for name, number, _ in entries}
    notice = dict(re.findall(r"^([\w.-]+) ([\w.]+): \S", (ROOT / "NOTICE").read_text(encoding="utf-8"), re.M))
    assert {name: locked.get(name) for name in notice if name != "setuptools"} == {
        name: number for name, number in notice.items() if name != "setuptools"
    }
