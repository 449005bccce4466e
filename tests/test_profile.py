"""A profile: which levels it keeps, what it measures, and that it comes back as it was written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from fakes import GRAPH, FakeEvaluator, make_graph, make_profile, make_space

from autocompress.errors import RunError, TaskError
from autocompress.graph import Layer
from autocompress.policy import LayerChoice, Policy
from autocompress.profile import BROKEN_LOSS, Level, Profile, levels_of, measure, profile_key, with_groups

TEXT = "[layers]\nbits = [2, 4, 8]\nsparsity = [0.0, 0.5]\n"


class Counting(FakeEvaluator):
    """Remembers the policies whose loss was asked for."""

    asked: list[Policy]

    def loss(self, policy: Policy) -> float:
        self.asked = [*getattr(self, "asked", []), policy]
        return super().loss(policy)


def made(measures: FakeEvaluator, text: str = TEXT) -> Profile:
    return measure(measures, make_space(text), "key", lambda *_: None, iter(range(100)).__next__)


def test_each_layer_is_evaluated_once_and_alone() -> None:
    counting = Counting()
    profile = made(counting)
    assert [set(p.layers) for p in counting.asked] == [{layer.name} for layer in GRAPH.layers]
    assert profile.evaluations == len(GRAPH.layers)
    assert profile.seconds == 1


def test_sensitivity_times_error_is_the_measured_loss_at_the_probed_level() -> None:
    counting = Counting()
    profile = made(counting)
    for layer, policy in zip(profile.layers, counting.asked, strict=True):
        probed = policy.layers[layer.name]
        (loss,) = [x for level, x in zip(layer.levels, layer.losses(), strict=True) if level.choice == probed]
        assert loss == pytest.approx(FakeEvaluator().loss(policy))


def test_only_levels_that_another_beats_in_bytes_and_error_are_left_out() -> None:
    space, fake = make_space(TEXT), FakeEvaluator()
    for layer in GRAPH.layers:
        every = [fake.level(layer, LayerChoice(bits, zeros), "nearest") for bits in (2, 4, 8) for zeros in (0.0, 0.5)]
        kept = levels_of(fake, space, layer)
        for level in every:
            beaten = any(x.bytes <= level.bytes and x.error < level.error for x in every)
            assert (level in kept) == (not beaten)


def test_model_that_breaks_at_the_probe_is_as_sensitive_as_can_be() -> None:
    class Breaking(FakeEvaluator):
        def loss(self, policy: Policy) -> float:
            if "conv1" in policy.layers or policy.keep:
                raise FloatingPointError("nan")
            return super().loss(policy)

    profile = with_groups(made(Breaking()), Breaking(), make_space(), lambda *_: None, lambda: 0.0)
    first = profile.layers[0]
    assert max(first.losses()) >= BROKEN_LOSS
    assert {group.loss for group in profile.groups} == {BROKEN_LOSS}


def test_progress_ends_complete() -> None:
    seen: list[tuple[int, int]] = []
    measure(FakeEvaluator(), make_space(TEXT), "key", lambda done, total, _: seen.append((done, total)), lambda: 0.0)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_json_brings_back_an_equal_profile() -> None:
    profile = make_profile(make_space())
    assert profile.groups
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("layers"),
        lambda d: d["layers"][0].update(sensitivity=float("nan")),
        lambda d: d["layers"][0]["levels"][0].update(error="much"),
        lambda d: d["layers"][0]["levels"][0]["choice"].update(bits=9),
        lambda d: d["layers"][0]["levels"][0]["choice"].update(code="import os"),
        lambda d: d.update(groups=[1]),
    ],
)
def test_damaged_profile_is_refused(damage: Any) -> None:
    data = json.loads(json.dumps(make_profile(make_space()).to_json()))
    damage(data)
    with pytest.raises(RunError, match="profile"):
        Profile.from_json(data)


def test_anything_but_an_object_is_refused() -> None:
    for data in (None, 1, [], "x"):
        with pytest.raises(RunError):
            Profile.from_json(data)


def test_key_changes_with_model_data_and_levels_and_with_nothing_else() -> None:
    key = profile_key(make_space(), {"weights": "a"})
    assert profile_key(make_space(), {"weights": "a"}) == key
    others = [
        profile_key(make_space(), {"weights": "b"}),
        profile_key(make_space(TEXT), {"weights": "a"}),
        profile_key(make_space(TEXT + 'scheme = ["asymmetric"]\n'), {"weights": "a"}),
        profile_key(make_space(TEXT + 'solver = ["database"]\n'), {"weights": "a"}),
        profile_key(make_space(graph=make_graph(lambda name: f"x{name}")), {"weights": "a"}),
    ]
    assert len({key, *others}) == 6


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside `data`; of a list only the first item."""
    items = (
        list(data.items()) if isinstance(data, dict) else list(enumerate(data))[:1] if isinstance(data, list) else []
    )
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


