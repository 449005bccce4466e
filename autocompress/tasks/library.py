"""Models from libraries, without a line of code: `hf:PATH_OR_NAME` (transformers) and `timm:NAME`.

There are inputs but no labels: the compressed model should go on giving what the library's model gives. Weights come
from safetensors alone, and no code that lies beside a model is run.
"""

from __future__ import annotations

import importlib
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.task import Split, call, first_output, head
from autocompress.tasks.outputs import Closeness, OutputsTask, closeness

TOKENS = 64
"""Most tokens of a text: longer ones are cut, shorter ones padded."""
SENTENCES = 4096
"""Sentences of Python's own documentation, where the user gives no texts."""
BATCH = 32
SHORTEST, LONGEST = 30, 300
"""Characters of a sentence among these."""


def library_task(spec: str, data: Path | None, checkpoint: Path | None) -> OutputsTask:
    """The task of `hf:...` or `timm:...`. Raises `TaskError` that names the fix."""
    library, _, name = spec.partition(":")
    if not name:
        raise TaskError(f"{spec!r} names no model: hf:FOLDER, hf:ORGANISATION/NAME or timm:NAME")
    return _timm(name, data, checkpoint) if library == "timm" else _transformers(name, data, checkpoint)


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"{extra}: needs {name}: pip install 'autocompress[{extra}]'") from error


# --- transformers ---------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """An encoder whose outputs are positions: the mean of those that are not padding, (n, width)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        """Keyword arguments are the encoder's; `attention_mask` (n, positions) is among them."""
        positions = first_output(self.encoder(**inputs))  # (n, positions, width)
        weighs = inputs["attention_mask"].unsqueeze(-1).to(positions.dtype)
        return (positions * weighs).sum(dim=1) / weighs.sum(dim=1).clamp_min(1.0)


class LibraryTask(OutputsTask):
    """Has the other ways of being near as details."""

    def details(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Mean cosine similarity and, for embeddings, the rank correlation of similarities."""
        kinds: tuple[Closeness, ...] = ("cosine", "rank") if self.metric == "rank" else ("cosine",)
        found, wanted = self.outputs(model, self.batches(split))
        return {kind: closeness(found, wanted, kind) for kind in kinds}


def _transformers(name: str, data: Path | None, checkpoint: Path | None) -> OutputsTask:
    if checkpoint is not None:
        raise TaskError("hf: reads the weights beside the model's configuration; leave --checkpoint out")
    library = _library("transformers", "hf")
    model = _pretrained(library, name)
    inputs = _inputs(data) if data is not None and data.suffix == ".safetensors" else None
    splits = inputs or _tokenised(library, name, _lines(data) if data is not None else documentation())
    metric = _kept(name, model, splits["val"])
    wrapped = Embedding(model) if metric == "rank" else model
    title = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name or name).strip("-").lower()
    return LibraryTask(
        wrapped, splits["train"], splits["val"], splits["test"], metric=metric, name=f"hf-{title}", batch_size=BATCH
    )


def _pretrained(library: Any, name: str) -> nn.Module:
    """The model in the class that its configuration names, in single precision."""
    try:
        config = library.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = next((k for k in getattr(config, "architectures", None) or () if hasattr(library, k)), "AutoModel")
        found: nn.Module = getattr(library, kind).from_pretrained(
            name, config=config, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, ImportError) as error:
        raise TaskError(f"hf:{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return found.eval()


def _kept(name: str, model: nn.Module, inputs: Any) -> Closeness:
    """How a model stays near: by its answers, by the ranks of its texts' embeddings, or else by its outputs.

    Raises `TaskError` for one that answers at every position: all its answers would not fit into memory.
    """
    with torch.inference_mode():
        outputs = call(model, head(inputs, 2))
    first = first_output(outputs)
    if not (isinstance(outputs, Mapping) and "logits" in outputs):
        texts = isinstance(inputs, Mapping) and "attention_mask" in inputs
        return "rank" if first.ndim == 3 and texts else "cosine"
    if first.ndim > 2:
        raise TaskError(
            f"hf:{name} is {type(model).__name__}, which answers at every position; hf: keeps encoders and classifiers "
            "of whole inputs: write a task file for it (`autocompress init`)"
        )
    return "agreement"


def _tokenised(library: Any, name: str, texts: Sequence[str]) -> dict[Split, Any]:
    try:
        tokeniser = library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise TaskError(f"hf:{name} has no tokeniser ({said}): give its inputs as --data FILE.safetensors") from error
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return {split: dict(tokeniser(part, **options)) for split, part in _parts(texts).items()}


def _parts(texts: Sequence[str]) -> dict[Split, list[str]]:
    """Eight in ten for `train`, one each for `val` and `test`, evenly over the file."""
    found: dict[Split, list[str]] = {"train": [], "val": [], "test": []}
    for i, text in enumerate(texts):
        found["val" if i % 10 == 8 else "test" if i % 10 == 9 else "train"].append(text)
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read the texts in {path}: {error}") from None
    found = list(dict.fromkeys(line for line in lines if line))
    if len(found) < 50:
        raise TaskError(f"{path} has {len(found)} different lines; give 50 texts or more, one a line")
    return found


def documentation(count: int = SENTENCES) -> list[str]:
    """Up to `count` English sentences of what Python's standard library says of itself, without repeats.

    Evenly from all modules that can be read without being imported.
    """
    found: dict[str, None] = {}
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(folder).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for quoted in re.findall(r'"""(.*?)"""', text, flags=re.DOTALL):
            for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", quoted):
                plain = " ".join(sentence.split())
                if SHORTEST <= len(plain) <= LONGEST and re.fullmatch(r"[A-Z][\w ,.;:'()\-`\"/]*[.!?]", plain):
                    found.setdefault(plain)
    every = list(found)
    if len(every) < 50:
        raise TaskError(f"Python's library at {folder} has no texts: give some as --data FILE.txt, one a line")
    step = max(1, len(every) // count)
    return every[::step][:count]


# --- timm -----------------------------------------------------------------------------------------------


def _timm(name: str, data: Path | None, checkpoint: Path | None) -> OutputsTask:
    library: Any = _library("timm", "timm")
    if data is None or data.suffix != ".safetensors":
        raise TaskError("timm: needs --data FILE.safetensors with images as train/images, val/images, test/images")
    try:
        model: nn.Module = library.create_model(name, pretrained=checkpoint is None)
        if checkpoint is not None:
            model.load_state_dict(load_file(checkpoint))
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise TaskError(f"timm:{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    splits = _inputs(data)
    return LibraryTask(
        model, splits["train"], splits["val"], splits["test"], metric="agreement", name=f"timm-{name}", batch_size=BATCH
    )


# --- inputs ---------------------------------------------------------------------------------------------


def _inputs(path: Path) -> dict[Split, Any]:
    """Tensors named `SPLIT/ARGUMENT`; one argument alone goes in by position."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"cannot read the inputs in {path}: {error}") from None
    splits: dict[Split, Any] = {}
    for split in ("train", "val", "test"):
        own = {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{split}/")}
        if not own:
            said = ", ".join(sorted(found)[:5]) or "none"
            raise TaskError(f"{path} has no tensor named {split}/ARGUMENT; it has: {said}")
        splits[split] = own if len(own) > 1 else next(iter(own.values()))
    return splits
