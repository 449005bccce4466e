import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import PolicyError
from autocompress.policy import BITS, LayerChoice, Policy, Recovery

NAMES = st.text(max_size=8)
CHOICES = st.builds(
    LayerChoice,
    bits=st.sampled_from(BITS),
    sparsity=st.floats(0, 1, exclude_max=True),
    scheme=st.sampled_from(["symmetric", "asymmetric", "entropy"]),
)
RECOVERIES = st.builds(
    Recovery,
    epochs=st.integers(0, 100),
    lr=st.floats(1e-9, 10),
    decay=st.sampled_from(["constant", "step", "exponential", "cosine", "polynomial", "one-cycle"]),
    decay_rate=st.floats(1e-9, 1),
    adjust_factor=st.floats(1e-9, 1),
    adjust_patience=st.integers(0, 100),
    distill_weight=st.floats(0, 1),
    temperature=st.floats(1e-9, 1e9),
    hint_weight=st.floats(0, 1e9),
    gradient=st.sampled_from(["none", "centralise", "standardise", "clip"]),
    reestimate_bn=st.booleans(),
    fold_bn=st.booleans(),
    warmup=st.floats(0, 0.5),
    adjust_cooldown=st.integers(0, 100),
    scales=st.sampled_from(["fixed", "learned"]),
    ema=st.floats(0, 1, exclude_max=True),
    optimizer=st.sampled_from(["sgd", "adam", "muon"]),
    views=st.integers(1, 100),
)
POLICIES = st.builds(
    Policy,
    layers=st.dictionaries(NAMES, CHOICES, max_size=4),
    keep=st.dictionaries(NAMES, st.floats(0, 1), max_size=4),
    criterion=st.sampled_from(["l1", "l2", "taylor", "entropy", "gini"]),
    solver=st.sampled_from(["nearest", "database"]),
    recovery=RECOVERIES,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

PLAIN = Policy(
    {"stem": LayerChoice(4, 0.5, "asymmetric"), "head": LayerChoice(8)},
    {"stem": 0.75},
    "taylor",
    recovery=Recovery(epochs=3, lr=0.01, hint_weight=0.25),
)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 0),
        ("bits", 9),
        ("bits", -8),
        ("bits", 64),
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", math.nan),
        ("sparsity", math.inf),
        ("scheme", "linear"),
        ("scheme", ""),
    ],
)
def test_a_layer_choice_names_its_wrong_field(field: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=rf"^{field} is .*; it must be "):
        LayerChoice(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1),
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", 10.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("decay", "linear"),
        ("decay_rate", 0.0),
        ("decay_rate", 1.1),
        ("decay_rate", math.nan),
        ("adjust_factor", 0.0),
        ("adjust_factor", 1.1),
        ("adjust_patience", -1),
        ("distill_weight", -0.1),
        ("distill_weight", 1.1),
        ("distill_weight", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("views", 0),
        ("hint_weight", -0.1),
        ("hint_weight", math.nan),
        ("hint_weight", math.inf),
        ("gradient", "clamp"),
        ("decay", "one_cycle"),
        ("warmup", -0.1),
        ("warmup", 0.51),
        ("warmup", math.nan),
        ("adjust_cooldown", -1),
        ("scales", "trained"),
        ("optimizer", "lion"),
        ("ema", -0.1),
        ("ema", 1.0),
        ("ema", math.nan),
    ],
)
def test_a_recovery_names_its_wrong_field(field: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=rf"^{field} is .*; it must be "):
        Recovery(**{field: value})


OLD = {
    "layers": {"stem": {"bits": 4, "sparsity": 0.5, "scheme": "asymmetric"}},
    "keep": {"stem": 0.75},
    "criterion": "taylor",
    "solver": "database",
    "recovery": {
        "epochs": 3,
        "lr": 0.01,
        "decay": "step",
        "decay_rate": 0.1,
        "adjust_factor": 0.5,
        "adjust_patience": 1,
        "distill_weight": 0.8,
        "temperature": 3.0,
        "hint_weight": 0.25,
        "gradient": "centralise",
        "reestimate_bn": True,
        "fold_bn": False,
    },
}
"""What was written before warm-up, cooldown, learned scales and averages were known."""


