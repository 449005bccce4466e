import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_checks import Net, check, conv, group, images, outputs, pool, prunable, settle
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.policy import Policy
from autocompress.trace import trace

FLAT = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))


def mlp(forward: Any, inputs: int = 5, width: int = 8, **layers: nn.Module) -> nn.Module:
    return settle(Net(forward, stem=nn.Linear(inputs, width), head=nn.Linear(width, 3), **layers))


# --- inputs -----------------------------------------------------------------------------------------------


def test_inputs_by_name() -> None:
    def forward(net: Net, *, image: Tensor, weight: Tensor) -> Tensor:
        return net.head(F.relu(net.stem(image)) * weight)

    graph = check(mlp(forward), {"weight": torch.rand(4, 1), "image": FLAT})
    assert prunable(graph) == {"stem"}


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_inputs(kind: type) -> None:
    def forward(net: Net, a: Tensor, b: Tensor) -> Tensor:
        return net.head(F.relu(net.stem(a) + net.other(b)))

    graph = check(mlp(forward, other=nn.Linear(2, 8)), kind([FLAT, torch.randn(4, 2)]))
    assert prunable(graph) == {"stem", "other"}
    assert group(graph, "stem") == group(graph, "other")


def test_words_beside_numbers() -> None:
    def forward(net: Net, words: Tensor, numbers: Tensor) -> Tensor:
        return net.head(F.relu(net.stem(torch.cat([net.embed(words), numbers], dim=1))))

    graph = check(mlp(forward, embed=nn.Embedding(9, 3)), (torch.tensor([1, 2, 3, 4]), torch.randn(4, 2)))
    assert prunable(graph) == {"stem"}
    assert graph.dense_macs == 5 * 8 + 8 * 3


def test_only_the_first_examples_of_a_batch_are_needed() -> None:
    whole, few = torch.randn(64, 5), mlp(lambda net, x: net.head(F.relu(net.stem(x))))
    assert trace(few, whole) == trace(few, whole[:4]) == trace(few, whole[:1])


# --- outputs ----------------------------------------------------------------------------------------------


def test_several_outputs() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(net.stem(x))
        return net.head(hidden), net.second(hidden)

    graph = check(mlp(forward, second=nn.Linear(8, 2)), FLAT)
    assert prunable(graph) == {"stem"}
    assert group(graph, "second").frozen == group(graph, "head").frozen


def test_outputs_nested_in_dictionaries() -> None:
    def forward(net: Net, x: Tensor) -> dict[str, Any]:
        hidden = F.relu(net.stem(x))
        return {"all": {"logits": net.head(hidden), "more": [net.second(hidden), None]}, "label": x.argmax(1)}

    assert prunable(check(mlp(forward, second=nn.Linear(8, 2)), FLAT)) == {"stem"}


