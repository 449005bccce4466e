import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import SpaceError
from autocompress.graph import Graph, Group, Layer, Member
from autocompress.measure.size import Size
from autocompress.policy import BITS, LayerChoice, Policy, Recovery
from autocompress.space import (
    Categorical,
    Ordered,
    Parameter,
    Real,
    Space,
    SpaceFile,
    Value,
    load_space,
    parse_space,
    section_bytes,
    shipped,
)

SHIPPED = shipped()


def each(channels: int, per_channel: int = 1) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(c * per_channel, (c + 1) * per_channel)) for c in range(channels))


def make_graph() -> Graph:
    """conv 3 -> 16, norm, conv 16 -> 24, linear 24 -> 10; written down, so that no tracer is needed."""
    layers = (
        Layer("stem.conv", "conv2d", (16, 3, 3, 3), positions=64, batch_norm="stem.norm"),
        Layer("body.conv", "conv2d", (24, 16, 3, 3), positions=16, has_bias=True),
        Layer("head", "linear", (10, 24), has_bias=True),
    )
    norm = {f"stem.norm.{key}": ((16,), "float32") for key in ("weight", "bias", "running_mean", "running_var")}
    tensors = {
        "stem.conv.weight": ((16, 3, 3, 3), "float32"),
        **norm,
        "body.conv.weight": ((24, 16, 3, 3), "float32"),
        "body.conv.bias": ((24,), "float32"),
        "head.weight": ((10, 24), "float32"),
        "head.bias": ((10,), "float32"),
    }
    stem = [Member(name, 0, each(16)) for name in ("stem.conv.weight", *norm)]
    groups = (
        Group("stem.conv", 16, (*stem, Member("body.conv.weight", 1, each(16)))),
        Group(
            "body.conv",
            24,
            (
                Member("body.conv.weight", 0, each(24)),
                Member("body.conv.bias", 0, each(24)),
                Member("head.weight", 1, each(24)),
            ),
        ),
        Group("head", 10, (Member("head.weight", 0, each(10)), Member("head.bias", 0, each(10))), "the model's output"),
    )
    return Graph(layers, groups, tensors, dense_bytes=4 * 4_226)


GRAPH = make_graph()
SIZE = Size(GRAPH, "task", "accuracy")


def space(text: str = "", graph: Graph = GRAPH, *, views: bool = False) -> Space:
    return Space(parse_space(text, "my.toml"), graph, views=views)


def value_of(parameter: Parameter, draw: random.Random) -> Value:
    if isinstance(parameter, Real):
        return draw.uniform(parameter.low, parameter.high)
    if isinstance(parameter, Ordered):
        return draw.randrange(len(parameter.values))
    return draw.choice(parameter.values)


def random_policy(space: Space, seed: int, epochs: int = 0) -> Policy:
    draw = random.Random(seed)
    return space.decode(
        {p.name: value_of(p, draw) for p in space.policy_parameters + space.recovery_parameters}, epochs
    )


# --- files that come along ----------------------------------------------------------------------------------


def test_the_shipped_spaces_are_these() -> None:
    assert SHIPPED == [
        "default",
        "distill",
        "int8",
        "large",
        "latency",
        "mixed-precision",
        "prune-only",
        "structured",
        "tiny",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_space_loads_and_leaves_choices_open(name: str) -> None:
    built = Space(load_space(name), GRAPH)
    assert built.file.description
    assert built.policy_parameters
    assert built.recovery_parameters
    for policy in (built.smallest(), built.uniform(), *built.baselines()):
        GRAPH.check(policy)


@pytest.mark.parametrize("name", SHIPPED)
def test_parameter_names_are_unique_and_values_are_several(name: str) -> None:
    built = Space(load_space(name), GRAPH)
    parameters = built.policy_parameters + built.recovery_parameters
    assert len({p.name for p in parameters}) == len(parameters)
    for parameter in parameters:
        assert parameter.low < parameter.high if isinstance(parameter, Real) else len(set(parameter.values)) > 1


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_space_can_write_less_than_a_dense_file(name: str) -> None:
    assert SIZE(Space(load_space(name), GRAPH).smallest()) < GRAPH.dense_bytes


def test_a_space_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[layers]\nbits = [4, 8]\n")
    assert load_space(str(path)).layers.bits == [4, 8]
    assert load_space(str(path)).channels.keep == [1.0]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SpaceError, match=r"no search space 'defualt'.*default, distill, int8"):
        load_space("defualt")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match="cannot read the search space"):
        load_space(str(path))


