"""How many random cases a test draws: few in the suite, as many as `$AUTOCOMPRESS_CASES` says in a long run."""

from __future__ import annotations

import os


def cases(usual: int) -> int:
    """`usual`, unless the environment says otherwise."""
    return int(os.environ.get("AUTOCOMPRESS_CASES", usual))