def test_an_old_policy_is_read_and_keeps_its_json_and_key() -> None:
    found = Policy.from_json(OLD)
    r = found.recovery
    assert (r.warmup, r.adjust_cooldown, r.scales, r.ema, r.views) == (0.0, 0, "fixed", 0.0, 1)
    assert found.to_json() == OLD
    assert found.key() == "23040ed60b8a2ab3"


@pytest.mark.parametrize(
    "later",
    [
        {"warmup": 0.1},
        {"adjust_cooldown": 1},
        {"scales": "learned"},
        {"ema": 0.99},
        {"views": 2},
        {"decay": "one-cycle"},
    ],
)
def test_what_came_later_counts_where_it_is_used(later: dict[str, Any]) -> None:
    found = Policy.from_json(OLD | {"recovery": OLD["recovery"] | later})
    assert found.key() != Policy.from_json(OLD).key()
    assert Policy.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("ratio", [-0.5, 1.01, math.nan, math.inf])
def test_a_policy_names_the_group_of_a_wrong_ratio(ratio: float) -> None:
    with pytest.raises(PolicyError, match=r"^keep ratio of layer1\.0 is .*; it must be in \[0, 1\]"):
        Policy(keep={"layer1.0": ratio})


def test_a_policy_names_the_allowed_criteria() -> None:
    with pytest.raises(
        PolicyError, match=r"^criterion is 'random'; it must be one of l1, l2, taylor, entropy, gini, reconstruction$"
    ):
        Policy(criterion="random")  # type: ignore[arg-type]


def test_the_default_changes_nothing() -> None:
    assert LayerChoice() == LayerChoice(32, 0.0, "symmetric")
    assert Recovery().epochs == 0
    assert not Policy().layers
    assert not Policy().keep


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]))
def test_the_number_of_zeros_is_the_share_rounded_down(count: int, sparsity: float) -> None:
    zeros = LayerChoice(sparsity=sparsity).zeros(count)
    assert zeros == count * round(sparsity * 100) // 100
    assert zeros < max(1, count)


@pytest.mark.parametrize(
    ("bits", "scheme", "width"),
    [
        (0.5, "entropy", 8),
        (1, "entropy", 8),
        (2.5, "entropy", 8),
        (6, "entropy", 8),
        (7, "entropy", 7),
        (8, "entropy", 8),
        (16, "entropy", 16),
        (4, "symmetric", 4),
        (4, "asymmetric", 4),
        (32, "symmetric", 32),
    ],
)
def test_entropy_coded_codes_are_wider_than_what_they_take(bits: float, scheme: Any, width: int) -> None:
    choice = LayerChoice(bits, scheme=scheme)
    assert choice.width == width
    assert choice.symmetric == (scheme != "asymmetric")
    assert LayerChoice(**choice.to_json()) == choice


# --- identity ---------------------------------------------------------------------------------------------


def test_a_key_is_the_same_for_ever() -> None:
    """Journals and artifacts of earlier versions are found by it."""
    assert PLAIN.key() == "3dce0c4b50e35ac5"
    assert Policy().key() == "36c556616a82ca5f"


def test_the_order_of_layers_and_groups_does_not_matter() -> None:
    layers, keep = {"a": LayerChoice(4), "b": LayerChoice(8), "c": LayerChoice(2)}, {"x": 0.5, "y": 0.25}
    one, two = Policy(layers, keep), Policy(dict(reversed(layers.items())), dict(reversed(keep.items())))
    assert one == two
    assert one.key() == two.key()
    assert hash(one) == hash(two)
    assert list(one.layers) == list(two.layers) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAIN, criterion="l1"),
        replace(PLAIN, solver="database"),
        replace(PLAIN, keep={}),
        replace(PLAIN, layers={}),
        replace(PLAIN, keep={"stem": 0.7500000000000001}),
        replace(PLAIN, recovery=replace(PLAIN.recovery, fold_bn=False)),
        replace(PLAIN, layers=dict(PLAIN.layers) | {"head": LayerChoice(8, scheme="asymmetric")}),
        replace(PLAIN, layers=dict(PLAIN.layers) | {"tail": LayerChoice()}),
    ],
)
def test_different_policies_have_different_keys(other: Policy) -> None:
    assert other != PLAIN
    assert other.key() != PLAIN.key()