def test_a_folder_is_no_space(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="no search space"):
        load_space(str(tmp_path))


# --- files that are wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bits = [4]", ["unknown key 'bits'", "layers, channels, batch_norm, recovery, override"]),
        ("[layer]\nbits = [4]", ["unknown key 'layer'", "did you mean 'layers'?"]),
        ("[layers]\nbit = [4]", ["unknown key 'layers.bit'", "did you mean 'bits'?", "bits, sparsity, scheme"]),
        ("[channels]\nratio = [1.0]", ["unknown key 'channels.ratio'", "keep, criterion, multiple_of"]),
        ("[recovery]\nepochs = 3", ["unknown key 'recovery.epochs'", "lr, decay"]),
        (
            '[[override]]\nmatch = "a"\nscheme = ["symmetric"]',
            ["unknown key 'override.0.scheme'", "match, bits, sparsity, keep"],
        ),
        ("[layers]\nbits = []", ["layers.bits = []", "at least 1 item"]),
        ("[layers]\nsparsity = []", ["layers.sparsity = []", "at least 1 item"]),
        ("[layers]\nscheme = []", ["layers.scheme = []", "at least 1 item"]),
        ("[channels]\nkeep = []", ["channels.keep = []", "at least 1 item"]),
        ("[channels]\ncriterion = []", ["channels.criterion = []", "at least 1 item"]),
        ("[batch_norm]\nfold = []", ["batch_norm.fold = []", "at least 1 item"]),
        ("[recovery]\ndecay = []", ["recovery.decay = []", "at least 1 item"]),
        ("[recovery]\nlr = []", ["recovery.lr = []", "give [low, high]"]),
        ("[layers]\nbits = 4", ["layers.bits = 4", "list"]),
        ('[layers]\nbits = ["four"]', ["layers.bits.0 = 'four'", "number"]),
        ("[layers]\nbits = [4.5]", ["layers.bits = [4.5]", "4.5 is not among 1, 2,"]),
        ("[layers]\nbits = [2.5]", ["half bits", 'scheme = ["entropy"]']),
        ('[layers]\nsparsity = "half"', ["layers.sparsity = 'half'", "list"]),
        ("layers = 3", ["layers = 3"]),
        ("[layers]\nscheme = [1]", ["layers.scheme.0 = 1", "'symmetric', 'asymmetric' or 'entropy'"]),
        ('[batch_norm]\nfold = ["maybe"]', ["batch_norm.fold.0 = 'maybe'", "boolean"]),
        ("[layers]\nbits = [4, 9]", ["layers.bits = [4, 9]", "9 is not among 1, 2, 3, 4, 5, 6, 7, 8, 16, 32"]),
        ("[layers]\nsparsity = [0.0, 1.0]", ["layers.sparsity.1 = 1.0", "less than 1"]),
        ("[layers]\nsparsity = [-0.1]", ["layers.sparsity.0 = -0.1", "greater than or equal to 0"]),
        ("[layers]\nsparsity = [nan]", ["layers.sparsity.0 = nan"]),
        ('[layers]\nscheme = ["linear"]', ["layers.scheme.0 = 'linear'", "'symmetric', 'asymmetric' or 'entropy'"]),
        ("[channels]\nkeep = [-0.1]", ["channels.keep.0 = -0.1", "greater than or equal to 0"]),
        ("[channels]\nkeep = [1.5]", ["channels.keep.0 = 1.5", "less than or equal to 1"]),
        ('[channels]\ncriterion = ["random"]', ["channels.criterion.0 = 'random'", "'l1', 'l2', 'taylor'"]),
        ("[channels]\nmultiple_of = 0", ["channels.multiple_of = 0", "greater than or equal to 1"]),
        ("[recovery]\nlr = [0.1, 0.01]", ["recovery.lr = [0.1, 0.01]", "low <= high"]),
        ("[recovery]\nlr = [0.1]", ["recovery.lr = [0.1]", "give [low, high]"]),
        ("[recovery]\nlr = [0.0, 0.1]", ["recovery.lr.0 = 0.0", "greater than 0"]),
        ("[recovery]\nlr = [0.1, 100.0]", ["recovery.lr", "100"]),
        ("[recovery]\nlr = [0.1, inf]", ["recovery.lr", "inf"]),
        ("[recovery]\ntemperature = [1.0, inf]", ["recovery.temperature", "inf"]),
        ("[recovery]\nhint_weight = [0.0, inf]", ["recovery.hint_weight", "inf"]),
        ("[recovery]\ndistill_weight = [0.0, 1.5]", ["recovery.distill_weight.1 = 1.5", "less than or equal to 1"]),
        ("[recovery]\ndecay_rate = [0.0, 0.5]", ["recovery.decay_rate.0 = 0.0", "greater than 0"]),
        ("[recovery]\nadjust_factor = [0.0]", ["recovery.adjust_factor.0 = 0.0", "greater than 0"]),
        ("[recovery]\nwarmup = [0.0, 0.6]", ["recovery.warmup.1 = 0.6", "less than or equal to 0.5"]),
        ("[recovery]\nwarmup = [0.2, 0.1]", ["recovery.warmup = [0.2, 0.1]", "low <= high"]),
        ("[recovery]\nema = [1.0]", ["recovery.ema.0 = 1.0", "less than 1"]),
        ("[recovery]\nviews = [0]", ["recovery.views.0 = 0", "greater than or equal to 1"]),
        ("[recovery]\nema = []", ["recovery.ema = []", "at least 1 item"]),
        ("[recovery]\nscales = ['trained']", ["recovery.scales.0 = 'trained'", "'fixed' or 'learned'"]),
        ("[recovery]\nadjust_cooldown = [-1]", ["recovery.adjust_cooldown.0 = -1", "greater than or equal to 0"]),
        ("[recovery]\nadjust_patience = [-1]", ["recovery.adjust_patience.0 = -1", "greater than or equal to 0"]),
        ('[[override]]\nmatch = "a"\nbits = [0]', ["override.0.bits = [0]", "0 is not among"]),
        ("[[override]]\nbits = [4]", ["override.0.match", "required"]),
        ("override = 1", ["override = 1", "list"]),
    ],
)
def test_a_wrong_file_is_refused_by_file_key_and_value(text: str, named: list[str]) -> None:
    with pytest.raises(SpaceError) as caught:
        parse_space(text, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize("text", ["[layers", "bits = ", "[layers]\nbits = [4]\nbits = [8]", "\x00", "a = 2000-13-01"])
def test_what_is_no_toml_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(SpaceError, match=r"my\.toml is not TOML: .*line 1|line \d|end of document"):
        parse_space(text, "my.toml")


# --- choices ------------------------------------------------------------------------------------------------


def test_only_open_choices_become_parameters() -> None:
    assert space().policy_parameters == ()
    assert space().recovery_parameters == ()
    built = space("[layers]\nbits = [8, 4]\n[recovery]\nlr = [0.01, 0.1]\n")
    assert built.policy_parameters == tuple(
        Ordered(f"bits/{name}", (4, 8)) for name in ("stem.conv", "body.conv", "head")
    )
    optimizer = Categorical("recovery/optimizer", ("sgd", "muon"))  # whose best rates differ
    assert built.recovery_parameters == (Real("recovery/lr", 0.01, 0.1, log=True), optimizer)
    built = space("[recovery]\nlr = [0.01, 0.1]\noptimizer = ['sgd']\n")
    assert built.recovery_parameters == (Real("recovery/lr", 0.01, 0.1, log=True),)


def test_frozen_groups_get_no_choice() -> None:
    built = space("[channels]\nkeep = [0.5, 1.0]\n")
    assert set(built.keep) == {"stem.conv", "body.conv"}


def test_a_criterion_matters_only_where_channels_may_go() -> None:
    text = '[channels]\ncriterion = ["l1", "l2"]\n'
    assert space(text).policy_parameters == ()
    assert [p.name for p in space(text + "keep = [0.5, 1.0]\n").policy_parameters][-1] == "criterion"


def test_ordered_choices_are_sorted_from_the_smallest_file_up_without_repeats() -> None:
    built = space(
        "[layers]\nbits = [8, 2, 8, 4]\nsparsity = [0.0, 0.5, 0.9, 0.5]\n[channels]\nkeep = [1.0, 0.5, 0.5]\n"
    )
    assert built.bits["head"] == (2, 4, 8)
    assert built.sparsity["head"] == (0.9, 0.5, 0.0)
    assert built.keep["body.conv"] == (0.5, 1.0)


def test_absent_parameters_take_the_densest_choice() -> None:
    built = space("[layers]\nbits = [8, 2]\nsparsity = [0.0, 0.5]\n[channels]\nkeep = [1.0, 0.5]\n")
    assert built.decode({}) == built.uniform()
    assert built.decode({"bits/head": 0}).layers["head"] == LayerChoice(2, 0.0)


@pytest.mark.parametrize(
    ("step", "counts"),
    [(1, [4, 9, 16]), (2, [4, 10, 16]), (4, [4, 8, 16]), (8, [8, 16]), (16, [16]), (64, [16])],
)
def test_widths_are_rounded_to_multiples(step: int, counts: list[int]) -> None:
    built = space(f"[channels]\nkeep = [0.2501, 0.58, 1.0]\nmultiple_of = {step}\n")
    assert [round(ratio * 16) for ratio in built.keep["stem.conv"]] == counts


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(2, 300))
def test_the_graph_keeps_as_many_channels_as_the_space_meant(step: int, ratios: list[float], channels: int) -> None:
    group = Group("g", channels, (Member("g.weight", 0, each(channels)), Member("h.weight", 1, each(channels))))
    tensors = {"g.weight": ((channels, 3, 1), "float32"), "h.weight": ((2, channels, 1), "float32")}
    layers = Layer("g", "conv1d", (channels, 3, 1)), Layer("h", "conv1d", (2, channels, 1))
    graph = Graph(layers, (group,), tensors, 1)
    built = space(f"[channels]\nkeep = {ratios}\nmultiple_of = {step}\n", graph)
    for ratio in built.keep["g"]:
        (kept,) = graph.kept(Policy(keep={"g": ratio})).values()
        assert kept == channels or kept % step == 0
        assert 1 <= kept <= channels


