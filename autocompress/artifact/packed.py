"""The packed `.acz` file: writes what the engine stored, bit for bit, and reads it back without trusting it.

`docs/format.md` describes the bytes. Decides nothing: codings come from `layout`.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from autocompress import coding
from autocompress.artifact.layout import MAGIC, PREFIX, RAW_BYTES, Entry, Header
from autocompress.errors import ArtifactError
from autocompress.graph import tensors_fingerprint
from autocompress.stored import (
    BYTE_EXPONENTS,
    MAX_EXPONENT,
    Byte,
    Full,
    Half,
    Quantised,
    Raw,
    Stored,
    StoredModel,
    from_byte,
    from_half,
    to_byte,
    to_half,
)
from autocompress.surgery import foreign_state, install, tensors_of, without
from autocompress.task import Task, eager

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in RAW_BYTES}


# --- sections -------------------------------------------------------------------------------------------


def pack_bits(values: Bytes, bits: int) -> bytes:
    """Each value's lowest `bits` bits, most significant first, values one after another, zero-padded to a byte."""
    planes = np.unpackbits(values[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(planes).tobytes()


def unpack_bits(content: Bytes, bits: int, count: int) -> Bytes:
    """The `count` values that `pack_bits` packed."""
    planes = np.unpackbits(content, count=count * bits).reshape(count, bits)
    padded = np.zeros((count, 8), dtype=np.uint8)
    padded[:, 8 - bits :] = planes
    return np.packbits(padded, axis=1).reshape(count)


def _floats(values: Tensor, bits: int) -> tuple[bytes, bytes]:
    """The exponent (with 8 bits twice that, plus 1 if signed) as int16 and the floats, all little-endian."""
    if bits == 8:
        codes, exponent, signed = to_byte(values)
        return struct.pack("<h", 2 * exponent + signed), codes.numpy().tobytes()
    halves, exponent = to_half(values)
    return struct.pack("<h", exponent), halves.numpy().astype("<f2").tobytes()


def write_section(entry: Entry, stored: Stored) -> bytes:
    """The bytes of one tensor: exponent and scales, zero points, mask, values, as far as it has them."""
    mask = getattr(stored, "mask", None)
    marked = mask if entry.coding == "bitmask" else None
    head = np.packbits(marked.flatten().numpy()).tobytes() if marked is not None else b""
    if isinstance(stored, Quantised):
        exponent, scale = _floats(stored.scale, entry.scale_bits)
        zero = b"" if stored.symmetric else stored.zero.numpy().tobytes()
        return exponent + scale + zero + head + _codes(entry, stored, marked)
    values = stored.dense() if marked is None else stored.dense()[marked]
    if isinstance(stored, Half | Byte):
        exponent, floats = _floats(values.flatten(), entry.bits)
        return exponent + head + floats
    if isinstance(stored, Full):
        return head + values.flatten().numpy().astype("<f4").tobytes()
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _codes(entry: Entry, stored: Quantised, marked: Tensor | None) -> bytes:
    if entry.coding == "entropy":
        return coding.encode(stored.symbols().numpy(), entry.bits)
    codes = (stored.codes if marked is None else stored.codes[marked]).flatten()
    return pack_bits((codes >> 1 if entry.bits == 1 else codes).numpy(), entry.bits)


class _Reader:
    """Takes consecutive pieces of a section whose total length was checked."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._at = content, 0

    def take(self, count: int) -> Bytes:
        piece = np.frombuffer(self._content[self._at : self._at + count], dtype=np.uint8)
        self._at += count
        return piece

    def floats(self, bits: int, exponent: int, count: int) -> Tensor:
        if bits == 8:
            values = from_byte(torch.from_numpy(self.take(count).copy()), exponent >> 1, signed=bool(exponent & 1))
        else:
            values = from_half(torch.from_numpy(self.take(2 * count).view("<f2").astype(np.float32)), exponent)
        if not bool(torch.isfinite(values).all()):
            raise ArtifactError("the artifact holds a value that is not finite")
        return values

    def exponent(self, bits: int) -> int:
        """What `_floats` wrote first."""
        value = int(self.take(2).view("<i2")[0])
        low, high = BYTE_EXPONENTS if bits == 8 else (-MAX_EXPONENT - 1, MAX_EXPONENT)
        if not low <= (value >> 1 if bits == 8 else value) <= high:
            raise ArtifactError(f"the artifact holds an impossible exponent, {value}")
        return value


def read_section(entry: Entry, content: memoryview) -> Stored:
    """The tensor that `write_section` wrote. `content` is exactly `entry.nbytes` long."""
    reader, shape, numel = _Reader(content), entry.shape, math.prod(entry.shape)
    if entry.kind == "raw":
        values = torch.from_numpy(reader.take(entry.nbytes).copy())
        if entry.dtype == "bool" and numel and int(values.max()) > 1:
            raise ArtifactError(f"tensor {entry.name!r} is not boolean")
        typed = values.view(_DTYPES[entry.dtype]) if numel else values.to(_DTYPES[entry.dtype])
        return Raw(typed.reshape(shape))
    small = entry.kind == "byte" or entry.scale_bits == 8
    exponent = reader.exponent(8 if small else 16) if entry.kind != "full" else 0
    if entry.kind == "quantised":
        scale = reader.floats(entry.scale_bits, exponent, shape[0])
        half = 2 ** (entry.bits - 1)
        zero = (
            torch.full((shape[0],), half, dtype=torch.uint8)
            if entry.symmetric
            else torch.from_numpy(reader.take(shape[0]).copy())
        )
        if len(zero) and int(zero.max()) >= 2**entry.bits:
            raise ArtifactError(f"tensor {entry.name!r} has a zero point outside its grid")
    mask = None
    if entry.coding == "bitmask":
        mask = torch.from_numpy(np.unpackbits(reader.take(-(-numel // 8)), count=numel).astype(bool)).reshape(shape)
        if int(mask.sum()) != entry.count:
            raise ArtifactError(f"tensor {entry.name!r} announces {entry.count} values and marks {int(mask.sum())}")
    if entry.kind == "quantised":
        rows = zero.reshape(-1, *[1] * (len(shape) - 1))
        codes = _place(_codes_of(entry, reader, rows), shape, mask, rows.expand(shape))
        scale_bits: Literal[8, 16] = 8 if entry.scale_bits == 8 else 16
        return Quantised(codes, scale, zero, entry.bits, entry.symmetric, mask, scale_bits=scale_bits)
    if entry.kind == "byte":
        return Byte(reader.floats(8, exponent, entry.count).reshape(shape))
    if entry.kind == "half":
        return Half(_place(reader.floats(16, exponent, entry.count), shape, mask, torch.zeros(shape)), mask)
    floats = torch.from_numpy(reader.take(4 * entry.count).view("<f4").astype(np.float32))
    if bool(torch.isnan(floats).any()):
        raise ArtifactError(f"tensor {entry.name!r} holds a value that is not a number")
    return Full(_place(floats, shape, mask, torch.zeros(shape)), mask)


def _codes_of(entry: Entry, reader: _Reader, zero: Tensor) -> Tensor:
    """The codes that `_codes` wrote, uint8, flat; `zero` as `entry.shape` with all sizes after the first 1."""
    if entry.coding == "entropy":
        symbols = coding.decode(reader.take(entry.coded).tobytes(), entry.bits, entry.count)
        shifted = torch.from_numpy(symbols).to(torch.int16).reshape(entry.shape) + zero
        return (shifted % coding.alphabet(entry.bits)).to(torch.uint8).flatten()
    packed = unpack_bits(reader.take(-(-entry.count * entry.bits // 8)), entry.bits, entry.count)
    codes = torch.from_numpy(packed)
    return codes << 1 if entry.bits == 1 else codes


def _place(values: Tensor, shape: tuple[int, ...], mask: Tensor | None, background: Tensor) -> Tensor:
    if mask is None:
        return values.reshape(shape)
    filled = background.to(values.dtype).clone()
    filled[mask] = values
    return filled


# --- files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Artifact:
    """A file that was read: header, tensors, the quality on `val` it claims, its length, its whole policy's key."""

    header: Header
    tensors: StoredModel
    quality: float
    bytes: int
    key: str


def pack(header: Header, tensors: StoredModel, quality: float, key: str) -> bytes:
    """The whole file. `quality` is what `val` gave for exactly these tensors, `key` that of the policy behind them."""
    described = header.encode()
    sections = [write_section(entry, tensors[entry.name]) for entry in header.entries]
    total = PREFIX.size + len(described) + sum(map(len, sections))
    rest = (
        PREFIX.pack(MAGIC, 0, total, len(described), bytes.fromhex(key), quality)[8:] + described + b"".join(sections)
    )
    return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def unpack(content: bytes, name: str = "the artifact") -> Artifact:
    """Read a whole file. Raises `ArtifactError` unless every byte is accounted for; allocates nothing before."""
    if len(content) < PREFIX.size or content[:4] != MAGIC:
        raise ArtifactError(f"{name} is not an autocompress artifact (it does not start with {MAGIC.decode()})")
    _, checksum, total, header_length, key, quality = PREFIX.unpack_from(content)
    if total != len(content):
        what = "cut short" if total > len(content) else "longer than it was written"
        raise ArtifactError(f"{name} is {what}: it announces {total:,} bytes and has {len(content):,}; export it again")
    if zlib.crc32(memoryview(content)[8:]) != checksum:
        raise ArtifactError(f"{name} is damaged: its checksum does not match; export it again")
    if header_length > total - PREFIX.size:
        raise ArtifactError(f"{name} announces a header that is longer than the file")
    at = PREFIX.size + header_length
    header = Header.decode(content[PREFIX.size : at])
    if header.payload_bytes != total - at:
        raise ArtifactError(f"{name} describes {header.payload_bytes:,} bytes of tensors and holds {total - at:,}")
    tensors: dict[str, Stored] = {}
    view = memoryview(content)
    for entry in header.entries:
        tensors[entry.name] = read_section(entry, view[at : at + entry.nbytes])
        at += entry.nbytes
    return Artifact(header, tensors, quality, total, key.hex())


def read(path: Path) -> Artifact:
    """The artifact in a file. Raises `ArtifactError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    return unpack(content, str(path))


def build(artifact: Artifact, architecture: nn.Module) -> nn.Module:
    """`architecture` (the task's model, any weights) made into the compressed model, in evaluation mode.

    Raises `ArtifactError` if the file does not belong to this architecture.
    """
    header, tensors, architecture = artifact.header, artifact.tensors, eager(architecture)
    if header.graph != tensors_fingerprint(tensors_of(architecture)):
        raise ArtifactError(
            f"the artifact was made for another network: task {header.task!r} had tensors of other names or shapes "
            "than this task's model; they do not belong together"
        )
    _check_folds(header.folded, tensors, architecture)
    _check_tensors(tensors, architecture, header.folded)
    without(architecture, header.folded)
    install(architecture, {name: stored.dense() for name, stored in tensors.items()})
    return architecture.eval()


def _check_folds(folded: Sequence[str], tensors: StoredModel, model: nn.Module) -> None:
    """Only batch norms without tensors in the file may be replaced."""
    modules = dict(model.named_modules())
    for name in folded:
        if not (name and isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm)):
            raise ArtifactError(f"the artifact folds {name!r}, which is no batch norm of the task's model")
        if any(tensor.rpartition(".")[0] == name for tensor in tensors):
            raise ArtifactError(f"the artifact folds {name!r} and holds its tensors too")


def _check_tensors(tensors: StoredModel, model: nn.Module, folded: Sequence[str]) -> None:
    """None that the model needs is absent; every one belongs to it and is no larger than there."""
    foreign = set(foreign_state(model))
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in foreign}
    filled = {id(state[name]) for name in tensors if name in state}
    gone = {id(model.get_submodule(name)) for name in folded}
    for name, value in state.items():
        holder = model.get_submodule(name.rpartition(".")[0])
        if id(value) not in filled and id(holder) not in gone and not name.endswith(".num_batches_tracked"):
            raise ArtifactError(f"the artifact lacks {name!r}, which the task's model needs")
    for name, stored in tensors.items():
        shape = tuple(stored.dense().shape)
        owner, _, key = name.rpartition(".")
        weight = tensors.get(f"{owner}.weight" if owner else "weight")
        if name in state:
            largest = tuple(state[name].shape)
            fits = len(shape) == len(largest) and all(a <= b for a, b in zip(shape, largest, strict=True))
        elif key == "bias" and weight is not None:  # what a folded norm left
            fits = not isinstance(stored, Raw) and shape == tuple(weight.dense().shape[:1])
        else:
            raise ArtifactError(f"the artifact holds {name!r}, which the task's model does not have")
        if not fits:
            raise ArtifactError(
                f"tensor {name!r} of shape {shape} and the task's model do not belong together: it has no such place"
            )


def load(path: str | Path, task: Task | None = None) -> nn.Module:
    """The compressed model in an `.acz` file, ready to run.

    The architecture comes from `task`, or, for files of the built-in tasks, from the package. Nothing in the file
    is executed. Raises `ArtifactError`.
    """
    artifact = read(Path(path))
    return build(artifact, task.model() if task is not None else builtin_architecture(artifact.header.task))


def builtin_architecture(name: str) -> nn.Module:
    """The untrained network of a built-in task. Raises `ArtifactError` for any other name."""
    if name == "digits":
        from autocompress.tasks import digits

        return digits.architecture()
    depths: Mapping[str, int] = {f"cifar10-resnet{depth}": depth for depth in (20, 32, 56)}
    if name in depths:
        from autocompress.tasks import cifar10

        return cifar10.architecture(depths[name])
    raise ArtifactError(f"the artifact was made for task {name!r}: pass that task, so that its model can be rebuilt")