@settings(max_examples=60, deadline=None)
@given(POLICIES, POLICIES)
def test_keys_are_equal_exactly_when_policies_are(one: Policy, two: Policy) -> None:
    assert (one == two) == (one.key() == two.key()) == (len({one, two}) == 1)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Policy(keep={"a": 1}), Policy(keep={"a": 1.0})),
        (Policy({"a": LayerChoice(4)}), Policy({"a": LayerChoice(4.0)})),
        (Policy({"a": LayerChoice(sparsity=0)}), Policy({"a": LayerChoice(sparsity=0.0)})),
        (Policy({"a": LayerChoice(sparsity=-0.0)}), Policy({"a": LayerChoice(sparsity=0.0)})),
        (Policy(recovery=Recovery(lr=1, temperature=2)), Policy(recovery=Recovery(lr=1.0, temperature=2.0))),
    ],
)
def test_equal_policies_have_equal_keys_whatever_the_type_of_their_numbers(one: Policy, two: Policy) -> None:
    assert one == two
    assert one.key() == two.key()


def test_a_policy_is_no_other_thing() -> None:
    assert Policy() != {}
    assert Policy() != None  # noqa: E711
    assert len({Policy(), Policy(), PLAIN}) == 2


# --- copies -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(POLICIES)
def test_json_gives_an_equal_policy_back(policy: Policy) -> None:
    again = Policy.from_json(json.loads(json.dumps(policy.to_json(), allow_nan=False)))
    assert again == policy
    assert again.key() == policy.key()