def removable_graph(names: tuple[str, ...]) -> Graph:
    """The fake network with groups that can go."""
    graph = space("").graph
    return replace(graph, groups=tuple(replace(g, removable=g.name in names) for g in graph.groups))


def test_a_ratio_of_zero_is_for_groups_that_can_go() -> None:
    text = "[channels]\nkeep = [0.0, 0.5, 1.0]\nmultiple_of = 8\n"
    graph = removable_graph(("body.conv",))
    built = space(text, graph)
    assert (built.keep["stem.conv"][0], built.keep["body.conv"][0]) == (0.5, 0.0)
    assert built.keep["body.conv"][1:] == space("[channels]\nkeep = [0.5, 1.0]\nmultiple_of = 8\n").keep["body.conv"]
    for policy in (built.smallest(), built.uniform(keep=0.0)):
        graph.check(policy)
        assert policy.keep["body.conv"] == 0.0 < policy.keep["stem.conv"]
        assert built.decode(built.encode(policy)).keep == policy.keep
    assert set(space("[channels]\nkeep = [0.0]\n", graph).keep.items()) == {
        ("stem.conv", (1.0,)),
        ("body.conv", (0.0,)),
    }


def test_a_removed_layer_has_no_bytes_whatever_its_bits() -> None:
    layer = space("").graph.layers[1]
    assert {section_bytes(layer, (0, 8, 3, 3), LayerChoice(bits)) for bits in BITS} == {0}
    assert {section_bytes(layer, (8, 0, 3, 3), LayerChoice(bits, 0.5)) for bits in BITS} == {0}


