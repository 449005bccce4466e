"""The `.onnx` file: exports a network once, and makes the file of each of its compressed versions.

Decides nothing: what is stored, and at which width, is what the engine made. `onnx_graph` does the graph's part.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import math
import struct
import warnings
import weakref
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError, Message
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autocompress.artifact.onnx_graph import (
    DOMAIN,
    INTEGER_OPS,
    OPSET,
    Codes,
    Filling,
    Halves,
    Place,
    Range,
    Skeleton,
    cut,
    filled,
    quantised,
)
from autocompress.artifact.onnx_recurrent import take_apart
from autocompress.artifact.onnx_rewrite import rewrite
from autocompress.errors import ArtifactError, ExportError
from autocompress.graph import Layer
from autocompress.runtime import Outputs, RuntimeModel, feeds, session
from autocompress.stored import Byte, Full, Half, Quantised, Raw, Stored, StoredModel, to_half
from autocompress.task import arguments, call, few, length, tensors

if TYPE_CHECKING:  # its import starts threads, which processes that fork later would miss
    import onnxruntime

MAX_EXPONENT = 100
"""Halves with a larger power of two are stored as floats: single precision, in which they are scaled, ends there."""
MASK_BYTES = 64
"""A mask must save at least as much as the nodes that apply it take."""
TOLERANCE = 1e-3
"""Largest difference of any output from the model's, relative to the largest output, with float kernels."""
SILENT_EXPONENT = 10
"""What stands for the scale of a weight that is all zero: on its grid a bias must be stored."""
PAIR = 2
"""Examples that a model is exported with: with one, the exporter would take it that there is never another."""
REMEMBERED = 8
"""Skeletons with integer kernels that are kept for the next candidate with integers in the same places."""


@dataclass(frozen=True, eq=False)
class Exported:
    """A network's skeleton, which holds the model's own tensors, and the structure of what it returns.

    `general` says whether it computes with whatever tensors it is filled with. Not so where the exporter computed with
    their values: then it stands for the exported model only. `plain` is the model as the exporter leaves it, but that
    recurrent weights are put together on loading, in single precision: what its user would run without this package.
    """

    skeleton: Skeleton
    outputs: Outputs
    general: bool
    plain: bytes


def export(model: nn.Module, inputs: Any, weights: Iterable[str]) -> Exported:
    """`model` with a free batch size, every tensor of its state where it can be replaced.

    `inputs` are two examples; `weights` the names of those that integer kernels may compute with. Raises
    `ExportError`, which names the operator, for a model that ONNX cannot express.
    """
    model = model.eval()
    _check_precision(model)
    with torch.no_grad():
        outputs = Outputs.of(call(model, inputs))
    proto, places, plain = _program(_distinct(model), inputs, model)
    general = _same(proto, outputs, model, inputs)
    if not general:
        proto, places, plain = _program(model, inputs, model)
    return Exported(Skeleton(proto, places, _computed(proto, places, weights)), outputs, general, plain)


def _check_precision(model: nn.Module) -> None:
    """Raise `ExportError` for a model whose weights are not in single precision, as those of the file are."""
    others = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if others:
        raise ExportError(
            f"the model's weights are {', '.join(sorted(map(str, others)))}, and .onnx files compute in single "
            "precision: let the task give model.float() and inputs of that type, or take the packed artifact"
        )


def _computed(proto: onnx.ModelProto, places: Mapping[str, Place], weights: Iterable[str]) -> dict[str, str]:
    """Weights that integer kernels may compute with, and the names of the nodes that do."""
    readers = {name: node for node in proto.graph.node for name in node.input[1:2]}
    found = {name: readers.get(places[name].name) for name in weights if name in places}
    return {name: node.name for name, node in found.items() if node is not None and node.op_type in INTEGER_OPS}


def _distinct(model: nn.Module) -> nn.Module:
    """A copy in which no two tensors are equal, as the exporter would make them one, and all differ from `model`'s."""
    draw = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand((2, *tensor.shape), generator=draw).to(tensor)
            tensor.data = tensor.data * (1 + noise[0] / 4) + noise[1] / 8
    return model


def _same(proto: onnx.ModelProto, outputs: Outputs, model: nn.Module, inputs: Any) -> bool:
    try:
        found = RuntimeModel(session(proto.SerializeToString()), outputs)
        return differences(found, model, inputs) <= TOLERANCE
    except ExportError:
        return False


