from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress import Batch, ClassificationTask, Workbench, compress
from autocompress.engine import recalibrate
from autocompress.engine.recalibrate import anchored, fold, norms, reestimate
from autocompress.graph import Graph
from autocompress.policy import LayerChoice, Policy, Recovery
from autocompress.stored import Byte, Full, Half, Quantised, StoredModel, round_to_byte, round_to_half
from autocompress.trace import trace

FOLDED, APART = (Policy(recovery=Recovery(fold_bn=folds, reestimate_bn=False)) for folds in (True, False))


def settle(model: nn.Module) -> nn.Module:
    """Norm statistics and factors of a trained model, negative factors among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def cnn(*, bias: bool = False, affine: bool = True, eps: float = 1e-5, groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=bias, groups=groups),
        nn.BatchNorm2d(8, affine=affine, eps=eps),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    settle(model)
    return model


def mlp(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    settle(model)
    return model


def inputs_of(model: nn.Sequential, count: int = 16) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(count, *((4, 6, 6) if isinstance(model[0], nn.Conv2d) else (4,)), generator=draw)


def batches_of(inputs: Tensor, *sizes: int) -> list[Batch]:
    return [Batch(part, torch.zeros(len(part))) for part in inputs.split(list(sizes))]


def parts(model: nn.Sequential) -> tuple[dict[str, Full], dict[str, Tensor], Graph, dict[str, float]]:
    state = model.state_dict()
    graph = trace(model, inputs_of(model))
    weights = {layer.weight: Full(state[layer.weight]) for layer in graph.layers}
    return weights, state, graph, {name: float(norm.eps) for name, norm in norms(model).items()}


def deployed(model: nn.Sequential, stored: StoredModel) -> nn.Sequential:
    """The same network, built by hand without its norm and filled with what is stored."""
    first, last = model[0], model[-1]
    if isinstance(first, nn.Conv2d):
        replaced: nn.Module = nn.Conv2d(4, 8, 3, groups=first.groups)
    else:
        replaced = nn.Linear(4, 8)
    bare = nn.Sequential(replaced, *model[2:-1], nn.Linear(last.in_features, 3)).eval()
    tail = len(model) - 1
    names = {"0.weight": "0.weight", "0.bias": "0.bias"} | {
        f"{len(bare) - 1}.{key}": f"{tail}.{key}" for key in ("weight", "bias")
    }
    bare.load_state_dict({own: stored[name].dense() for own, name in names.items()})
    return bare


# --- re-estimation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(16,), (4, 12), (5, 5, 6)])
@pytest.mark.parametrize("build", [cnn, mlp])
def test_statistics_are_the_mean_over_batches_of_each_batchs_own(build: type, sizes: tuple[int, ...]) -> None:
    model = build()
    inputs = inputs_of(model)
    with torch.no_grad():
        seen = [model[0](part).double().numpy() for part in inputs.split(list(sizes))]
    channels_last = [np.moveaxis(x, 1, -1).reshape(-1, 8) for x in seen]
    reestimate(model, batches_of(inputs, *sizes))
    means, variances = ([f(x) for x in channels_last] for f in (lambda x: x.mean(0), lambda x: x.var(0, ddof=1)))
    np.testing.assert_allclose(model[1].running_mean.numpy(), np.mean(means, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model[1].running_var.numpy(), np.mean(variances, axis=0), rtol=1e-4)


def test_only_the_statistics_of_norms_change() -> None:
    model = mlp()
    model[1].momentum = 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate(model, batches_of(inputs_of(model), 8, 8))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed - {"1.num_batches_tracked"} == {"1.running_mean", "1.running_var"}
    assert model[1].momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_dropout_stays_off_while_statistics_are_estimated() -> None:
    model = mlp()
    modes: list[bool] = []
    model[3].register_forward_hook(lambda module, *_: modes.append(module.training))
    reestimate(model, batches_of(inputs_of(model), 8, 8))
    assert modes == [False, False]


def test_momentum_and_modes_are_restored_after_an_error() -> None:
    model = mlp()
    with pytest.raises(RuntimeError):
        reestimate(model, [Batch(torch.zeros(4, 99), torch.zeros(4))])
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_a_model_without_norms_is_not_run() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    reestimate(model, [Batch(torch.zeros(4, 99), torch.zeros(4))])
    assert norms(model) == {}


def test_estimating_again_changes_nothing() -> None:
    model = cnn()
    batches = batches_of(inputs_of(model), 8, 8)
    reestimate(model, batches)
    before = model[1].running_var.clone()
    reestimate(model, batches)
    assert torch.equal(model[1].running_var, before)


def test_a_last_batch_of_one_example_does_not_break_calibration() -> None:
    model = mlp()
    data = inputs_of(model, 33), torch.zeros(33, dtype=torch.long)
    found = compress(Workbench(ClassificationTask(model, data, data, data, batch_size=16)), Policy())
    assert all(torch.isfinite(stored.dense()).all() for stored in found.tensors.values())


def test_single_images_have_statistics_over_their_pixels() -> None:
    model = cnn()
    inputs = inputs_of(model)
    with torch.no_grad():
        variances = [model[0](image[None]).numpy().var((0, 2, 3), ddof=1) for image in inputs]
    reestimate(model, batches_of(inputs, *[1] * len(inputs)))
    np.testing.assert_allclose(model[1].running_var.numpy(), np.mean(variances, axis=0), rtol=1e-4)


# --- folding --------------------------------------------------------------------------------------------

MODELS = {
    "conv": cnn(),
    "conv with bias": cnn(bias=True),
    "conv without affine": cnn(affine=False),
    "conv with large eps": cnn(eps=0.5),
    "grouped conv": cnn(groups=4),
    "linear": mlp(),
    "linear without bias": mlp(bias=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_computes_what_the_unfolded_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibrate, "round_to_half", lambda values: values)
    model = MODELS[name]
    weights, state, graph, eps = parts(model)
    stored = fold(weights, state, graph, FOLDED, eps)
    assert "1.running_mean" not in stored
    inputs = inputs_of(model)
    torch.testing.assert_close(deployed(model, stored)(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_the_folded_models_have_negative_factors() -> None:
    assert all((model[1].weight < 0).any() for model in MODELS.values() if model[1].affine)


@pytest.mark.parametrize("name", MODELS)
def test_stored_order_and_shapes_are_the_graphs(name: str) -> None:
    weights, state, graph, eps = parts(MODELS[name])
    for policy in (FOLDED, APART):
        stored = fold(weights, state, graph, policy, eps)
        shapes = {key: tuple(value.dense().shape) for key, value in stored.items()}
        assert list(shapes.items()) == list(graph.contents(policy).items())


def test_unfolded_tensors_are_the_state_at_sixteen_bits() -> None:
    weights, state, graph, eps = parts(MODELS["conv with bias"])
    stored = fold(weights, state, graph, APART, eps)
    assert all(stored[name] is weights[name] for name in weights)
    others = set(stored) - set(weights)
    assert others == {"0.bias", "5.bias", *(f"1.{k}" for k in ("weight", "bias", "running_mean", "running_var"))}
    for name in others:
        assert isinstance(stored[name], Half)
        assert torch.equal(stored[name].dense(), round_to_half(state[name]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_folding_moves_no_code(bits: int) -> None:
    model = MODELS["conv"]
    bench = bench_of(model)
    apart, folded = (compress(bench, with_bits(policy, bits)).tensors["0.weight"] for policy in (APART, FOLDED))
    assert isinstance(apart, Quantised)
    assert isinstance(folded, Quantised)
    assert torch.equal(apart.codes, folded.codes)
    factor = model[1].weight.detach().numpy() / np.sqrt(model[1].running_var.numpy() + model[1].eps)
    np.testing.assert_allclose(folded.scale.numpy(), apart.scale.numpy() * factor, rtol=2.0**-11)


@pytest.mark.parametrize("policy", [FOLDED, APART], ids=["folded", "apart"])
@pytest.mark.parametrize("bits", [1, 2.5, 3])
def test_scales_and_biases_of_few_bits_take_bytes(policy: Policy, bits: float) -> None:
    bench = bench_of(MODELS["conv with bias"])
    stored = compress(bench, replace(policy, layers={"0": LayerChoice(bits, scheme="entropy")})).tensors
    weight, bias = stored["0.weight"], stored["0.bias"]
    assert isinstance(weight, Quantised)
    assert (weight.scale_bits, type(bias)) == ((8, Byte) if bits < 3 else (16, Half))
    assert isinstance(stored["5.weight"], Full)
    assert isinstance(stored["5.bias"], Half)
    rounded = round_to_byte if bits < 3 else round_to_half
    assert torch.equal(weight.scale, rounded(weight.scale))
    assert torch.equal(bias.dense(), rounded(bias.dense()))


def with_bits(policy: Policy, bits: int) -> Policy:
    return Policy({"0": LayerChoice(bits)}, recovery=policy.recovery)


def bench_of(model: nn.Sequential) -> Workbench:
    inputs = inputs_of(model)
    data = inputs, torch.arange(len(inputs)) % 3
    return Workbench(ClassificationTask(model, data, data, data, batch_size=8))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [4, 32])
def test_folding_changes_the_realised_model_only_by_rounding(name: str, bits: int) -> None:
    model = MODELS[name]
    bench, inputs = bench_of(model), inputs_of(model)
    apart, folded = (
        bench.realise(compress(bench, with_bits(policy, bits)))(inputs).detach().clone() for policy in (APART, FOLDED)
    )
    torch.testing.assert_close(folded, apart, rtol=0, atol=4e-3 * float(apart.abs().max()))


class BranchesBeforeTheNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(x) + x)


def test_a_norm_whose_input_is_used_elsewhere_stays() -> None:
    torch.manual_seed(0)
    model = settle(BranchesBeforeTheNorm())
    assert trace(model, torch.randn(8, 4)).folded(FOLDED) == {}


def test_a_norm_along_other_channels_than_the_layers_stays() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 3)))
    assert trace(model, torch.randn(8, 3, 6)).folded(FOLDED) == {}


def test_a_norm_after_an_embedding_stays() -> None:
    model = settle(nn.Sequential(nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    assert trace(model, torch.arange(8)).folded(FOLDED) == {}


# --- anchoring ---


def test_statistics_that_equal_the_dense_models_become_its_running_ones() -> None:
    batch = {"bn.running_mean": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([0.5, 4.0])}
    running = {"bn.running_mean": torch.tensor([1.5, 1.0]), "bn.running_var": torch.tensor([0.25, 4.0])}
    found = anchored(batch, batch, running)
    for name, value in running.items():
        torch.testing.assert_close(found[name], value)


def test_means_shift_and_variances_scale_as_much_as_on_the_same_batches() -> None:
    batch = {"running_mean": torch.tensor([1.0]), "running_var": torch.tensor([2.0])}
    running = {"running_mean": torch.tensor([1.5]), "running_var": torch.tensor([3.0])}
    found = anchored({"running_mean": torch.tensor([1.25]), "running_var": torch.tensor([1.0])}, batch, running)
    torch.testing.assert_close(found["running_mean"], torch.tensor([1.75]))
    torch.testing.assert_close(found["running_var"], torch.tensor([1.5]))


def test_channel_that_the_batches_leave_silent_gives_finite_statistics() -> None:
    zero, one = {"running_mean": torch.zeros(1), "running_var": torch.zeros(1)}, torch.ones(1)
    found = anchored(zero, zero, {"running_mean": one, "running_var": one})
    assert torch.isfinite(found["running_var"]).all()
    assert (found["running_var"] >= 0).all()


def stats(mean: float, var: float) -> dict[str, Tensor]:
    return {"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.tensor([var])}


@pytest.mark.parametrize("batch", [(0.1, 0.3), (0.0, 0.0), (3.0, 1e-12), (0.0, 1e4)])
def test_dense_model_keeps_its_statistics_exactly_whatever_the_batches_say(batch: tuple[float, float]) -> None:
    running = stats(0.7, 0.9)
    found = anchored(stats(*batch), stats(*batch), running)
    assert all(torch.equal(found[name], value) for name, value in running.items())


@pytest.mark.parametrize("left", [0.0, 1e-8])
def test_channel_that_compression_silenced_gives_its_bias_alone(left: float) -> None:
    """Its output is constant: a shift of the mean would be divided by a deviation of nothing."""
    found = anchored(stats(0.0, left), stats(0.2, 1.0), stats(0.3, 1.1))
    normalised = (0.0 - found["bn.running_mean"]) / (found["bn.running_var"] + 1e-5).sqrt()
    assert abs(float(normalised)) < 0.5


def test_channel_that_only_the_dense_model_leaves_silent_stays_finite_and_open() -> None:
    found = anchored(stats(0.2, 0.5), stats(0.0, 0.0), stats(0.1, 0.4))
    assert 0.1 < float(found["bn.running_var"]) < 10
    assert abs(float(found["bn.running_mean"])) < 1


def reestimated(keep: float) -> tuple[nn.Sequential, StoredModel]:
    """`cnn` with one channel that its training inputs leave silent, under a policy that only removes channels."""
    model = cnn(bias=True)
    with torch.no_grad():
        model[0].weight[0] = 0.0
    data = inputs_of(model, 32), torch.zeros(32, dtype=torch.long)
    bench = Workbench(ClassificationTask(model, data, data, data, batch_size=8))
    policy = Policy(keep={"0": keep}, recovery=Recovery(fold_bn=False, reestimate_bn=True))
    return model, compress(bench, policy).tensors


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_channels_whose_inputs_did_not_change_keep_their_statistics(keep: float) -> None:
    model, tensors = reestimated(keep)
    for name in ("running_mean", "running_var"):
        dense = round_to_half(getattr(model[1], name)).float()
        kept = [int((dense == value).nonzero()[0]) for value in tensors[f"1.{name}"].dense()]
        assert kept == sorted(kept)
        assert len(kept) == round(8 * keep)