# --- overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("maker", "reader"), [("linear", "linear"), ("embedding", "linear"), ("conv2d", "linear")])
def test_only_widths_that_a_convolution_makes_or_reads_are_rounded(maker: str, reader: str) -> None:
    """A runtime's blocks of channels exist in convolutions; a linear layer takes any width."""
    made = (20, 3, 3, 3) if maker == "conv2d" else (7, 20) if maker == "embedding" else (20, 5)
    group = Group("g", 20, (Member("g.weight", int(maker == "embedding"), each(20)), Member("h.weight", 1, each(20))))
    tensors = {"g.weight": (made, "float32"), "h.weight": ((2, 20), "float32")}
    graph = Graph((Layer("g", maker, made), Layer("h", reader, (2, 20))), (group,), tensors, 1)
    built = space("[channels]\nkeep = [0.35, 1.0]\nmultiple_of = 16\n", graph)
    assert built.keep["g"] == ((16 if maker == "conv2d" else 7) / 20, 1.0)


def test_overrides_apply_by_glob_and_the_last_one_wins() -> None:
    built = space(
        "[layers]\nbits = [4]\n"
        '[[override]]\nmatch = "*.conv"\nbits = [2, 3]\nkeep = [0.5]\n'
        '[[override]]\nmatch = "stem*"\nbits = [8]\nsparsity = [0.3]\n'
    )
    assert built.bits == {"stem.conv": (8,), "body.conv": (2, 3), "head": (4,)}
    assert built.sparsity == {"stem.conv": (0.3,), "body.conv": (0.0,), "head": (0.0,)}
    assert built.keep == {"stem.conv": (0.5,), "body.conv": (0.5,)}


