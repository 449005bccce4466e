"""What recovery trainings were worth, as plain data, kept for later searches of the same model and data.

Knows nothing of who proposes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autocompress.errors import PolicyError
from autocompress.files import write
from autocompress.policy import Policy, Recovery

KEPT = 500
"""Lessons of a task that are kept, the latest."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training: its recipe, the file's share of the dense bytes, log(loss after / loss of the one-shot policy)."""

    recovery: Recovery
    share: float
    gain: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and math.isfinite(self.share) and self.share > 0):
            raise PolicyError(f"a lesson has share {self.share} and gain {self.gain}; both must be finite, share > 0")

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal lesson back."""
        return {"recovery": asdict(self.recovery), "share": self.share, "gain": self.gain}

    @classmethod
    def from_json(cls, data: Any) -> Lesson:
        """What `to_json` wrote. Raises `PolicyError`, `KeyError`, `TypeError` or `ValueError` on anything else."""
        recovery = Policy.from_json({"recovery": data["recovery"]}).recovery
        return cls(recovery, float(data["share"]), float(data["gain"]))


def read_lessons(path: Path) -> list[Lesson]:
    """What `keep_lessons` wrote; a file that cannot be read, or an entry, teaches nothing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return lessons_of(data)


def lessons_of(rows: Any) -> list[Lesson]:
    """The lessons among `rows`; whatever is none is left out."""
    found = []
    for row in rows if isinstance(rows, list) else []:
        try:
            found.append(Lesson.from_json(row))
        except (PolicyError, KeyError, TypeError, ValueError, OverflowError):
            continue
    return found


def keep_lessons(path: Path, lessons: Iterable[Lesson]) -> None:
    """Add `lessons` to the file, those it holds already left out. Of two searches that end at once one may be lost.

    Raises `OSError` where nothing can be written.
    """
    known: Sequence[Lesson] = read_lessons(path)
    new = [lesson for lesson in dict.fromkeys(lessons) if lesson not in known]
    if new:
        rows = [lesson.to_json() for lesson in (*known, *new)[-KEPT:]]
        write(path, json.dumps(rows).encode())
