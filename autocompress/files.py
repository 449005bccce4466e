"""Where cached files are, and writing so that a reader sees the old content or the whole new one.

Knows nothing about contents.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """`$AUTOCOMPRESS_CACHE`, or the user's cache folder."""
    given = os.environ.get("AUTOCOMPRESS_CACHE")
    return Path(given) if given else user_cache_path("autocompress")


def write(path: Path, content: bytes, *, durable: bool = True) -> int:
    """Write atomically and durably; the length of the file. On failure the old file and no other is there.

    What can be made again need not be `durable`: it does not wait for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            Path(file.name).chmod(0o666 & ~_umask())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    if durable:
        _sync_folder(path.parent)
    return path.stat().st_size


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