def test_an_override_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SpaceError) as caught:
        space('[[override]]\nmatch = "tail.*"\nbits = [8]\n')
    assert "override match = 'tail.*' matches no layer and no channel group" in str(caught.value)
    assert "stem.conv, body.conv, head" in str(caught.value)


def test_globs_are_case_sensitive() -> None:
    with pytest.raises(SpaceError, match="matches no layer"):
        space('[[override]]\nmatch = "HEAD"\nbits = [8]\n')


# --- points and policies --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6), st.sampled_from([0, 1, 5]))
def test_encoding_and_decoding_are_inverse(name: str, seed: int, epochs: int) -> None:
    built = Space(load_space(name), GRAPH)
    policy = random_policy(built, seed, epochs)
    assert policy.recovery.epochs == epochs
    assert built.decode(built.encode(policy), epochs) == policy
    GRAPH.check(policy)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6))
def test_recovery_parameters_matter_only_with_epochs(name: str, seed: int) -> None:
    built = Space(load_space(name), GRAPH)
    recovery = random_policy(built, seed).recovery
    assert replace_bn(recovery) == Recovery()


def test_every_field_of_recovery_can_be_searched_and_comes_back() -> None:
    built = space(
        "[recovery]\nlr = [0.01, 0.1]\ndecay = ['cosine', 'one-cycle']\ndecay_rate = [0.01, 0.5]\nwarmup = [0.0, 0.3]\n"
        "adjust_factor = [0.5, 1.0]\nadjust_patience = [0, 1]\nadjust_cooldown = [0, 2]\ndistill_weight = [0.0, 1.0]\n"
        "temperature = [1.0, 8.0]\nhint_weight = [0.0, 1.0]\ngradient = ['none', 'clip']\n"
        "scales = ['fixed', 'learned']\nema = [0.0, 0.9, 0.99]\noptimizer = ['sgd', 'adam']\n"
        "views = [1, 2, 4]\n",
        views=True,
    )
    searched = {p.name.removeprefix("recovery/") for p in built.recovery_parameters}
    assert searched == set(Recovery.__dataclass_fields__) - {"epochs", "reestimate_bn", "fold_bn"}
    point = {"recovery/warmup": 0.25, "recovery/scales": "learned", "recovery/ema": 0.99, "recovery/adjust_cooldown": 1}
    point |= {"recovery/optimizer": "adam", "recovery/views": 1}
    found = built.decode(point, epochs=2)
    r = found.recovery
    assert r.views == 2
    assert (r.warmup, r.scales, r.ema, r.adjust_cooldown) == (0.25, "learned", 0.99, 2)
    assert r.optimizer == "adam"
    assert built.decode(built.encode(found), epochs=2) == found


def test_the_optimizer_goes_by_the_network_unless_the_space_says() -> None:
    """SGD's rates tear transformers apart, whose norms are layer norms; what has none, or batch norms, bears them."""
    text, plain = "[recovery]\nlr = [0.01, 0.1]\n", {n: t for n, t in GRAPH.tensors.items() if ".norm." not in n}
    unnormed = replace(GRAPH, tensors=plain)
    normed = replace(GRAPH, tensors={**plain, "norm.weight": ((16,), "float32"), "norm.bias": ((16,), "float32")})
    assert space(text).decode({}, epochs=1).recovery.optimizer == "sgd"
    assert space(text, unnormed).decode({}, epochs=1).recovery.optimizer == "sgd"
    assert space(text, normed).decode({}, epochs=1).recovery.optimizer == "adam"
    assert space(text, normed).decode({}).recovery.optimizer == "sgd"
    assert space(f"{text}optimizer = ['sgd']\n", normed).decode({}, epochs=1).recovery.optimizer == "sgd"


