"""Bytes that are nearly sound: what a torn disk, a bug or an enemy makes of a file. Knows nothing about readers."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

EDGES = (0, 1, 2, 3, 8, 9, 16, 63, 64, 127, 128, 254, 255)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 9, 64, 2**31 - 1, 2**31, 2**39, 2**40, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "x", "../../etc/passwd", "/dev/zero"),
    *("$HOME", "http://localhost/x", "\0", "é", [], {}, [0] * 40),
)
"""What replaces a value of a JSON document: edges of every type."""
DEEP = 3000
"""Levels of nesting, above what the interpreter's recursion allows."""


def mutated(draw: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` after one to five changes; of a JSON document often of its values instead of its bytes."""
    content = draw.choice(seeds)
    if draw.random() < 0.5 and (changed := _json(draw, content)) is not None:
        return changed
    for _ in range(draw.randint(1, 5)):
        content = draw.choice(_CHANGES)(draw, content, seeds)
    return content


def _at(draw: random.Random, content: bytes) -> int:
    return draw.randrange(len(content)) if content else 0


def _flip(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    at = _at(draw, content)
    return content[:at] + bytes([byte ^ 1 << draw.randrange(8) for byte in content[at : at + 1]]) + content[at + 1 :]


def _set(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """An edge as one, two, four or eight bytes of either order."""
    at, width = _at(draw, content), draw.choice((1, 2, 4, 8))
    value = draw.choice(EDGES) if draw.random() < 0.5 else -1 - draw.choice(EDGES)
    order: Any = draw.choice(("little", "big"))
    return content[:at] + (value % 256**width).to_bytes(width, order) + content[at + width :]


def _cut(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    return content[: _at(draw, content)]


def _delete(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    at = _at(draw, content)
    return content[:at] + content[at + draw.randint(1, 16) :]


def _insert(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    at, length = _at(draw, content), draw.randint(1, 16)
    return content[:at] + bytes(draw.randrange(256) for _ in range(length)) + content[at:]


def _repeat(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    at = _at(draw, content)
    return content[:at] + content[at : at + draw.randint(1, 64)] * draw.randint(2, 20) + content[at:]


def _splice(draw: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    other = draw.choice(seeds)
    return content[: _at(draw, content)] + other[_at(draw, other) :]


def _number(draw: random.Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """Digits become other digits."""
    places = [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58]
    if not places:
        return content
    at = draw.choice(places)
    return content[:at] + str(draw.choice(NUMBERS[:16])).encode() + content[at + 1 :]


_CHANGES = (_flip, _set, _cut, _delete, _insert, _repeat, _splice, _number)


def _json(draw: random.Random, content: bytes) -> bytes | None:
    """Some values of a JSON document replaced, removed, doubled or nested; None if it is none."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):  # it may be nested already
        return None
    for _ in range(draw.randint(1, 3)):
        holder, key = _place(draw, data)
        if holder is None:
            data = _value(draw)
        elif (kind := draw.random()) < 0.7:
            holder[key] = _value(draw)
        elif kind < 0.85:
            del holder[key]
        elif isinstance(holder, list):
            holder += holder[:64]
        else:
            holder[draw.choice(("", "x", "__class__", "\0"))] = _value(draw)
    text = json.dumps(data)
    if draw.random() < 0.02:
        text = text.replace("null", "[" * DEEP + "]" * DEEP)
    return text.encode()


def _value(draw: random.Random) -> Any:
    return copy.copy(draw.choice(NUMBERS))  # lists among them are changed later


def _place(draw: random.Random, data: Any) -> tuple[Any, Any]:
    """A random (container, key) in `data`; (None, None) for the whole."""
    holder, key = None, None
    while isinstance(data, dict | list) and data and draw.random() < 0.85:
        holder = data
        key = draw.choice(list(data)) if isinstance(data, dict) else draw.randrange(len(data))
        data = holder[key]
    return holder, key
