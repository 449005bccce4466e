"""Models that are not as most are: what can be compressed is, and of the rest it is said what becomes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, LayerChoice, Policy, Recovery, TaskError, Workbench, compress
from autocompress.artifact.onnx import export
from autocompress.artifact.packed import build, pack, unpack
from autocompress.engine import Compressed
from autocompress.errors import ExportError
from autocompress.measure.size import Size
from autocompress.stored import Quantised
from autocompress.task import eager


class Small(nn.Module):
    """Inputs (n, 3, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 6, 3)
        self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        return self.head(self.rnn(x.transpose(1, 2))[0].mean(dim=1))


class Choosing(nn.Module):
    """Sends loud inputs through one layer and silent ones through another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loud, self.silent, self.head = (nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(2)),
                                                        nn.Linear(8, 3))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.loud if float(x.abs().mean()) > 1 else self.silent
        return self.head(torch.relu(chosen(torch.relu(self.stem(x)))))


def task_of(model: nn.Module | Callable[[], nn.Module], inputs: Tensor) -> ClassificationTask:
    data = inputs, torch.arange(len(inputs)) % 3
    return ClassificationTask(model, data, data, data, batch_size=4, name="unusual")


def waves(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(0))


def everywhere(bench: Workbench, bits: int = 4, epochs: int = 0) -> Policy:
    layers = {layer.name: LayerChoice(bits, 0.25) for layer in bench.graph.layers}
    return Policy(layers, solver="database", recovery=Recovery(epochs=epochs, lr=0.02))


def reloaded(bench: Workbench, compressed: Compressed) -> nn.Module:
    header = Size(bench.graph, bench.task.name, bench.task.metric).header(compressed.policy, compressed.codings())
    content = pack(header, compressed.tensors, 0.5, compressed.policy.key())
    return build(unpack(content), bench.task.model())


# --- built lazily -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: (nn.Flatten(), nn.LazyLinear(3)), "1.weight"),
        (lambda: (nn.LazyBatchNorm1d(affine=False), nn.Flatten(), nn.Linear(24, 3)), "0.running_mean"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazily_built_module_must_have_seen_a_batch(build: Callable[[], tuple[nn.Module, ...]], name: str) -> None:
    model = nn.Sequential(*build()).eval()
    with pytest.raises(TaskError, match=f"'{name}' has no shape yet.*run one batch"):
        Workbench(task_of(lambda: model, waves()))
    model(waves())
    assert len(Workbench(task_of(lambda: model, waves())).graph.layers) == 1


# --- compiled -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_model_is_taken_as_it_was() -> None:
    torch.manual_seed(0)
    plain = Small().eval()
    graph = Workbench(task_of(plain, waves())).graph
    compiled: nn.Module = torch.compile(plain)
    bench = Workbench(task_of(compiled, waves()))
    assert bench.graph == graph
    compressed = compress(bench, everywhere(bench))
    assert torch.equal(reloaded(bench, compressed)(waves()), bench.realise(compressed)(waves()))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_parts_are_taken_as_they_were() -> None:
    plain = Small().eval()
    names = [name for name, _ in plain.named_parameters()]
    plain.b, plain.rnn = torch.compile(plain.b), torch.compile(plain.rnn)
    plain.again = plain.b
    plain.head.compile()
    found = eager(plain)
    assert found.again is found.b
    assert [name for name, _ in found.named_parameters()] == names
    assert all(module._compiled_call_impl is None for module in found.modules())


# --- quantised already --------------------------------------------------------------------------------------


def test_a_quantised_module_stays_as_it_is() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its future
        model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).eval()
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        bench = Workbench(task_of(model, waves()))
        assert [layer.name for layer in bench.graph.layers] == ["0"]
        assert [note for note in bench.graph.notes if note.startswith("3 stays as it is")]
        compressed = compress(bench, everywhere(bench))
        assert isinstance(compressed.tensors["0.weight"], Quantised)
        assert torch.equal(reloaded(bench, compressed)(waves()), bench.realise(compressed)(waves()))


# --- in half precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_compressed_and_recovers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = waves().to(dtype)
    bench = Workbench(task_of(Small().eval().to(dtype), inputs))
    assert all(bench.compensates(layer, "database") for layer in bench.graph.layers)
    for epochs in (0, 2):
        compressed = compress(bench, everywhere(bench, epochs=epochs))
        outputs = bench.realise(compressed)(inputs)
        assert outputs.dtype == dtype
        assert torch.equal(reloaded(bench, compressed)(inputs), outputs)
    with pytest.raises(ExportError, match=f"weights are {dtype}.*packed artifact"):
        export(bench.teacher, inputs[:2], [])


# --- with a control flow of its own -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_looks_at_its_data_keeps_its_channels() -> None:
    torch.manual_seed(0)
    inputs = torch.cat([torch.randn(8, 4) * scale for scale in (0.1, 3.0)])
    inputs = inputs[torch.arange(16).reshape(2, 8).T.flatten()]  # silent and loud in turn
    bench = Workbench(task_of(Choosing().eval(), inputs))
    assert bench.graph.groups == ()
    assert any("which modules run depends on the inputs" in note for note in bench.graph.notes)
    compressed = compress(bench, everywhere(bench))
    assert {name for name, stored in compressed.tensors.items() if isinstance(stored, Quantised)} == {
        f"{name}.weight" for name in ("stem", "loud", "silent", "head")
    }
    assert torch.equal(reloaded(bench, compressed)(inputs), bench.realise(compressed)(inputs))
    with pytest.raises(ExportError, match="take the packed artifact"):
        export(bench.teacher, inputs[:2], [])