def test_what_a_space_does_not_name_is_off() -> None:
    r = space("[recovery]\nlr = [0.01, 0.1]\n").decode({}, epochs=1).recovery
    assert (r.warmup, r.scales, r.ema, r.adjust_cooldown) == (0.0, "fixed", 0.0, 0)


@pytest.mark.parametrize("name", ["default", "distill"])
def test_a_space_that_searches_recovery_searches_all_of_it(name: str) -> None:
    built = Space(load_space(name), GRAPH, views=True)
    searched = {p.name.removeprefix("recovery/") for p in built.recovery_parameters}
    assert searched == set(Recovery.__dataclass_fields__) - {"epochs", "reestimate_bn", "fold_bn"}


def test_views_are_chosen_only_where_the_task_has_some() -> None:
    text = "[recovery]\nviews = [2, 1]\n"
    with_views, without = space(text, views=True), space(text)
    assert with_views.decode({}, epochs=1).recovery.views == 2
    assert with_views.decode({"recovery/views": 0}, epochs=1).recovery.views == 1
    assert without.decode({}, epochs=1).recovery.views == 1
    assert "recovery/views" not in {p.name for p in without.recovery_parameters}
    assert with_views.decode({}).recovery.views == 1


def replace_bn(recovery: Recovery) -> Recovery:
    values = {name: getattr(recovery, name) for name in Recovery.__dataclass_fields__}
    return Recovery(**(values | {"reestimate_bn": True, "fold_bn": True}))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6))
def test_recovery_is_added_to_a_policy_that_stays(name: str, seed: int) -> None:
    built = Space(load_space(name), GRAPH)
    parent, donor = random_policy(built, seed), random_policy(built, seed + 1, epochs=4)
    point = {p.name: built.encode(donor)[p.name] for p in built.recovery_parameters}
    child = built.with_recovery(parent, point, epochs=4)
    assert (child.layers, child.keep, child.criterion) == (parent.layers, parent.keep, parent.criterion)
    assert child.recovery.fold_bn == parent.recovery.fold_bn
    assert child.recovery.reestimate_bn == parent.recovery.reestimate_bn
    assert child.recovery.lr == donor.recovery.lr
    assert child.recovery.epochs == 4


def test_a_policy_outside_the_space_has_no_point() -> None:
    built = space("[layers]\nbits = [4, 8]\n")
    with pytest.raises(SpaceError, match=r"bits/stem\.conv = 2 is not in the search space: \[4, 8\]"):
        built.encode(built.uniform().__class__({name: LayerChoice(2) for name in built.bits}))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_uniform_policy_is_the_nearest_allowed(name: str) -> None:
    built = Space(load_space(name), GRAPH)
    policy = built.uniform(bits=4, sparsity=0.5, keep=0.75)
    for layer, choice in policy.layers.items():
        assert abs(choice.bits - 4) == min(abs(bits - 4) for bits in built.bits[layer])
        assert abs(choice.sparsity - 0.5) == min(abs(zeros - 0.5) for zeros in built.sparsity[layer])
    for group, ratio in policy.keep.items():
        assert abs(ratio - 0.75) == min(abs(ratio - 0.75) for ratio in built.keep[group])


@pytest.mark.parametrize("name", SHIPPED)
def test_baselines_have_no_repeats_and_end_with_the_smallest(name: str) -> None:
    built = Space(load_space(name), GRAPH)
    found = list(built.baselines())
    assert len(set(found)) == len({p.key() for p in found}) == len(found)
    assert built.smallest() in found
    assert len(found) > 1


# --- sizes --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6))
def test_nothing_is_smaller_than_the_smallest(name: str, seed: int) -> None:
    built = Space(load_space(name), GRAPH)
    smallest, other = built.smallest(), random_policy(built, seed)
    assert SIZE(smallest) <= SIZE(other)
    assert GRAPH.macs(smallest) <= GRAPH.macs(other)


def thin_graph() -> Graph:
    """A layer whose rows hold a single weight: a scale per row costs more than the bits save."""
    layers = (Layer("stem", "linear", (64, 1)), Layer("head", "linear", (2, 64)))
    tensors = {"stem.weight": ((64, 1), "float32"), "head.weight": ((2, 64), "float32")}
    return Graph(layers, (), tensors, dense_bytes=4 * 192)


