"""Tensors by name that are on disk if they are too many for memory. Knows nothing about what they are.

The file has no name and belongs to this process: nobody else reads it, and it is gone with the process.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from autocompress.files import cache_folder

LIMIT_BYTES = 512 * 2**20
"""Most that is kept in memory."""
LEAST_BYTES, SHARE = 64 * 2**20, 4
"""Beside a model no more is kept than a quarter of its size, but for small ones this much."""


def limit_beside(model_bytes: int) -> int:
    """Bytes that may stay in memory beside a model of `model_bytes`."""
    return min(LIMIT_BYTES, max(LEAST_BYTES, model_bytes // SHARE))


class Spill(MutableMapping[str, Tensor]):
    """What is read is the tensor itself if they are in memory, else a copy: store what changed.

    Shape and type of what is stored under a name stay the same.
    """

    def __init__(self, expected: int, limit: int | None = None) -> None:
        """More than `limit` bytes `expected` in all are on disk."""
        self._held: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        self._file: IO[bytes] | None = None
        if expected > (LIMIT_BYTES if limit is None else limit):
            self._file = _unnamed()
            weakref.finalize(self, self._file.close)

    def __setitem__(self, name: str, value: Tensor) -> None:
        if self._file is None:
            self._held[name] = value
            return
        array = value.detach().cpu().contiguous().numpy()
        if name not in self._places:
            self._places[name] = self._file.seek(0, 2), array.dtype, array.shape
        self._file.seek(self._places[name][0])
        array.tofile(self._file)

    def __getitem__(self, name: str) -> Tensor:
        if self._file is None:
            return self._held[name]
        at, kind, shape = self._places[name]
        self._file.seek(at)
        return torch.from_numpy(np.fromfile(self._file, kind, int(np.prod(shape, dtype=np.int64))).reshape(shape))

    def __delitem__(self, name: str) -> None:
        del (self._held if self._file is None else self._places)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held if self._file is None else self._places))

    def __len__(self) -> int:
        return len(self._held if self._file is None else self._places)


def _unnamed() -> IO[bytes]:
    """A file in the package's cache folder, or where the system keeps what is temporary."""
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache_folder(), buffering=0)
    return tempfile.TemporaryFile(buffering=0)