def test_features_that_are_an_output_are_frozen() -> None:
    def forward(net: Net, x: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(net.stem(x))
        return {"logits": net.head(hidden), "features": hidden}

    graph = check(mlp(forward), FLAT)
    assert group(graph, "stem").frozen == "removing them changes the shape of the model's outputs"


def test_a_statistic_of_features_in_the_outputs_freezes_them() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(net.stem(x))
        return net.head(hidden), hidden.mean(dim=1)

    assert "the model uses them elsewhere too" in group(check(mlp(forward), FLAT), "stem").frozen


def softmax_features(net: Net, x: Tensor) -> Tensor:
    return net.head(net.stem(x).softmax(dim=1))


def test_a_large_output_does_not_hide_a_small_one() -> None:
    def forward(net: Net, x: Tensor) -> dict[str, Tensor]:
        return {"pixels": 1e6 * net.other(x), "logits": softmax_features(net, x)}

    graph = check(mlp(forward, other=nn.Linear(5, 2)), FLAT)
    assert group(graph, "stem").frozen


def test_a_large_offset_does_not_hide_a_change() -> None:
    """As with a regression to prices or years, whose targets were not centred."""
    graph = check(mlp(lambda net, x: 2e4 + softmax_features(net, x)), FLAT)
    assert group(graph, "stem").frozen


def test_masked_logits_do_not_freeze_everything() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        logits = net.head(F.relu(net.stem(x)))
        return logits.masked_fill(torch.tensor([False, True, False]), -torch.inf)

    assert prunable(trace(mlp(forward), FLAT)) == {"stem"}


# --- operations that mix channels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (nn.GroupNorm(2, 8), "GroupNorm"),
        (nn.GroupNorm(8, 8), "GroupNorm"),
        (nn.GroupNorm(1, 8), "GroupNorm"),
        (nn.LayerNorm([8, 8, 8]), "LayerNorm"),
        (nn.LocalResponseNorm(3, alpha=1.0), ""),
        (nn.Softmax(dim=1), ""),
    ],
)
def test_norms_across_channels_freeze_them(norm: nn.Module, name: str) -> None:
    model = settle(nn.Sequential(conv(3, 8), norm, nn.ReLU(), conv(8, 6), nn.Flatten(), nn.Linear(384, 3)))
    graph = check(model, images())
    assert prunable(graph) == {"3"}
    assert group(graph, "0").frozen == f"it passes through 1 ({name})" if name else group(graph, "0").frozen


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: F.group_norm(x, 2),
        lambda x: F.normalize(x, dim=1),
        lambda x: x - x.mean(dim=1, keepdim=True),
        lambda x: x.flip(1) + x,
        lambda x: x * x.roll(1, 1),
    ],
)
def test_functions_across_channels_freeze_them(mix: Any) -> None:
    model = settle(Net(lambda net, x: net.head(pool(F.relu(mix(net.stem(x))))), stem=conv(3, 8), head=nn.Linear(8, 3)))
    assert group(check(model, images()), "stem").frozen


def test_layer_norm_in_a_transformer_leaves_the_hidden_width_free() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 8), encoder, nn.Flatten(), nn.Linear(56, 3)).eval()
    graph = trace(model, torch.randn(4, 7, 5))
    assert "1.linear1" in prunable(graph)
    assert "LayerNorm" in group(graph, "1.linear2").frozen


def test_instance_norm_goes_along() -> None:
    model = settle(
        nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3))
    )
    assert prunable(check(model, images())) == {"0"}


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2, groups=8)])
def test_transposed_convolutions_freeze_what_passes_them(layer: nn.ConvTranspose2d) -> None:
    model = nn.Sequential(conv(3, 8), layer, nn.ReLU(), conv(layer.out_channels, 5), nn.Flatten(), nn.Linear(1280, 3))
    graph = check(settle(model), images())
    assert prunable(graph) == {"3"}
    assert group(graph, "0").frozen == "it passes through 1 (ConvTranspose2d)"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_freeze_what_passes_them(kind: type[nn.Module]) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.recurrent(F.relu(net.stem(x)))[0][:, -1])

    graph = check(mlp(forward, recurrent=kind(8, 8, batch_first=True)), torch.randn(4, 6, 5))
    assert prunable(graph) == set()
    assert group(graph, "stem").frozen == "recurrent units are not pruned"
    assert {g.name: g.frozen for g in graph.groups}["recurrent"] == "recurrent units are not pruned"
    assert graph.notes == ()


def test_channels_along_a_bare_parameter_are_frozen() -> None:
    model = mlp(lambda net, x: net.head(F.relu(net.stem(x)) + net.offset))
    model.offset = nn.Parameter(torch.randn(8))
    graph = check(model, FLAT)
    assert group(graph, "stem").frozen == "its channels run along a bare parameter"
    assert graph.tensors["offset"] == ((8,), "float32")


def test_channels_along_a_bare_buffer_are_frozen() -> None:
    model = mlp(lambda net, x: net.head(F.relu(net.stem(x)) + net.offset))
    model.register_buffer("offset", torch.randn(8))
    assert "the model breaks when they are removed" in group(check(model, FLAT), "stem").frozen