@pytest.mark.parametrize("name", ["mixed-precision", "default"])
def test_nothing_is_smaller_than_the_smallest_for_thin_layers(name: str) -> None:
    graph = thin_graph()
    built, size = Space(load_space(name), graph), Size(graph, "task", "r2")
    assert min(size(random_policy(built, seed)) for seed in range(60)) >= size(built.smallest())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_step_down_never_adds_payload(name: str, seed: int, pick: int) -> None:
    built = Space(load_space(name), GRAPH)
    policy, lower = step_down(built, seed, pick)
    assert SIZE.header(lower).payload_bytes <= SIZE.header(policy).payload_bytes
    assert GRAPH.macs(lower) <= GRAPH.macs(policy)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_step_down_adds_at_most_a_few_bytes_of_description(name: str, seed: int, pick: int) -> None:
    """The file's header describes the policy and is deflated, so its length wanders a little."""
    policy, lower = step_down(Space(load_space(name), GRAPH), seed, pick)
    assert SIZE(lower) <= SIZE(policy) + 24


def step_down(built: Space, seed: int, pick: int) -> tuple[Policy, Policy]:
    policy = random_policy(built, seed)
    point = built.encode(policy)
    movable = [p.name for p in built.policy_parameters if isinstance(p, Ordered) and int(point[p.name]) > 0]
    if not movable:
        return policy, policy
    name = movable[pick % len(movable)]
    return policy, built.decode(point | {name: int(point[name]) - 1})


def test_a_step_down_never_adds_payload_to_thin_layers() -> None:
    graph = thin_graph()
    built, size = Space(load_space("mixed-precision"), graph), Size(graph, "task", "r2")
    steps = [built.decode({"bits/stem": i, "scheme": "symmetric"}) for i in range(len(built.bits["stem"]))]
    payloads = [size.header(policy).payload_bytes for policy in steps]
    assert payloads == sorted(payloads)


# --- shrinking ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 10**6), st.floats(0, 1))
def test_shrinking_reaches_every_reachable_budget(name: str, seed: int, share: float) -> None:
    built = Space(load_space(name), GRAPH)
    start = random_policy(built, seed)
    # the scheme and folding are not stepped, so the floor is the smallest file with the start's
    floor = built.decode(built.encode(start) | {p.name: 0 for p in built.policy_parameters if isinstance(p, Ordered)})
    limit = SIZE(floor) + share * max(0, SIZE(start) - SIZE(floor))
    shrunk = built.shrink(start, lambda p: SIZE(p) / limit - 1, seed)
    assert SIZE(shrunk) <= limit
    assert shrunk.criterion == start.criterion


def test_shrinking_what_fits_changes_nothing() -> None:
    built = Space(load_space("default"), GRAPH)
    for seed in range(5):
        policy = random_policy(built, seed, epochs=2)
        assert built.shrink(policy, lambda _: 0.0, seed) == policy


@pytest.mark.parametrize("excess", [1.0, math.inf])
def test_shrinking_to_the_impossible_ends_at_the_bottom(excess: float) -> None:
    built, calls = Space(load_space("default"), GRAPH), 0

    def never(_: Policy) -> float:
        nonlocal calls
        calls += 1
        return excess

    shrunk = built.shrink(built.uniform(), never, seed=0)
    steps = sum(len(p.values) - 1 for p in built.policy_parameters if isinstance(p, Ordered))
    assert calls == steps + 1
    assert shrunk.layers == built.smallest().layers
    assert shrunk.keep == built.smallest().keep


def test_shrinking_is_decided_by_the_seed() -> None:
    built = Space(load_space("default"), GRAPH)

    def shrunk(seed: int) -> Policy:
        return built.shrink(built.uniform(bits=8), lambda p: SIZE(p) / 3000 - 1, seed)

    assert shrunk(1) == shrunk(1)
    assert len({shrunk(seed) for seed in range(6)}) > 1


def test_shrinking_keeps_the_recovery_of_a_trained_policy() -> None:
    built = Space(load_space("default"), GRAPH)
    policy = random_policy(built, 3, epochs=2)
    shrunk = built.shrink(policy, lambda p: SIZE(p) / 2000 - 1, seed=0)
    assert shrunk.recovery == policy.recovery


def test_a_file_can_be_built_without_toml() -> None:
    built: Any = Space(SpaceFile(), GRAPH)
    assert built.smallest() == built.uniform()


