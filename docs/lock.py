"""Writes requirements.lock: what the package needs to run, as constraints.txt has it, with hashes of its files.

    pip install uv && python docs/lock.py

The hashes are those of the package index; PyTorch's are of its CPU build as pip finds it here, without CUDA's packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# What was tested, file by file, for Linux on x86-64 and Python 3.11, with PyTorch's CPU build:
#   pip install --no-deps --require-hashes --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.lock
#   pip install --no-deps .
# Written by docs/lock.py from constraints.txt.
"""
CUDA = ("nvidia-", "cuda-", "triton")


def entries() -> list[str]:
    """One text per package: its version and hashes."""
    command = ["uv", "pip", "compile", "pyproject.toml", "-c", "constraints.txt", "--generate-hashes", "--no-header"]
    target = ["--no-annotate", "--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"]
    text = subprocess.run([*command, *target, "-q"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [part for part in re.split(r"\n(?=\S)", text.strip()) if not part.startswith(CUDA)]


def cpu_build(entry: str) -> str:
    """PyTorch's entry, with the hash of the file that pip would install here."""
    pinned = entry.split()[0]
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-deps", "--ignore-installed"]
    report = subprocess.run([*command, "--report", "-", pinned], check=True, capture_output=True, text=True).stdout
    digest = json.loads(report)["install"][0]["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{pinned} \\\n    --hash=sha256:{digest}"


if __name__ == "__main__":
    found = [cpu_build(entry) if entry.startswith("torch==") else entry for entry in entries()]
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(found) + "\n", encoding="utf-8")
