"""The state of an interrupted training on disk, as tensors and JSON. Knows nothing about what is trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autocompress.engine.cache import digest
from autocompress.files import write


@dataclass(frozen=True)
class Checkpoint:
    """A file that belongs to one training, which `identity` stands for."""

    path: Path
    identity: str

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file, atomically; warn where nothing can be written. `facts` is plain data."""
        own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        about = json.dumps(facts, sort_keys=True)
        content = save(own, {"identity": self.identity, "facts": about, "digest": _digest(own, about)})
        try:
            write(self.path, content)
        except OSError as error:  # the training itself is none the worse for it
            warnings.warn(f"{self.path} is not kept, and a killed training starts anew: {error}", stacklevel=2)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last; None, with a warning, if the file is torn or of another training; None if absent."""
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            reason = f"it is damaged ({error})"
        else:
            text = about.get("facts", "")
            mine = about.get("identity") == self.identity and about.get("digest") == _digest(tensors, text)
            if mine and (facts := _object(text)) is not None:
                return tensors, facts
            whole = about.get("identity") not in (None, self.identity)
            reason = "it belongs to another policy, task or seed" if whole else "its content has changed"
        warnings.warn(f"{self.path} is ignored, and training starts anew: {reason}", stacklevel=2)
        return None

    def remove(self) -> None:
        """Forget it: training is over."""
        self.path.unlink(missing_ok=True)


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None if there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    return digest(facts, *(part for name in sorted(tensors) for part in (name, tensors[name])))
