"""Tensors on disk under the digest of what determines them, shared between processes. Knows nothing about layers.

A cache can only cost time: files that are damaged or foreign are passed over, and a folder that cannot be written is
reported once and then left alone. Several processes may write the same entry: each replaces it whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autocompress.files import cache_folder, write

LIMIT_BYTES = 4 * 2**30
"""Files that have not been used for longest go when the folder holds more."""


def digest(*parts: Any) -> str:
    """64 hexadecimal digits that stand for the parts: tensors by type, shape and bytes, others by `repr`."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            value = part.detach().cpu().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.flatten().view(torch.uint8).numpy().data)
        else:
            found.update(repr(part).encode())
        found.update(b"|")
    return found.hexdigest()


class Cache:
    """Named tensors by key in `folder`; by default `levels` in the package's cache folder."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        """Creates nothing yet. `limit` in bytes."""
        self._folder = cache_folder() / "levels" if folder is None else folder
        self._limit = LIMIT_BYTES if limit is None else limit
        self._writable = True
        self._until_sweep = 0
        self._used: set[str] = set()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under `key`, mapped into memory and not to be written to; None if there are none to trust."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                sound = (file.metadata() or {}).get("digest") == _contents(found)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            self.refuse(key, str(error))
            return None
        if not sound:
            self.refuse(key, "its contents are not what was written")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
        self._used.add(key)
        return found

    def pack(self, keys: Iterable[str], limit: int) -> dict[str, bytes]:
        """The files of these entries and of all that were used before, as far as there are any, up to `limit` bytes."""
        found, total = dict[str, bytes](), 0
        for key in sorted({*keys, *self._used}):
            with contextlib.suppress(OSError):
                content = self._path(key).read_bytes()
                total += len(content)
                if total > limit:
                    break
                found[key] = content
        return found

    def unpack(self, files: Mapping[str, bytes]) -> None:
        """Keep what `pack` gave on another machine, if the folder can be written; what is there already stays."""
        with contextlib.suppress(OSError):
            for key, content in files.items():
                if not self._path(key).exists():
                    write(self._path(key), content, durable=False)

    def refuse(self, key: str, reason: str) -> None:
        """Warn that the entry is not used; it is found anew and replaced."""
        warnings.warn(f"{self._path(key)} is ignored and will be replaced: {reason}", stacklevel=2)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors under `key`, if the folder can be written."""
        if not self._writable:
            return
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            size = write(self._path(key), save(whole, {"digest": _contents(whole)}), durable=False)
            self._used.add(key)
            self._until_sweep -= size
            if self._until_sweep < 0:
                self._until_sweep = self._limit // 16
                self._sweep()
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"layer solutions are not cached in {self._folder}: {error}; set AUTOCOMPRESS_CACHE to a folder"
                " that can be written",
                stacklevel=2,
            )

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _sweep(self) -> None:
        """Remove the files that were used longest ago, until the rest leaves room for what comes before the next."""
        found = []
        for path in self._folder.iterdir():  # what a killed process left half written, too
            with contextlib.suppress(OSError):  # another process may have removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit - self._limit // 16:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _contents(tensors: Mapping[str, Tensor]) -> str:
    parts: Iterable[Any] = (part for name in sorted(tensors) for part in (name, tensors[name]))
    return digest(*parts)