@settings(max_examples=60, deadline=None)
@given(POLICIES)
def test_copies_and_pickles_are_equal(policy: Policy) -> None:
    for again in (copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert again == policy
        assert hash(again) == hash(policy)


@pytest.mark.parametrize(
    "fields",
    [{"epochs": 2.5}, {"epochs": 2.0}, {"epochs": True}, {"fold_bn": 1}, {"adjust_patience": 1.0}, {"bits": 8.0}],
)
def test_what_a_policy_accepts_it_reads_back(fields: dict[str, Any]) -> None:
    try:
        policy = Policy({"a": LayerChoice(**fields)}) if "bits" in fields else Policy(recovery=Recovery(**fields))
    except PolicyError:
        return
    assert Policy.from_json(policy.to_json()).key() == policy.key()


def test_missing_members_take_their_defaults() -> None:
    assert Policy.from_json({}) == Policy()
    assert Policy.from_json({"layers": {"a": {}}, "recovery": {"epochs": 2}}) == Policy(
        {"a": LayerChoice()}, recovery=Recovery(epochs=2)
    )


def test_whole_numbers_are_read_as_fractions() -> None:
    assert (
        Policy.from_json({"keep": {"a": 1}, "recovery": {"lr": 1}}).key()
        == Policy(keep={"a": 1.0}, recovery=Recovery(lr=1.0)).key()
    )


def test_nothing_in_a_policy_can_be_changed() -> None:
    layers = {"a": LayerChoice(4)}
    policy = Policy(layers, {"g": 0.5})
    layers["a"] = LayerChoice(8)
    layers["b"] = LayerChoice(8)
    assert dict(policy.layers) == {"a": LayerChoice(4)}
    with pytest.raises(TypeError):
        policy.layers["a"] = LayerChoice(8)  # type: ignore[index]
    with pytest.raises(TypeError):
        policy.keep["g"] = 1.0  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        policy.criterion = "l1"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        policy.layers["a"].bits = 8  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        policy.recovery.epochs = 1  # type: ignore[misc]


def test_plain_data_is_a_copy() -> None:
    policy = Policy({"a": LayerChoice(4)})
    policy.to_json()["layers"]["a"]["bits"] = 2
    assert policy.layers["a"].bits == 4


# --- hostile data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (None, "policy must be an object"),
        ([], "policy must be an object"),
        ("{}", "policy must be an object"),
        ({1: 2}, "policy must be an object with named members"),
        (
            {"layer": {}},
            "policy has unknown member 'layer'; allowed: activations, criterion, floats, keep, layers, recovery",
        ),
        ({"layers": []}, "policy.layers must be an object"),
        ({"layers": None}, "policy.layers must be an object"),
        ({"layers": {"a": 4}}, "policy.layers.a must be an object"),
        ({"layers": {"a": {"bit": 4}}}, "policy.layers.a has unknown member 'bit'"),
        ({"layers": {"a": {"bits": "4"}}}, "policy.layers.a.bits must be a number"),
        ({"layers": {"a": {"bits": True}}}, "policy.layers.a.bits must be a number"),
        ({"layers": {"a": {"bits": [4]}}}, "policy.layers.a.bits must be a number"),
        ({"layers": {"a": {"bits": math.nan}}}, "bits is nan"),
        ({"layers": {"a": {"bits": 2.5}}}, "bits is 2.5; it must be one of (1, 2,"),
        ({"layers": {"a": {"bits": 2.25, "scheme": "entropy"}}}, "bits is 2.25"),
        ({"layers": {"a": {"bits": 6.5, "scheme": "entropy"}}}, "bits is 6.5"),
        ({"layers": {"a": {"bits": 5000}}}, "bits is 5000"),
        ({"layers": {"a": {"sparsity": "0.5"}}}, "policy.layers.a.sparsity must be a number"),
        ({"layers": {"a": {"sparsity": None}}}, "policy.layers.a.sparsity must be a number"),
        ({"layers": {"a": {"sparsity": True}}}, "policy.layers.a.sparsity must be a number"),
        ({"layers": {"a": {"scheme": 1}}}, "policy.layers.a.scheme must be str"),
        ({"keep": {"g": "all"}}, "policy.keep.g must be a number"),
        ({"keep": {"g": 10**400}}, "policy.keep.g"),
        ({"keep": {"g": math.nan}}, "keep ratio of g"),
        ({"keep": [["g", 0.5]]}, "policy.keep must be an object"),
        ({"criterion": ["l2"]}, "criterion is"),
        ({"criterion": None}, "criterion is None"),
        ({"criterion": {}}, "criterion is"),
        ({"recovery": None}, "policy.recovery must be an object"),
        ({"recovery": {"epochs": 1.5}}, "policy.recovery.epochs must be int"),
        ({"recovery": {"epochs": "1"}}, "policy.recovery.epochs must be int"),
        ({"recovery": {"fold_bn": 1}}, "policy.recovery.fold_bn must be bool"),
        ({"recovery": {"lr": [0.1]}}, "policy.recovery.lr must be a number"),
        ({"recovery": {"temperature": -(10**400)}}, "policy.recovery.temperature"),
        ({"recovery": {"temperature": math.inf}}, "temperature is inf"),
        ({"recovery": {"momentum": 0.9}}, "policy.recovery has unknown member 'momentum'"),
    ],
)
def test_wrong_data_is_refused_by_name(data: Any, named: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_json(data)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        JSON,
        st.dictionaries(st.sampled_from(["layers", "keep", "criterion", "recovery"]), JSON, max_size=4),
        st.fixed_dictionaries({"layers": st.dictionaries(NAMES, st.dictionaries(st.just("bits"), JSON), max_size=2)}),
        st.fixed_dictionaries(
            {"recovery": st.dictionaries(st.sampled_from(list(Recovery.__dataclass_fields__)), JSON, max_size=3)}
        ),
    )
)
def test_any_data_is_a_policy_or_an_error_of_ours(data: Any) -> None:
    try:
        policy = Policy.from_json(data)
    except PolicyError:
        return
    assert Policy.from_json(json.loads(json.dumps(policy.to_json(), allow_nan=False))) == policy
