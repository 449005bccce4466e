"""Tensors that a model has for a while."""

import pytest
import torch
from torch import nn

from autocompress.surgery import Removed, hold, lent, shadow


def model() -> nn.Sequential:
    found = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    return found.eval()


def test_lent_tensors_are_the_given_ones_and_go_again() -> None:
    net = model()
    before = {name: (p, p.data_ptr()) for name, p in net.named_parameters()}
    value = torch.randn(2, 6, 1, 1)
    with lent(net, {"3.weight": value, "1.running_mean": torch.ones(6)}):
        assert net[3].weight.data_ptr() == value.data_ptr()
        assert bool((net[1].running_mean == 1).all())
    assert {name: (p, p.data_ptr()) for name, p in net.named_parameters()} == before
    assert not bool(net[1].running_mean.any())


def test_sizes_follow_and_come_back_even_where_nothing_is_left() -> None:
    net, x = model(), torch.randn(2, 3, 8, 8)
    dense = net(x)
    norm = {f"1.{key}": torch.ones(0) for key in ("weight", "bias", "running_mean", "running_var")}
    none = {"0.weight": torch.zeros(0, 3, 3, 3), "0.bias": torch.zeros(0), **norm}
    rest = {"2.weight": torch.zeros(0, 1, 3, 3), "2.bias": torch.zeros(0), "3.weight": torch.zeros(2, 0, 1, 1)}
    with lent(net, {**none, **rest}):
        assert all(isinstance(module, Removed) for module in net)
        assert torch.equal(net(x), net[3].bias.reshape(2, 1, 1).expand(2, 2, 4, 4))
    assert [type(module) for module in net] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.Conv2d]
    assert (net[0].out_channels, net[1].num_features, net[2].groups, net[3].in_channels) == (6, 6, 6, 6)
    assert torch.equal(net(x), dense)


def test_a_tied_weight_is_lent_under_both_names() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with lent(net, {"0.weight": torch.eye(4)}):
        assert torch.equal(net[1].weight, torch.eye(4))
    assert net[1].weight is net[0].weight


def test_all_comes_back_when_the_model_raises() -> None:
    net, x = model(), torch.randn(1, 3, 8, 8)
    dense = net(x)
    with pytest.raises(RuntimeError), lent(net, {"3.weight": torch.zeros(2, 5, 1, 1)}):
        net(x)
    assert torch.equal(net(x), dense)


def test_a_shadow_has_the_weights_but_not_the_modules_or_buffers() -> None:
    net = model()
    net.append(net[3])
    other = shadow(net).train()
    assert not net.training
    assert other[4] is other[3]
    assert not set(map(id, net.modules())) & set(map(id, other.modules()))
    assert [p.data_ptr() for p in net.parameters()] == [p.data_ptr() for p in other.parameters()]
    assert not {b.data_ptr() for b in net.buffers()} & {b.data_ptr() for b in other.buffers()}


def test_what_a_shadow_holds_leaves_the_original_as_it_was() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other, weight = shadow(net), torch.ones(6, 3, 3, 3)
    hold(other, "0.weight", weight)
    hold(other, "1.running_mean", torch.ones(6))
    hold(other, "3.weight", torch.ones(2, 4, 1, 1))
    assert other[0].weight.data_ptr() == weight.data_ptr()
    assert bool((other[1].running_mean == 1).all())
    assert other[3].in_channels == 4
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
