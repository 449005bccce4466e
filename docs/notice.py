"""Writes NOTICE: licences and versions of what the package needs to run, from the metadata of what is installed.

python docs/notice.py
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HEAD = """autocompress
Licensed under the Apache License, Version 2.0; see LICENSE.

Nothing of other packages is in this one, except that reports it writes hold Plotly's script (MIT, see below).
Installing it installs these, in the versions of constraints.txt, under their own licences:

"""


def needed(name: str, seen: dict[str, Distribution]) -> None:
    """Add `name` and all that it needs, without extras, in this environment."""
    for text in distribution(name).requires or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = distribution(wanted.name)
        except PackageNotFoundError:  # another platform's
            continue
        key = found.metadata["Name"].lower().replace("_", "-")
        if key not in seen:
            seen[key] = found
            needed(wanted.name, seen)


def licence(found: Distribution) -> str:
    """As the package says it: an SPDX expression, a short text, or its classifiers."""
    about = found.metadata
    classified = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    classified = [c for c in classified if c != "OSI Approved"]
    text = (about.get("License") or "not stated").strip().splitlines()[0]
    return about.get("License-Expression") or ", ".join(classified) or text


def lines() -> Iterator[str]:
    """One per package."""
    seen: dict[str, Distribution] = {}
    needed("autocompress", seen)
    for name, found in sorted(seen.items()):
        yield f"{name} {found.version.split('+')[0]}: {licence(found)}"


if __name__ == "__main__":
    (ROOT / "NOTICE").write_text(HEAD + "\n".join(lines()) + "\n", encoding="utf-8")