@pytest.mark.parametrize("value", [None, True, -1, 1e400, float("nan"), 10**400, "x", [], {}, [[]]])
def test_whatever_is_put_anywhere_is_refused_or_makes_a_usable_profile(value: Any) -> None:
    space = make_space()
    whole = json.loads(json.dumps(make_profile(space).to_json()))
    for path in places(whole):
        data = json.loads(json.dumps(whole))
        inside = data
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        try:
            profile = Profile.from_json(data)
        except RunError:
            continue
        assert all(layer.levels and min(level.bytes for level in layer.levels) >= 0 for layer in profile.layers), path
        assert all(math.isfinite(loss) for layer in profile.layers for loss in layer.losses()), path
        assert all(0 < group.keep <= 1 and math.isfinite(group.loss) for group in profile.groups), path
        assert math.isfinite(profile.seconds), path


def test_key_changes_with_what_the_probed_models_are_built_with() -> None:
    more = "[channels]\nkeep = [0.5, 1.0]\n"
    keys = [
        profile_key(make_space(TEXT + more + rest), "model")
        for rest in ("", 'criterion = ["l1"]\n', "[batch_norm]\nreestimate = [false]\n")
    ]
    assert len(set(keys)) == 3
    assert profile_key(make_space(TEXT + more + "[recovery]\nlr = [0.001, 0.1]\n"), "model") == keys[0]


def test_groups_are_probed_inside_their_range_and_fixed_ones_not_at_all() -> None:
    text = TEXT + '[channels]\nkeep = [0.25, 0.5, 1.0]\n[[override]]\nmatch = "conv2"\nkeep = [1.0]\n'
    counting, space = Counting(), make_space(text)
    before = made(counting, text)
    after = with_groups(before, counting, space, lambda *_: None, iter(range(9)).__next__)
    assert [(group.name, group.keep) for group in after.groups] == [("conv1", 0.25), ("conv1", 0.5)]
    for group in after.groups:
        assert group.loss == pytest.approx(counting.loss(Policy(keep={"conv1": group.keep})))
    assert (after.evaluations, after.seconds) == (before.evaluations + 2, before.seconds + 1)
    assert after.layers == before.layers


def test_narrowest_a_middle_and_the_widest_ratio_of_many_are_probed() -> None:
    counting, space = Counting(), make_space(TEXT + "[channels]\nkeep = [0.125, 0.25, 0.375, 0.5, 0.75, 1.0]\n")
    groups = with_groups(made(counting), counting, space, lambda *_: None, lambda: 0.0).groups
    assert [group.keep for group in groups if group.name == "conv2"] == [0.125, 0.375, 0.75]