def _program(exported: nn.Module, inputs: Any, model: nn.Module) -> tuple[onnx.ModelProto, dict[str, Place], bytes]:
    """The graph of `exported` with the tensors of `model` in it, where they are, and the same graph as exported."""
    proto = _translated(exported, *arguments(inputs))
    take_apart(proto, {name: value.detach().cpu().numpy() for name, value in exported.state_dict().items()})
    places = _places(proto, exported)
    _tie(proto, places, exported)
    tensors_of = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, value in model.state_dict().items():
        if name in places and places[name].name in tensors_of:
            place, values = places[name], value.detach().cpu().numpy()
            whole = np.ascontiguousarray(place.shaped(values))
            tensors_of[place.name].CopyFrom(numpy_helper.from_array(whole, place.name))
    plain = proto.SerializeToString()
    rewrite(proto)
    return proto, places, plain


def _translated(model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> onnx.ModelProto:
    try:
        logging.disable(logging.CRITICAL)  # what stops it is raised, and the rest is advice to its developers
        with warnings.catch_warnings(), _tensors_alone(model, named):
            shapes = _free_batch(model, positional, named)
            warnings.simplefilter("ignore")  # of libraries about each other
            program = torch.onnx.export(
                model,
                positional,
                kwargs=named,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever stopped it
        raise ExportError(
            f"the model does not export to ONNX: {_reason(error)}. Change that operation, or search without a latency "
            "budget and take the packed artifact, which needs no export"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _check_batch(proto, length(positional or named))
    return proto


@contextlib.contextmanager
def _tensors_alone(model: nn.Module, named: Iterable[str]) -> Iterator[None]:
    """Meanwhile `model` returns a list of its tensors, as the exporter knows no numbers beside them.

    And it declares the `named` arguments that it takes as `**kwargs`, to which the exporter gives no free size.
    """
    own = vars(model).get("forward")
    forward = model.forward

    @functools.wraps(forward)
    def listed(*positional: Any, **named: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(forward(*positional, **named)) if isinstance(leaf, Tensor)]

    listed.__signature__ = _declared(inspect.signature(forward), named)  # type: ignore[attr-defined]
    model.forward = listed
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _declared(signature: inspect.Signature, named: Iterable[str]) -> inspect.Signature:
    """`signature` with parameters of these names in place of `**kwargs`."""
    own = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return signature
    more = [name for name in named if name not in signature.parameters]
    return signature.replace(parameters=[*own, *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in more)])


def _free_batch(model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A free first dimension for tensors as long as the batch, by the names of the forward method's parameters."""
    bound = inspect.signature(model.forward).bind(*positional, **named).arguments
    batch, count = torch.export.Dim("batch"), length(positional or named)

    def free(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.ndim and len(value) == count else None

    return pytree.tree_map(free, dict(bound))


def _check_batch(proto: onnx.ModelProto, count: int) -> None:
    """Raise `ExportError` if the exporter fixed the batch size at `count`, which it does without a word."""
    first = [port.type.tensor_type.shape.dim[:1] for port in proto.graph.input]
    if count == PAIR and any(dim and dim[0].dim_value == count for dim in first):
        raise ExportError(
            "the model computes with its batch size as a plain number, which fixes it in the exported graph: write "
            "x.shape[0] for len(x), and compare it with nothing; or take the packed artifact, which needs no export"
        )


def _reason(error: BaseException) -> str:
    """The innermost message: the exporter wraps what went wrong in advice to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _places(proto: onnx.ModelProto, model: nn.Module) -> dict[str, Place]:
    """The initializer of each tensor of the state: by name, or where the exporter renamed or transposed it, by value.

    Tensors that the outputs do not depend on are absent.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    free = dict(arrays)
    found: dict[str, Place] = {}
    state = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name in arrays and arrays[name].shape == value.shape:
            found[name] = Place(name)
            free.pop(name, None)
    for name, value in state.items():
        if name in found or value.dtype != np.float32 or not value.ndim:
            continue
        for other, array in free.items():
            if array.shape == value.shape and np.array_equal(array, value):
                found[name] = Place(other)
            elif value.ndim == 2 and array.shape == value.shape[::-1] and np.array_equal(array.T, value):
                found[name] = Place(other, transposed=True)
            elif _is_map(array, value):
                found[name] = Place(other, spread=array.shape[1:])
            else:
                continue
            free.pop(other)
            break
    return found


def _is_map(array: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> bool:
    """Whether `array` is the vector `value` with more dimensions, of size 1: what a removed layer gives everywhere."""
    shaped = value.ndim == 1 and array.ndim > 1 and array.shape == (*value.shape, *[1] * (array.ndim - 1))
    return shaped and np.array_equal(array.reshape(-1), value)


def _tie(proto: onnx.ModelProto, places: dict[str, Place], model: nn.Module) -> None:
    """One initializer for each tensor that the state holds under several names: under the first, as files do."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name, value in model.state_dict().items():
        stored = first.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
        alias = places.pop(name, None) if stored != name else None
        if alias is None or places.setdefault(stored, alias) == alias:
            continue
        transposed = alias.transposed != places[stored].transposed
        turn = {"op_type": "Transpose", "perm": [1, 0]} if transposed else {"op_type": "Identity"}
        proto.graph.node.insert(0, onnx.helper.make_node(inputs=[places[stored].name], outputs=[alias.name], **turn))
        kept = [tensor for tensor in proto.graph.initializer if tensor.name != alias.name]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)


# --- fillings ---------------------------------------------------------------------------------------------


def fillings(stored: StoredModel, places: Mapping[str, Place]) -> dict[str, Filling]:
    """What is stored of each tensor that the graph reads."""
    return {name: filling(tensor) for name, tensor in stored.items() if name in places}


def filling(stored: Stored) -> Filling:
    """One tensor, exactly: a weight's codes count from its zero point."""
    if isinstance(stored, Quantised):
        return _codes(stored)
    if isinstance(stored, Half | Byte):
        halves, exponent = to_half(stored.values)
        if abs(exponent) <= MAX_EXPONENT:
            return Halves(halves.numpy(), 2.0**-exponent)
    if isinstance(stored, Half | Byte | Full):
        return stored.dense().numpy().astype(np.float32)
    assert isinstance(stored, Raw)
    return stored.values.numpy()


def fits_integers(stored: Stored) -> bool:
    """Whether a weight's codes, counted from its zero points, are signed bytes."""
    return isinstance(stored, Quantised) and (stored.symmetric or stored.bits < 8)


def _codes(stored: Quantised) -> Filling:
    column = (-1, *[1] * (stored.codes.ndim - 1))
    zero = stored.zero.numpy().astype(np.int16).reshape(column)
    halves, exponent = to_half(stored.scale)
    if abs(exponent) > MAX_EXPONENT or not fits_integers(stored):
        return stored.dense().numpy()
    scale = halves.numpy()
    silent = scale == 0  # such a row is zero, whatever its codes
    exponent = SILENT_EXPONENT if bool(silent.all()) else exponent
    codes = np.where(silent.reshape(column), 0, stored.codes.numpy().astype(np.int16) - zero).astype(np.int16)
    low = -(zero[:1] if stored.symmetric else zero).astype(np.int8)
    mask = stored.mask
    if stored.bits == 1:
        stays = codes != 0
        mask_or_none = None if bool(stays.all()) else stays
        return Codes(codes, np.where(silent, np.float16(1), scale), 2.0**-exponent, 1, low, 2, mask_or_none)
    kept = None if mask is None else mask.numpy()
    if kept is not None:
        saved = stored.bits * -(-kept.size // 8) - -(-kept.size // 8) - stored.bits * -(-int(kept.sum()) // 8)
        kept = kept if saved > MASK_BYTES else None
    return Codes(codes, np.where(silent, np.float16(1), scale), 2.0**-exponent, stored.bits, low, 1, kept)


@dataclass(frozen=True, slots=True)
class About:
    """The file's metadata: what it was made for, its policy's key, and the quality on `val` that it claims."""

    task: str
    metric: str
    key: str
    quality: float = math.nan

    def sealed(self, body: bytes) -> bytes:
        """The file: `body` is its graph. Its length does not depend on the quality."""
        return body + self._seal(body)

    def _seal(self, body: bytes) -> bytes:
        """Metadata, which protobuf allows at the end, with a checksum of the file."""
        fields = [self.task, self.metric, self.key, struct.pack(">d", self.quality).hex()]
        check = f"{zlib.crc32(body + json.dumps(fields).encode()):08x}"
        notes = onnx.StringStringEntryProto(key=DOMAIN, value=json.dumps([*fields, check]))
        return bytes(onnx.ModelProto(metadata_props=[notes]).SerializeToString())

    @classmethod
    def read(cls, path: Path) -> tuple[About, bytes]:
        """Metadata and content of the file at `path`. Raises `ArtifactError` for anything that is none of ours."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
        try:
            proto = onnx.load_from_string(content)
            notes = {entry.key: entry.value for entry in proto.metadata_props}
            task, metric, key, quality, _ = (str(text) for text in json.loads(notes[DOMAIN]))
            about = cls(task, metric, key, struct.unpack(">d", bytes.fromhex(quality))[0])
        except (KeyError, TypeError, ValueError, RecursionError, struct.error, DecodeError):
            raise ArtifactError(f"{path} is not an ONNX file that autocompress wrote; export it again") from None
        size = len(about._seal(b""))
        if content[-size:] != about._seal(content[:-size]):
            raise ArtifactError(f"{path} is damaged, or was changed since autocompress wrote it; export it again")
        if any(isinstance(part, onnx.TensorProto) and _is_elsewhere(part) for part in _messages(proto)):
            raise ArtifactError(f"{path} refers to data outside of it, which is not read; export it again")
        return about, content


def _is_elsewhere(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.external_data) or tensor.data_location == onnx.TensorProto.EXTERNAL


def _messages(message: Message) -> Iterator[Message]:
    """`message` and all that it is made of."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _messages(part)


# --- files of one network's versions ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Candidate:
    """A compressed network: its tensors, a module filled with them, and what stands for its tensors' shapes.

    `activations` is 8 where layers with integer weights compute with integers, but for the weights `floats`, else 32.
    """

    tensors: StoredModel
    model: nn.Module
    architecture: Hashable
    activations: int = 32
    floats: frozenset[str] = frozenset()


class Exporter:
    """Makes the files of one network's compressed versions; each shape of it is exported, or checked, once.

    The activations' ranges come from the dense model's, gathered once. Knows no policy: a `Candidate` is all it sees.
    """

    def __init__(self, layers: Sequence[Layer], dense: Candidate, examples: Sequence[Any]) -> None:
        """`examples` are inputs of batches, augmented as in training. Raises `ExportError`."""
        self._weights: Sequence[str] = [layer.weight for layer in layers if layer.kind != "embedding"]
        self._biases = {layer.weight: layer.bias for layer in layers}
        self._empty = _without_elements(dense)
        self._examples = examples
        self._pair = few(dense.model, examples[0], PAIR)
        self._known: dict[Hashable, Exported] = {}
        self._cuts: dict[frozenset[str], Exported] = {}
        self._own: tuple[Candidate, Exported] | None = None
        self._integer: weakref.WeakKeyDictionary[Exported, dict[frozenset[str], Skeleton]] = weakref.WeakKeyDictionary()
        self._ranges: weakref.WeakKeyDictionary[Exported, Mapping[str, Range]] = weakref.WeakKeyDictionary()
        self._dense = export(dense.model, self._pair, self._weights)
        self._known[dense.architecture] = self._checked(self._dense, dense)
        self._weights = self.computed

    def build(self, candidate: Candidate, about: About) -> bytes:
        """The file of `candidate`. Raises `ExportError`."""
        exported = self._exported(candidate)
        skeleton = self._precise(exported, candidate)
        return about.sealed(filled(skeleton, fillings(candidate.tensors, skeleton.places)).SerializeToString())

    def length(self, candidate: Candidate, about: About, names: int) -> int:
        """Bytes of the file of `candidate` if its names were those from number `names` on."""
        skeleton = self._precise(self._exported(candidate), candidate)
        proto = filled(skeleton, fillings(candidate.tensors, skeleton.places), names)
        return len(about.sealed(proto.SerializeToString()))

    def kernels(self, candidate: Candidate) -> Hashable:
        """Equal for candidates that run the same kernels on the same shapes, and so take the same time."""
        return candidate.architecture, tuple(sorted(self._chosen(self._exported(candidate), candidate)))

    @property
    def original(self) -> bytes:
        """The dense model in single precision, as torch's exporter leaves it."""
        return self._dense.plain

    @property
    def computed(self) -> tuple[str, ...]:
        """State-dict names of the weights that the files' named nodes compute with: node "0" with the first."""
        return tuple(self._dense.skeleton.weights)

    def module(self, ran: onnxruntime.InferenceSession) -> RuntimeModel:
        """A session on one of these files, returning what the model returns."""
        return RuntimeModel(ran, self._dense.outputs)

    def _exported(self, candidate: Candidate) -> Exported:
        """The dense model's export where the candidate's tensors fit into it, else one of its own."""
        if not self._dense.general:
            if self._own is None or self._own[0] is not candidate:
                self._own = candidate, self._checked(self._fresh(candidate), candidate)
            return self._own[1]
        if candidate.architecture not in self._known:
            removed = _without_elements(candidate) - self._empty
            try:
                found = self._checked(self._cut(removed, candidate) if removed else self._dense, candidate)
            except ExportError:  # sizes that the exporter wrote into the graph
                found = self._checked(self._fresh(candidate), candidate)
            self._known[candidate.architecture] = found
        return self._known[candidate.architecture]

    def _cut(self, removed: frozenset[str], candidate: Candidate) -> Exported:
        """The export of a network without the tensors `removed`: the dense one's without branches, where that can be.

        Raises `ExportError`.
        """
        if removed not in self._cuts:
            silent = [w for w in self._biases if w in removed and candidate.tensors[w].dense().shape[0]]
            skeleton = cut(self._dense.skeleton, {weight: self._biases[weight] for weight in silent})
            if skeleton is None:
                return self._fresh(candidate)
            self._cuts[removed] = replace(self._dense, skeleton=skeleton)
        return self._cuts[removed]

    def _fresh(self, candidate: Candidate) -> Exported:
        found = export(candidate.model, self._pair, self._weights)
        return replace(found, skeleton=replace(found.skeleton, numbers=tuple(self._weights)))

    def _checked(self, exported: Exported, candidate: Candidate) -> Exported:
        """`exported` if it computes with these tensors what the module does."""
        skeleton = exported.skeleton
        content = filled(skeleton, fillings(candidate.tensors, skeleton.places)).SerializeToString()
        found = differences(RuntimeModel(session(content), exported.outputs), candidate.model, self._pair)
        if not found <= TOLERANCE:
            raise ExportError(
                f"the exported model's outputs differ from the model's by {found:.2g} of the largest, more than "
                f"{TOLERANCE}: it does not compute the same; take the packed artifact, which needs no export"
            )
        return exported

    def _precise(self, exported: Exported, candidate: Candidate) -> Skeleton:
        """The skeleton with integer kernels for what has integer weights, if the candidate wants them."""
        chosen = self._chosen(exported, candidate)
        if not chosen:
            return exported.skeleton
        known = self._integer.setdefault(exported, {})
        if chosen not in known:
            source = self._dense if exported in self._cuts.values() else exported  # whose activations have these names
            if source not in self._ranges:
                self._ranges[source] = self._measured(source)
            while len(known) >= REMEMBERED:
                known.pop(next(iter(known)))
            known[chosen] = quantised(exported.skeleton, self._ranges[source], chosen)
        return known[chosen]

    @staticmethod
    def _chosen(exported: Exported, candidate: Candidate) -> frozenset[str]:
        """Weights that integer kernels compute with."""
        if candidate.activations == 32:
            return frozenset()
        computed = (name for name in exported.skeleton.weights if name not in candidate.floats)
        return frozenset(name for name in computed if fits_integers(candidate.tensors[name]))

    def _measured(self, exported: Exported) -> Mapping[str, Range]:
        """Least and greatest value of every activation over the examples."""
        proto = onnx.ModelProto()
        proto.CopyFrom(exported.skeleton.proto)  # its tensors are those it was exported with
        names = [port.name for port in proto.graph.input]
        names += [name for node in proto.graph.node for name in node.output if name]
        present = {port.name for port in (*proto.graph.output, *proto.graph.input)}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
        ran = session(proto.SerializeToString())
        ranges: dict[str, Range] = {}
        for inputs in self._examples:
            given = feeds(ran, inputs)
            values = zip([port.name for port in ran.get_outputs()], ran.run(None, given), strict=True)
            for name, value in (*given.items(), *values):
                if np.asarray(value).dtype == np.float32 and np.asarray(value).size:
                    low, high = ranges.get(name, (0.0, 0.0))
                    ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
        return ranges


def _without_elements(candidate: Candidate) -> frozenset[str]:
    """Names of the tensors of removed layers."""
    empty = (name for name, tensor in candidate.tensors.items() if not tensor.dense().numel())
    return frozenset(empty)


def differences(a: nn.Module, b: nn.Module, inputs: Any) -> float:
    """Largest absolute difference of two modules' outputs, relative to the largest output of `b`; NaN if not finite."""
    with torch.no_grad():
        found, wanted = tensors(call(a, inputs)), tensors(call(b, inputs))
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("nan")
    gap = max((float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True) if y.numel()), default=0.0)
    return gap / max((float(y.abs().max()) for y in wanted if y.numel()), default=1.0) if gap else 0.0
