"""ONNX Runtime on this machine's CPU: sessions with pinned threads, and models that run in them.

A file is executed here as it will be deployed: scoring and timing both see the artifact's own bytes.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autocompress.errors import ExportError

if TYPE_CHECKING:  # its import starts threads, which processes that fork later would miss
    import onnxruntime

NAME = "onnxruntime"


def version() -> str:
    """The runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def session(content: bytes, threads: int = 1, trace: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on a file's content. With `trace`, node times are recorded in a file whose name starts so.

    Raises `ExportError` where the runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has its own hierarchy, not all of it public
        raise ExportError(f"ONNX Runtime {version()} does not take the model: {error}") from error


def feeds(ran: onnxruntime.InferenceSession, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What a session is run with, for inputs as a module takes them: tensors by their names, or in their order."""
    ports = ran.get_inputs()
    if isinstance(inputs, Mapping) and set(inputs) == {port.name for port in ports}:
        inputs = {port.name: inputs[port.name] for port in ports}
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if len(ports) != len(leaves):
        raise ExportError(f"the exported model reads {len(ports)} tensors and is given {len(leaves)}")
    return {port.name: leaf.detach().cpu().contiguous().numpy() for port, leaf in zip(ports, leaves, strict=True)}


@dataclass(frozen=True)
class Outputs:
    """The structure of what a module returns: tensors, and what else is in it, which is always the same."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    """`Tensor` where one stands."""

    @classmethod
    def of(cls, value: Any) -> Outputs:
        """Of what a module returned. Raises `ExportError` for objects that a file cannot bring back."""
        leaves, spec = pytree.tree_flatten(value)
        for leaf in leaves:
            if not isinstance(leaf, Tensor | int | float | str | None):
                raise ExportError(
                    f"the model returns a {type(leaf).__name__}, which ONNX does not know: let it return tensors, or "
                    "tuples, lists or dicts of them, or take the packed artifact, which needs no export"
                )
        return cls(spec, tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    def filled(self, values: list[Tensor]) -> Any:
        """The structure with these tensors. Raises `ExportError` if there are more or fewer than it has places."""
        if len(values) != sum(leaf is Tensor for leaf in self.leaves):
            raise ExportError(f"the exported model returns {len(values)} tensors, and the model another number")
        given = iter(values)
        return pytree.tree_unflatten([next(given) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)


class RuntimeModel(nn.Module):
    """A session in the place of the module that it was exported from."""

    def __init__(self, ran: onnxruntime.InferenceSession, outputs: Outputs | None = None) -> None:
        """`outputs` is the structure of what the module returns; without it a lone tensor or a tuple."""
        super().__init__()
        self.session, self._outputs = ran, outputs
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # tasks ask a model for its device
        self.eval()

    def parameters(self, recurse: bool = True) -> Any:
        """The anchor: there are no parameters, and tasks look at the first one's device."""
        return self.buffers(recurse)

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Outputs as the module's, on the CPU. Raises `ExportError` if the runtime stops."""
        given = feeds(self.session, (positional, named) if positional else named)
        try:
            found = self.session.run(None, given)
        except Exception as error:  # the runtime has its own hierarchy, not all of it public
            raise ExportError(f"ONNX Runtime {version()} does not run the model: {error}") from error
        values = [torch.from_numpy(np.asarray(value)) for value in found]
        if self._outputs is not None:
            return self._outputs.filled(values)
        return values[0] if len(values) == 1 else tuple(values)


def device() -> str:
    """This machine's processor, as it names itself, and its vector extensions that matter for integers."""
    flags = _cpu("flags").split()
    vectors = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp") if name in flags]
    return " ".join([_cpu("model name") or platform.processor() or platform.machine(), *vectors])


def _cpu(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.M)
    return found[1].strip() if found else ""