def test_removing_a_group_is_probed_for_itself() -> None:
    graph = replace(GRAPH, groups=tuple(replace(g, removable=g.name == "conv1") for g in GRAPH.groups))
    space = make_space(TEXT + "[channels]\nkeep = [0.0, 0.25, 0.375, 0.5, 0.75, 1.0]\n", graph)
    counting = Counting()
    found = with_groups(made(counting), counting, space, lambda *_: None, lambda: 0.0)
    probed = {name: [g.keep for g in found.groups if g.name == name] for name in ("conv1", "conv2")}
    assert probed == {"conv1": [0.0, 0.25, 0.375, 0.75], "conv2": [0.25, 0.375, 0.75]}
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_layer_that_no_level_harms_is_not_evaluated() -> None:
    counting = Counting()
    (first, *_) = made(counting, "[layers]\nbits = [32]\n").layers
    assert first.sensitivity == 0.0
    assert not hasattr(counting, "asked")


# --- what fails ---


class Failing(FakeEvaluator):
    """`solve` and `evaluate` say which (layer, bits) cannot be solved, or evaluated alone."""

    def __init__(self, solve: Any = (), evaluate: Any = ()) -> None:
        super().__init__()
        self.unsolvable, self.unusable = set(solve), set(evaluate)

    def level(self, layer: Layer, choice: LayerChoice, solver: str) -> Level:
        if (layer.name, choice.bits) in self.unsolvable:
            raise RuntimeError("no factor\nof H")
        return super().level(layer, choice, solver)

    def loss(self, policy: Policy) -> float:
        if any((name, choice.bits) in self.unusable for name, choice in policy.layers.items()):
            raise ValueError("wrong shape")
        return super().loss(policy)


def test_level_that_cannot_be_solved_is_left_out_with_a_warning_that_names_layer_and_error() -> None:
    with pytest.warns(UserWarning, match="layer conv2 is not used at 2 bits.*RuntimeError: no factor of H"):
        profile = made(Failing(solve=[("conv2", 2)]))
    bits = {layer.name: {level.choice.bits for level in layer.levels} for layer in profile.layers}
    assert 2 not in bits["conv2"]
    assert 2 in bits["conv1"]


def test_level_that_cannot_be_evaluated_is_left_out_and_the_next_nearest_is_probed() -> None:
    whole = made(FakeEvaluator())
    with pytest.warns(UserWarning, match="layer conv2 is not used at 8 bits with 50% zeros: ValueError"):
        profile = made(Failing(evaluate=[("conv2", 8)]))
    gone = LayerChoice(8, 0.5)  # the nearest
    assert list(profile.layers[1].levels) == [level for level in whole.layers[1].levels if level.choice != gone]
    assert profile.layers[1].sensitivity > 0
    assert (profile.layers[0], profile.layers[2]) == (whole.layers[0], whole.layers[2])


def test_level_whose_error_is_not_a_number_is_left_out() -> None:
    class Odd(FakeEvaluator):
        def level(self, layer: Layer, choice: LayerChoice, solver: str) -> Level:
            known = super().level(layer, choice, solver)
            return replace(known, error=math.nan) if choice.bits == 2 else known

    with pytest.warns(UserWarning, match="its error is nan"):
        profile = made(Odd())
    assert all(level.choice.bits != 2 for layer in profile.layers for level in layer.levels)


@pytest.mark.filterwarnings("ignore:layer conv2")
@pytest.mark.parametrize("stage", ["solve", "evaluate"])
def test_layer_whose_levels_all_fail_is_named_with_what_to_do(stage: str) -> None:
    every = [("conv2", bits) for bits in (2, 4, 8)]
    with pytest.raises(TaskError, match=r"every level of layer conv2 failed.*override"):
        made(Failing(**{stage: every}))


@pytest.mark.filterwarnings("ignore:channels of conv2")
def test_group_that_cannot_be_evaluated_seems_indispensable() -> None:
    class Narrow(FakeEvaluator):
        def loss(self, policy: Policy) -> float:
            if policy.keep:
                raise RuntimeError("size mismatch")
            return super().loss(policy)

    with pytest.warns(UserWarning, match="channels of conv1.*size mismatch"):
        profile = with_groups(made(FakeEvaluator()), Narrow(), make_space(), lambda *_: None, lambda: 0.0)
    assert {group.loss for group in profile.groups} == {BROKEN_LOSS}