# --- what profiles and the smallest policies need ---------------------------------------------------------


def test_preferred_choices_are_taken_where_allowed_and_else_the_first() -> None:
    open_ = space(
        '[layers]\nscheme = ["asymmetric", "symmetric"]\nsolver = ["nearest", "database"]\n'
        '[channels]\ncriterion = ["l1", "l2"]\n[batch_norm]\nreestimate = [false, true]\nfold = [false, true]\n'
    )
    names = ("scheme", "solver", "criterion", "batch_norm/reestimate", "batch_norm/fold")
    assert [open_.preferred(name) for name in names] == ["symmetric", "database", "l1", True, True]
    fixed = space('[layers]\nscheme = ["asymmetric"]\n[batch_norm]\nreestimate = [false]\nfold = [false]\n')
    assert [fixed.preferred(name) for name in names] == ["asymmetric", "nearest", "l2", False, False]


def test_only_leaves_everything_else_dense_and_is_built_as_preferred() -> None:
    choices = space('[layers]\nsolver = ["database"]\n[batch_norm]\nreestimate = [false]\n')
    found = choices.only({"head": LayerChoice(3, 0.5)}, {"stem.conv": 0.5})
    assert {layer.name: choice for layer, choice in GRAPH.choices(found)} == {
        "stem.conv": LayerChoice(),
        "body.conv": LayerChoice(),
        "head": LayerChoice(3, 0.5),
    }
    assert (dict(found.keep), found.solver) == ({"stem.conv": 0.5}, "database")
    assert found.recovery == Recovery(reestimate_bn=False, fold_bn=True)
    assert choices.only({}) == choices.only({}, {})


def test_sparsest_has_most_zeros_and_fewest_bits_everywhere_and_is_in_the_space() -> None:
    choices = space(
        '[layers]\nbits = [1, 4, 8]\nsparsity = [0.0, 0.5, 0.9]\nscheme = ["asymmetric", "symmetric"]\n'
        '[channels]\nkeep = [0.5, 1.0]\n[[override]]\nmatch = "head"\nbits = [8]\nsparsity = [0.0]\n'
    )
    found = choices.sparsest()
    assert found.layers["stem.conv"] == LayerChoice(1, 0.9)
    assert found.layers["head"] == LayerChoice(8, 0.0)
    assert set(found.keep.values()) == {0.5}
    assert choices.decode(choices.encode(found)) == found


@pytest.mark.parametrize(
    "choice", [LayerChoice(), LayerChoice(4), LayerChoice(2, 0.9), LayerChoice(8, 0.5, "asymmetric")]
)
def test_section_bytes_add_up_to_what_the_file_takes(choice: LayerChoice) -> None:
    policy = Policy({layer.name: choice for layer in GRAPH.layers}, {"stem.conv": 0.5, "body.conv": 0.25})
    shapes = GRAPH.shapes(policy)
    entries = {entry.name: entry.nbytes for entry in SIZE.header(policy).entries}
    for layer in GRAPH.layers:
        assert section_bytes(layer, shapes[layer.weight], choice) == entries[layer.weight]


def test_a_branch_stays_where_only_bytes_count() -> None:
    graph = replace(GRAPH, groups=tuple(replace(g, removable=g.name == "stem.conv") for g in GRAPH.groups))
    file = parse_space("[channels]\nkeep = [0.0, 0.5, 1.0]\n", "branches.toml")
    assert Space(file, graph).keep == {"stem.conv": (0.0, 0.5, 1.0), "body.conv": (0.5, 1.0)}
    assert Space(file, graph, branches=False).keep == {"stem.conv": (0.5, 1.0), "body.conv": (0.5, 1.0)}


@pytest.mark.parametrize(("wanted", "found"), [(0.0, 0.0), (0.1, 0.5), (0.25, 0.5), (0.5, 0.5), (0.9, 1.0)])
def test_a_uniform_width_removes_a_branch_only_where_it_is_asked_to(wanted: float, found: float) -> None:
    graph = replace(GRAPH, groups=tuple(replace(g, removable=g.name == "stem.conv") for g in GRAPH.groups))
    space = Space(parse_space("[channels]\nkeep = [0.0, 0.5, 1.0]\n", "branches.toml"), graph)
    assert space.uniform(keep=wanted).keep["stem.conv"] == found