def test_parametrised_weights_are_left_alone() -> None:
    layers = {"stem": nn.utils.parametrizations.weight_norm(conv(3, 8)), "last": conv(8, 6), "head": nn.Linear(6, 3)}
    model = settle(Net(lambda net, x: net.head(pool(net.last(net.stem(x)))), **layers))
    graph = check(model, images())
    assert [layer.name for layer in graph.layers] == ["last", "head"]
    assert prunable(graph) == {"last"}


# --- models that cannot be traced ---------------------------------------------------------------------------


def test_a_model_without_weights_to_compress_is_refused() -> None:
    with pytest.raises(TaskError, match="no weight of a Conv1d/2d/3d, Linear, Embedding, recurrent or attention layer"):
        trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()), images())


def test_a_subclass_with_its_own_forward_is_a_layer_whose_norm_stays() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return F.conv2d(input, weight / weight.std(), self.bias, padding=1)

    model = settle(nn.Sequential(Standardised(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 3)))
    layers = trace(model, images()).layers
    assert [(layer.name, layer.batch_norm) for layer in layers] == [("0", None), ("3", None)]


def test_layers_inside_attention_are_layers() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(56, 3)).eval()
    layers = [layer.name for layer in trace(model, torch.randn(4, 7, 8)).layers]
    assert layers == ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight", "0.linear1", "0.linear2", "2"]


@pytest.mark.parametrize("where", ["inside", "outputs", "labels", "no_grad"])
def test_a_model_that_hides_from_autograd_is_still_compressible(where: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        if where == "no_grad":
            with torch.no_grad():
                return net.head(F.relu(net.stem(x)))
        hidden = F.relu(net.stem(x))
        out = net.head(hidden.detach() if where == "inside" else hidden)
        return {"inside": out, "outputs": out.detach(), "labels": out.argmax(dim=1)}[where]

    graph = trace(mlp(forward), FLAT)
    assert [layer.name for layer in graph.layers] == ["stem", "head"]
    assert graph.prunable == ()
    assert graph.dense_macs == 5 * 8 + 8 * 3
    assert graph.kept(Policy()) == {}


@pytest.mark.parametrize("where", ["outputs", "no_grad"])
def test_a_model_that_cannot_be_traced_says_so(where: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(where != "no_grad"):
            return net.head(F.relu(net.stem(x))).detach()

    (note,) = trace(mlp(forward), FLAT).notes
    assert "no channels can be pruned" in note


def test_a_tracer_that_fails_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("torch_pruning.DependencyGraph.build_dependency", fail)
    graph = trace(mlp(lambda net, x: net.head(F.relu(net.stem(x)))), FLAT)
    assert graph.groups == ()
    assert graph.notes == ("no channels can be pruned: the dependency tracer failed (RuntimeError: first line)",)


def test_frozen_parameters_are_traced_and_stay_frozen() -> None:
    model = mlp(lambda net, x: net.head(F.relu(net.stem(x))))
    model.requires_grad_(False)
    assert prunable(check(model, FLAT)) == {"stem"}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_layer_that_is_never_called_costs_nothing_and_is_stored() -> None:
    graph = check(mlp(lambda net, x: net.head(F.relu(net.stem(x))), unused=nn.Linear(8, 9)), FLAT)
    assert next(layer for layer in graph.layers if layer.name == "unused").positions == 0
    assert graph.tensors["unused.weight"] == ((9, 8), "float32")


def test_tracing_changes_nothing() -> None:
    model = settle(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(512, 3)))
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    model.train()
    trace(model, images())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert [t.tolist() for t in outputs(before, images())] == [t.tolist() for t in outputs(model.eval(), images())]
    assert torch.equal(state, torch.random.get_rng_state())


def test_tracing_twice_gives_the_same_graph() -> None:
    model = settle(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)))
    one, two = trace(model, images()), trace(copy.deepcopy(model), images())
    assert one == two
    assert one.fingerprint == two.fingerprint
