"""A removed branch is its mean output, in the model that is scored, the file and the model that trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import ClassificationTask, Workbench, compress
from autocompress.artifact import packed
from autocompress.measure.size import Size
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.stored import Full, round_to_half


class Branch(nn.Module):
    """A stream with a branch of convolutions, with norms or biases alone, and one of linear layers."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(12) if norms else nn.Identity()
        self.outer_norm = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        y += x
        z = y.mean((2, 3))
        return self.head(z + self.down(torch.relu(self.up(z))))


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(64, 3, 6, 6, generator=draw), torch.arange(64) % 4


def bench_of(norms: bool) -> Workbench:
    torch.manual_seed(0)
    model = Branch(norms)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    with torch.no_grad():
        for value in model.state_dict().values():  # what 16 bits hold, so that only constants are rounded
            value.copy_(round_to_half(value) if value.is_floating_point() else value)
    return Workbench(ClassificationTask(model.eval(), data(0), data(1), data(2), batch_size=16))


@pytest.fixture(scope="module", params=[True, False], ids=["norms", "biases"])
def bench(request: Any) -> Workbench:
    return bench_of(request.param)


CONVOLUTIONS, LINEARS = {"inner": 0.0}, {"up": 0.0}
BOTH = CONVOLUTIONS | LINEARS


def policy(keep: dict[str, float], bits: int = 32, solver: Any = "nearest", **recovery: Any) -> Policy:
    names = ("stem", "inner", "outer", "up", "down", "head")
    return Policy(dict.fromkeys(names, LayerChoice(bits)), keep, solver=solver, recovery=Recovery(**recovery))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(data(1)[0])


def mean_output(bench: Workbench, name: str) -> Tensor:
    """What a module of the dense model gives on average for the training inputs, per channel."""
    seen: list[Tensor] = []
    handle = bench.teacher.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[-1].clone()))
    with torch.no_grad():
        for batch in bench.calibration:
            bench.teacher(batch.inputs)
    handle.remove()
    whole = torch.cat(seen)
    return whole.mean(dim=(0, 2, 3) if whole.ndim == 4 else 0)


def replaced(bench: Workbench, *names: str) -> nn.Module:
    """The dense model in which the named modules give their mean output, as a file holds it."""
    model = copy.deepcopy(bench.teacher)
    for name in names:
        mean = round_to_half(mean_output(bench, name))
        model.get_submodule(name).register_forward_hook(
            lambda _m, _x, y, mean=mean: torch.zeros_like(y) + (mean[:, None, None] if y.ndim == 4 else mean)
        )
    return model


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("keep", [CONVOLUTIONS, LINEARS, BOTH], ids=["convolutions", "linear", "both"])
def test_what_is_left_is_the_dense_model_with_the_branchs_mean(
    bench: Workbench, keep: dict[str, float], fold: bool
) -> None:
    left = {"inner": "outer_norm", "up": "down"}
    expected = outputs(replaced(bench, *(left[name] for name in keep)))
    found = bench.realise(compress(bench, policy(keep, reestimate_bn=False, fold_bn=fold)))
    rounds = fold and keep is LINEARS and "inner_norm.weight" in bench.state  # the norms that are left, folded
    torch.testing.assert_close(outputs(found), expected, rtol=0, atol=1e-3 if rounds else 1e-6)
    assert float((outputs(found) - outputs(bench.teacher)).abs().max()) > 1e-2


def test_the_stream_may_be_narrowed_too(bench: Workbench) -> None:
    stream = next(g.name for g in bench.graph.prunable if "outer" in {m.tensor.split(".")[0] for m in g.producers})
    narrow = policy({stream: 0.5}, reestimate_bn=False, fold_bn=False)
    kept = bench.importance.kept(narrow)[stream]
    model = copy.deepcopy(bench.realise(compress(bench, narrow)))
    mean = round_to_half(mean_output(bench, "outer_norm"))[kept]
    model.outer_norm.register_forward_hook(lambda _m, _x, y: torch.zeros_like(y) + mean[:, None, None])
    found = bench.realise(compress(bench, policy({stream: 0.5, **CONVOLUTIONS}, reestimate_bn=False, fold_bn=False)))
    torch.testing.assert_close(outputs(found), outputs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fold", [True, False])
def test_reestimated_statistics_do_not_touch_the_constant(fold: bool) -> None:
    bench = bench_of(True)
    plain, renewed = (
        outputs(bench.realise(compress(bench, policy(CONVOLUTIONS, reestimate_bn=on, fold_bn=fold)))).clone()
        for on in (False, True)
    )
    torch.testing.assert_close(renewed, plain, rtol=1e-5, atol=1e-5)


def distance(bench: Workbench, policy: Policy) -> float:
    return float((outputs(bench.realise(compress(bench, policy))) - outputs(bench.teacher)).square().mean())


def test_fitting_what_follows_makes_up_for_the_branch(bench: Workbench) -> None:
    assert distance(bench, policy(CONVOLUTIONS, solver="database")) < 0.5 * distance(bench, policy(CONVOLUTIONS))


def test_the_resident_model_is_itself_again_for_the_next_candidate(bench: Workbench) -> None:
    dense = policy({})
    before = outputs(bench.realise(compress(bench, dense)))
    bench.realise(compress(bench, policy(BOTH, 4, "database", epochs=1)))
    bench.realise(compress(bench, policy({"inner": 0.5, "up": 0.0})))
    assert torch.equal(outputs(bench.realise(compress(bench, dense))), before)


@pytest.mark.parametrize("hints", [0.0, 1.0])
@pytest.mark.parametrize("gradient", ["none", "centralise", "standardise"])
def test_recovery_training_goes_on_without_the_layers(bench: Workbench, hints: float, gradient: str) -> None:
    wanted = policy(BOTH, 4, epochs=2, lr=0.1, distill_weight=1.0, hint_weight=hints, gradient=gradient)
    compressed = compress(bench, wanted)
    plain = compress(bench, wanted.without_recovery())
    assert compressed.tensors["inner.weight"].dense().shape == (0, 8, 3, 3)
    for name in ("down.bias", "head.bias"):
        assert not torch.equal(compressed.tensors[name].dense(), plain.tensors[name].dense())
    assert bool(torch.isfinite(outputs(bench.realise(compressed))).all())


@pytest.mark.parametrize("bits", [1, 4, 16, 32])
@pytest.mark.parametrize("fold", [True, False])
def test_the_file_holds_the_model_that_was_scored(bench: Workbench, bits: int, fold: bool) -> None:
    wanted = policy(BOTH, bits, "database", fold_bn=fold)
    compressed = compress(bench, wanted)
    expected = outputs(bench.realise(compressed)).clone()
    size = Size(bench.graph, "branch", "accuracy")
    content = packed.pack(size.header(wanted, compressed.codings()), compressed.tensors, 0.5, wanted.key())
    assert len(content) == size(wanted, compressed.codings())
    artifact = packed.unpack(content)
    rows = {entry.name: entry for entry in artifact.header.entries}
    for name in ("inner", "outer", "up", "down"):
        assert isinstance(artifact.tensors[f"{name}.weight"], Full)
        assert rows[f"{name}.weight"].nbytes == 0
    torch.manual_seed(1)
    again = packed.build(artifact, Branch(isinstance(bench.teacher.inner_norm, nn.BatchNorm2d)))
    assert torch.equal(outputs(again), expected)


def test_codings_name_only_layers_that_are_left(bench: Workbench) -> None:
    assert set(bench.codings(policy(BOTH, 4))) == {"stem.weight", "head.weight"}
