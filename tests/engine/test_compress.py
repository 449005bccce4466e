from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress import Batch, ClassificationTask, PolicyError, TaskError, Workbench, compress, engine
from autocompress.artifact.packed import pack, unpack
from autocompress.engine import Compressed
from autocompress.measure.size import Size
from autocompress.policy import BITS, Criterion, LayerChoice, Policy, Recovery
from autocompress.stored import Quantised
from autocompress.task import divergence


class Residual(nn.Module):
    """A strided residual network small enough to train in milliseconds."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8, momentum=momentum)
        self.inner = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(12, momentum=momentum)
        self.outer = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(8, momentum=momentum)
        self.last = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x))))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


LAYERS = ("stem", "inner", "outer", "last", "head")


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (64,), generator=draw)
    patterns = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(100))
    return patterns[targets] + torch.randn(64, 3, 6, 6, generator=draw), targets


def fitted(model: nn.Module) -> nn.Module:
    """`model` after a few epochs on the training data, so that its outputs mean something."""
    inputs, targets = data(0)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval()


def task_of(model: nn.Module) -> ClassificationTask:
    mirrored = [data(0), data(1), data(2)]
    return ClassificationTask(model, *mirrored, batch_size=16, views=lambda inputs: [inputs.flip(-1)])


def fresh_bench(momentum: float | None = 0.1, seed: int = 0) -> Workbench:
    torch.manual_seed(0)
    return Workbench(task_of(fitted(Residual(momentum))), seed=seed)


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return fresh_bench()


def tensors(compressed: Compressed) -> dict[str, Tensor]:
    return {name: stored.dense().clone() for name, stored in compressed.tensors.items()}


def outcome(bench: Workbench, policy: Policy) -> str:
    """A digest of all that is stored."""
    digest = hashlib.sha256()
    for name, value in tensors(compress(bench, policy)).items():
        digest.update(repr((name, value.shape, value.dtype)).encode() + value.numpy().tobytes())
    return digest.hexdigest()


def groups(bench: Workbench) -> list[str]:
    return [group.name for group in bench.graph.prunable]


def everywhere(choice: LayerChoice, bench: Workbench, keep: float = 1.0, **recovery: Any) -> Policy:
    return Policy(dict.fromkeys(LAYERS, choice), dict.fromkeys(groups(bench), keep), recovery=Recovery(**recovery))


def mixed(bench: Workbench, **recovery: Any) -> Policy:
    layers = {"stem": LayerChoice(4, 0.3), "inner": LayerChoice(3, 0.5, "asymmetric"), "head": LayerChoice(16)}
    return Policy(layers, {groups(bench)[0]: 0.5}, "taylor", recovery=Recovery(epochs=2, hint_weight=0.5, **recovery))


# --- what comes out -------------------------------------------------------------------------------------


def test_the_network_has_a_group_for_each_chain_of_channels(bench: Workbench) -> None:
    assert len(groups(bench)) == 3
    assert [layer.name for layer in bench.graph.layers] == list(LAYERS)


def test_channel_pruning_shrinks_every_layer(bench: Workbench) -> None:
    dense, small = (tensors(compress(bench, everywhere(LayerChoice(), bench, keep))) for keep in (1.0, 0.5))
    expected = {"stem": (4, 3), "inner": (6, 4), "outer": (4, 6), "last": (8, 4), "head": (4, 8)}
    assert {name: tuple(small[f"{name}.weight"].shape[:2]) for name in LAYERS} == expected
    assert sum(v.numel() for v in small.values()) < 0.4 * sum(v.numel() for v in dense.values())


def test_a_realised_model_holds_exactly_what_is_stored(bench: Workbench) -> None:
    for fold_bn in (True, False):
        compressed = compress(bench, mixed(bench, fold_bn=fold_bn))
        state = bench.realise(compressed).state_dict()
        assert set(compressed.tensors) == {name for name in state if not name.endswith("num_batches_tracked")}
        assert all(torch.equal(state[name], stored.dense()) for name, stored in compressed.tensors.items())


def test_the_empty_policy_keeps_the_models_answers(bench: Workbench) -> None:
    model = bench.realise(compress(bench, Policy(recovery=Recovery(reestimate_bn=False))))
    inputs = data(1)[0]
    torch.testing.assert_close(model(inputs), bench.teacher(inputs), rtol=0, atol=0.02)


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("bits", [1, 3, 16, 32])
def test_zeros_are_as_many_as_asked_for_after_training_and_folding(bench: Workbench, bits: int, epochs: int) -> None:
    choice = LayerChoice(bits, 0.5)
    found = compress(bench, everywhere(choice, bench, 0.5, epochs=epochs)).tensors
    for layer in LAYERS:
        stored = found[f"{layer}.weight"]
        assert int((~stored.mask).sum()) == choice.zeros(stored.dense().numel())
        assert (stored.dense()[~stored.mask] == 0).all()


def test_each_layer_is_stored_with_its_own_bits(bench: Workbench) -> None:
    widths = dict(zip(LAYERS, (2, 3, 5, 7, 8), strict=True))
    policy = Policy({name: LayerChoice(bits) for name, bits in widths.items()}, recovery=Recovery(epochs=1))
    found = compress(bench, policy).tensors
    for name, bits in widths.items():
        stored = found[f"{name}.weight"]
        assert isinstance(stored, Quantised)
        assert stored.bits == bits
        assert int(stored.codes.max()) < 2**bits


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("scales", ["fixed", "learned"])
@pytest.mark.parametrize("solver", ["nearest", "database"])
def test_the_file_holds_the_weights_of_the_last_forward_pass_bit_for_bit(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, solver: Any, scales: Any, ema: float
) -> None:
    """The validation after the last step is a forward pass of what training arrived at."""
    seen: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        model(data(1)[0])
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    monkeypatch.setattr(bench, "validate", validate)
    layers = {
        "stem": LayerChoice(4, 0.3),
        "inner": LayerChoice(3, 0.5, "asymmetric"),
        "outer": LayerChoice(1, 0.25),
        "last": LayerChoice(2),
        "head": LayerChoice(16),
    }
    recovery = Recovery(epochs=2, lr=0.1, scales=scales, ema=ema, adjust_factor=0.5, fold_bn=False, reestimate_bn=False)
    compressed = compress(bench, Policy(layers, {groups(bench)[0]: 0.5}, recovery=recovery, solver=solver))
    assert len(seen) == 8
    header = Size(bench.graph, "task", "accuracy").header(compressed.policy, compressed.codings())
    packed = unpack(pack(header, compressed.tensors, 0.5, compressed.policy.key())).tensors
    for name in LAYERS:
        stored = packed[f"{name}.weight"]
        if isinstance(stored, Quantised):
            rows = (-1, *[1] * (stored.codes.ndim - 1))
            values = stored.scale.reshape(rows) * (stored.codes.float() - stored.zero.float().reshape(rows))
            assert torch.equal(values, seen[-1][f"{name}.weight"])
        assert torch.equal(stored.dense(), seen[-1][f"{name}.weight"])
    for name in ("stem_norm.running_mean", "stem_norm.running_var"):  # at 16 bits
        torch.testing.assert_close(packed[name].dense(), seen[-1][name], rtol=1e-3, atol=1e-4)


def test_learnt_scales_move_and_keep_their_signs(bench: Workbench) -> None:
    before, after = (
        compress(bench, everywhere(LayerChoice(3), bench, epochs=epochs, fold_bn=False, lr=0.3, scales="learned"))
        for epochs in (0, 3)
    )
    for name in LAYERS:
        a, b = before.tensors[f"{name}.weight"], after.tensors[f"{name}.weight"]
        assert isinstance(a, Quantised)
        assert isinstance(b, Quantised)
        assert not torch.equal(a.scale, b.scale)
        assert torch.equal(a.scale.sign(), b.scale.sign())
        assert torch.equal(a.zero, b.zero)


def test_training_does_not_move_a_layers_grid(bench: Workbench) -> None:
    before, after = (
        compress(bench, everywhere(LayerChoice(4), bench, epochs=epochs, fold_bn=False, lr=0.1)) for epochs in (0, 2)
    )
    for name in LAYERS:
        a, b = before.tensors[f"{name}.weight"], after.tensors[f"{name}.weight"]
        assert isinstance(a, Quantised)
        assert isinstance(b, Quantised)
        assert torch.equal(a.scale, b.scale)
        assert not torch.equal(a.codes, b.codes)


def test_training_starts_from_the_weights_before_rounding(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Tensor] = {}

    def spy(student: nn.Module, teacher: Any, constraints: Any, course: Any) -> Any:  # noqa: ARG001
        started.update({name: value.clone() for name, value in student.state_dict().items()})
        return constraints

    monkeypatch.setattr(engine, "train", spy)
    compress(bench, everywhere(LayerChoice(3, 0.5), bench, epochs=1))
    assert all(torch.equal(started[f"{name}.weight"], bench.teacher.get_parameter(f"{name}.weight")) for name in LAYERS)


def test_training_brings_a_strongly_compressed_model_closer_to_its_teacher(bench: Workbench) -> None:
    inputs = data(1)[0]
    distance = {}
    for epochs in (0, 6):
        policy = everywhere(LayerChoice(3, 0.3), bench, 0.5, epochs=epochs, lr=0.05)
        outputs = bench.realise(compress(bench, policy))(inputs)
        distance[epochs] = float(divergence(bench.task, outputs, bench.teacher(inputs), 4.0))
    assert distance[6] < 0.7 * distance[0]


def test_progress_counts_the_steps_of_training(bench: Workbench) -> None:
    heard: list[tuple[int, int]] = []
    compress(bench, Policy(recovery=Recovery(epochs=2)), lambda step, total: heard.append((step, total)))
    assert heard == [(step, 8) for step in range(1, 9)]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy({"nowhere": LayerChoice(4)}), "layer 'nowhere'"),
        (Policy(keep={"nowhere": 0.5}), "group 'nowhere'"),
        (Policy(keep={"head": 0.5}), "cannot be pruned"),
    ],
)
def test_a_policy_of_another_model_is_refused(bench: Workbench, policy: Policy, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        compress(bench, policy)


# --- purity ---------------------------------------------------------------------------------------------


def test_the_same_policy_gives_the_same_bits_in_any_workbench(bench: Workbench) -> None:
    first = outcome(bench, mixed(bench))
    torch.manual_seed(99)
    assert outcome(bench, mixed(bench)) == first
    assert outcome(fresh_bench(), mixed(bench)) == first


def test_other_candidates_in_between_change_nothing() -> None:
    bench = fresh_bench()
    a, keep = mixed(bench), dict.fromkeys(groups(bench), 0.25)
    others = [
        Policy(a.layers, keep, "taylor", recovery=a.recovery),
        Policy({"stem": LayerChoice(4, 0.3)}, {}, "taylor", recovery=Recovery(fold_bn=False, reestimate_bn=False)),
    ]
    first = outcome(bench, a)
    for other in others:
        alone = outcome(fresh_bench(), other)
        assert outcome(bench, other) == alone
        assert outcome(bench, a) == first


def test_channels_kept_by_another_criterion_are_not_confused(bench: Workbench) -> None:
    policy = everywhere(LayerChoice(4), bench, 0.5)
    for criterion in ("entropy", "l1", "taylor"):
        outcome(bench, replace(policy, criterion=criterion))
    fresh = fresh_bench()
    assert outcome(bench, replace(policy, criterion="l1")) == outcome(fresh, replace(policy, criterion="l1"))
    assert outcome(bench, replace(policy, criterion="entropy")) != outcome(fresh, replace(policy, criterion="l1"))


def test_results_do_not_change_when_others_are_realised(bench: Workbench) -> None:
    first = compress(bench, mixed(bench))
    before = tensors(first)
    bench.realise(compress(bench, everywhere(LayerChoice(2), bench, 0.5, epochs=1)))
    assert all(torch.equal(before[name], stored.dense()) for name, stored in first.tensors.items())


def test_the_workbenchs_teacher_never_changes(bench: Workbench) -> None:
    before = {name: value.clone() for name, value in bench.teacher.state_dict().items()}
    for criterion in ("taylor", "entropy"):
        compress(bench, replace(mixed(bench), criterion=criterion))
    assert all(torch.equal(value, before[name]) for name, value in bench.teacher.state_dict().items())
    assert not any(p.requires_grad for p in bench.teacher.parameters())
    assert not any(module.training for module in bench.teacher.modules())


def test_what_a_policy_leaves_alone_lies_in_the_teachers_memory_until_it_changes(bench: Workbench) -> None:
    def addresses(model: nn.Module) -> dict[str, int]:
        return {name: p.data_ptr() for name, p in model.named_parameters()}

    unfolded = Recovery(fold_bn=False, reestimate_bn=False)
    untouched = replace(everywhere(LayerChoice(32), bench), recovery=unfolded)
    before = {name: value.clone() for name, value in bench.teacher.state_dict().items()}
    weights = {f"{name}.weight" for name in LAYERS}
    teacher = addresses(bench.teacher)
    dense = addresses(bench.realise(compress(bench, untouched)))
    assert all(dense[name] == teacher[name] for name in weights)
    rounded = addresses(bench.realise(compress(bench, replace(everywhere(LayerChoice(4), bench), recovery=unfolded))))
    assert not any(rounded[name] == teacher[name] for name in weights)
    assert all(torch.equal(value, before[name]) for name, value in bench.teacher.state_dict().items())


@pytest.mark.slow
def test_a_large_model_is_compressed_as_any_other(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(engine, "LARGE_BYTES", 0)
    monkeypatch.setattr(engine, "give_back", lambda: given_back.append(True))
    large = fresh_bench()
    assert given_back
    policies = [everywhere(LayerChoice(bits, 0.5), bench, keep) for bits in (3, 4) for keep in (1.0, 0.5)]
    for policy in [*(replace(p, solver="database") for p in policies), *policies]:
        assert outcome(large, policy) == outcome(bench, policy)
        large.realise(compress(large, policy))


@pytest.mark.slow
def test_of_a_large_model_that_was_spent_the_codings_are_left(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LARGE_BYTES", 0)
    large, policy = fresh_bench(), everywhere(LayerChoice(3, 0.5, "entropy"), bench)
    wanted = {name: value.clone() for name, value in bench.realise(compress(bench, policy)).state_dict().items()}
    made = compress(large, policy)
    codings = made.codings()
    left, model = large.spend(made)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert left.codings() == codings == compress(bench, policy).codings()
    assert codings
    assert not left.tensors
    assert not made.tensors  # nobody holds a code any more
    small, model = bench.spend(compress(bench, policy))
    assert set(small.tensors) == set(bench.graph.contents(policy))
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_candidate_that_diverged_leaves_no_trace(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = mixed(bench)
    first = outcome(bench, policy)
    with monkeypatch.context() as patch:
        patch.setattr(bench.task, "loss", lambda outputs, _: outputs.sum() * float("nan"))
        with pytest.raises(FloatingPointError):
            compress(bench, Policy(recovery=Recovery(epochs=1)))
    assert outcome(bench, policy) == first


def test_cumulative_norms_do_not_remember_earlier_candidates() -> None:
    bench = fresh_bench(momentum=None)
    policy = Policy(recovery=Recovery(epochs=1, reestimate_bn=False))
    first = outcome(bench, policy)
    compress(bench, Policy(recovery=Recovery(epochs=2)))
    assert outcome(bench, policy) == first


def test_a_depthwise_layer_pruned_to_one_channel_grows_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4))
    bench = Workbench(task_of(model.eval()))
    inputs = data(1)[0]
    (group,) = groups(bench)
    compress(bench, Policy(keep={group: 0.1}, recovery=Recovery(epochs=1)))
    torch.testing.assert_close(bench.realise(compress(bench, Policy()))(inputs), model(inputs), rtol=0, atol=5e-3)
    bench.realise(compress(bench, Policy(keep={group: 0.1})))
    torch.testing.assert_close(bench.realise(compress(bench, Policy()))(inputs), model(inputs), rtol=0, atol=5e-3)


def test_a_dying_channel_does_not_break_training() -> None:
    model = fitted(Residual())
    with torch.no_grad():
        model.stem.weight[0] *= 1e-20
    policy = Policy({"stem": LayerChoice(8, 0.1)}, recovery=Recovery(epochs=1))
    found = tensors(compress(Workbench(task_of(model)), policy))
    assert all(torch.isfinite(value).all() for value in found.values())


# --- hints on other shapes ------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 10), nn.Linear(10, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return self.head(torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x)))))).mean(1))


def test_hints_follow_the_kept_features_of_linear_layers_over_sequences() -> None:
    torch.manual_seed(0)
    bench = Workbench(task_of(Tokens().eval()))
    policy = Policy(keep=dict.fromkeys(groups(bench), 0.5), recovery=Recovery(epochs=1, hint_weight=1.0))
    assert tensors(compress(bench, policy))["second.weight"].shape == (6, 5)


# --- every option does something ------------------------------------------------------------------------

SOME = LayerChoice(4, 0.3)


def all_differ(bench: Workbench, policies: list[Policy]) -> bool:
    return len({outcome(bench, policy) for policy in policies}) == len(policies)


@pytest.mark.parametrize("epochs", [0, 1])
def test_every_width_changes_the_outcome(bench: Workbench, epochs: int) -> None:
    assert all_differ(bench, [everywhere(LayerChoice(bits), bench, epochs=epochs) for bits in BITS])


@pytest.mark.parametrize("epochs", [0, 1])
def test_sparsity_scheme_and_channels_change_the_outcome(bench: Workbench, epochs: int) -> None:
    choices = [LayerChoice(4), LayerChoice(4, 0.2), LayerChoice(4, 0.4), LayerChoice(4, 0.2, "asymmetric")]
    policies = [everywhere(choice, bench, keep, epochs=epochs) for choice in choices for keep in (1.0, 0.5)]
    assert all_differ(bench, policies)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layers_choice_changes_the_outcome(bench: Workbench, layer: str) -> None:
    assert all_differ(bench, [Policy(), Policy({layer: LayerChoice(4)}), Policy({layer: LayerChoice(32, 0.4)})])


def test_every_groups_share_changes_the_outcome(bench: Workbench) -> None:
    assert all_differ(bench, [Policy(), *(Policy(keep={group: 0.5}) for group in groups(bench))])


def test_every_criterion_changes_the_outcome(bench: Workbench) -> None:
    criteria: tuple[Criterion, ...] = ("l1", "l2", "taylor", "entropy", "gini")
    pruned = [everywhere(LayerChoice(), bench, keep) for keep in (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)]
    found = {
        criterion: tuple(outcome(bench, replace(p, criterion=criterion)) for p in pruned) for criterion in criteria
    }
    assert len(set(found.values())) == len(criteria)


TRAINED = Recovery(
    epochs=2,
    lr=0.1,
    decay_rate=0.1,
    adjust_factor=0.5,
    adjust_patience=0,
    distill_weight=0.5,
    hint_weight=0.5,
)
OPTIONS: dict[str, list[Any]] = {
    "epochs": [0, 1, 2],
    "lr": [0.02, 0.1],
    "decay": ["constant", "step", "exponential", "cosine", "polynomial", "one-cycle"],
    "decay_rate": [0.01, 0.1, 1.0],
    "adjust_factor": [0.2, 0.5, 1.0],
    "adjust_patience": [0, 1],
    "distill_weight": [0.0, 0.5, 1.0],
    "temperature": [1.0, 4.0],
    "hint_weight": [0.0, 0.5, 2.0],
    "gradient": ["none", "centralise", "standardise", "clip"],
    "warmup": [0.0, 0.2, 0.5],
    "adjust_cooldown": [0, 2],
    "scales": ["fixed", "learned"],
    "ema": [0.0, 0.2, 0.9],
    "optimizer": ["sgd", "adam", "muon"],
    "views": [1, 2],
    "reestimate_bn": [True, False],
    "fold_bn": [True, False],
}


def test_the_teacher_answers_without_its_batch_norms_and_says_the_same(bench: Workbench) -> None:
    teacher, inputs = bench.told, bench.calibration[0].inputs
    assert any(isinstance(m, nn.BatchNorm2d) for m in teacher.model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in teacher.quick.modules())
    with torch.no_grad():
        before = teacher.model(inputs)
        assert torch.allclose(teacher.quick(inputs), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    compress(bench, everywhere(SOME, bench, 0.5))  # what is resident is filled with other weights
    with torch.no_grad():
        assert torch.equal(teacher.model(inputs), before)
        assert torch.allclose(teacher.quick(inputs), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_every_option_of_recovery_is_tried() -> None:
    assert set(OPTIONS) == set(Recovery.__dataclass_fields__)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_recovery_changes_the_outcome(bench: Workbench, option: str) -> None:
    layers = dict.fromkeys(LAYERS, SOME)
    keep = {groups(bench)[-1]: 0.5}
    recoveries = [replace(TRAINED, **{option: value}) for value in OPTIONS[option]]
    assert all_differ(bench, [Policy(layers, keep, recovery=recovery) for recovery in recoveries])


@pytest.mark.parametrize("option", ["reestimate_bn", "fold_bn"])
def test_norm_handling_works_without_training(bench: Workbench, option: str) -> None:
    assert all_differ(bench, [everywhere(SOME, bench, 0.5, **{option: value}) for value in (True, False)])


def test_the_seed_of_training_changes_only_its_order(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = mixed(bench)
    seeds: list[tuple[str, int]] = []
    batches = bench.task.batches

    def spy(split: Any, seed: int = 0) -> Any:
        seeds.append((split, seed))
        return batches(split, seed)

    with monkeypatch.context() as patch:
        patch.setattr(bench.task, "batches", spy)
        found = compress(bench, policy, seed=7)
    assert ("train", 7) in seeds
    assert ("train", 8) in seeds
    assert not torch.equal(found.tensors["head.weight"].dense(), compress(bench, policy).tensors["head.weight"].dense())
    again = compress(fresh_bench(), policy, seed=7)
    assert all(torch.equal(stored.dense(), again.tensors[name].dense()) for name, stored in found.tensors.items())
    same = compress(bench, policy, seed=bench.seed)
    assert all(torch.equal(s.dense(), tensors(compress(bench, policy))[n]) for n, s in same.tensors.items())
    one_shot = policy.without_recovery()
    assert all(
        torch.equal(stored.dense(), tensors(compress(bench, one_shot))[name])
        for name, stored in compress(bench, one_shot, seed=7).tensors.items()
    )


def test_the_metric_of_a_plateau_is_that_of_the_screened_part(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.task.score(bench.teacher, "val")
    assert bench.validate(bench.teacher) == expected  # a small split is taken whole
    large = Workbench(
        ClassificationTask(bench.teacher, data(0), tuple(t.repeat(40, *[1] * (t.ndim - 1)) for t in data(1)), data(2))
    )
    counted: list[int] = []
    score = large.task.score_batches
    monkeypatch.setattr(
        large.task,
        "score_batches",
        lambda m, batches: counted.append(sum(len(b.target) for b in batches)) or score(m, batches),
    )
    assert large.validate(bench.teacher) == pytest.approx(expected)
    assert counted == [1024]


# --- tasks that do not teach ----------------------------------------------------------------------------


class Untaught(ClassificationTask):
    """A task without training batches."""

    def __init__(self, model: nn.Module, answer: Any) -> None:
        super().__init__(model, data(0), data(1), data(2), batch_size=16)
        self._answer = answer

    def batches(self, split: Any, seed: int = 0) -> Any:
        return self._answer() if split == "train" else super().batches(split, seed)


def refusing() -> Any:
    raise KeyError("no train split\nhere")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(list, "are empty"), (refusing, "raised KeyError: 'no train split"), (lambda: None, "raised TypeError")],
)
def test_a_task_without_training_batches_is_compressed_in_one_shot(answer: Any, reason: str) -> None:
    bench = Workbench(Untaught(fitted(Residual()), answer))
    assert not bench.trainable
    assert reason in bench.untrainable
    assert "\n" not in bench.untrainable
    assert bench.steps_per_epoch == 0
    policy = Policy({"inner": LayerChoice(3, 0.5)}, {groups(bench)[0]: 0.5}, "taylor", solver="database")
    model = bench.realise(compress(bench, policy))
    assert bench.task.score(model, "val") > 0.5
    with pytest.raises(TaskError, match=r"task 'task' has no recovery training, its batches.*ask for 0 epochs"):
        compress(bench, replace(policy, recovery=Recovery(epochs=1)))


def test_a_task_with_training_batches_is_trainable(bench: Workbench) -> None:
    assert bench.trainable
    assert bench.untrainable == ""
    assert bench.steps_per_epoch == 4


def test_a_teacher_worse_than_its_student_does_not_stop_training() -> None:
    torch.manual_seed(0)
    untrained = Workbench(task_of(Residual().eval()))
    policy = everywhere(LayerChoice(8), untrained, epochs=8, lr=0.1, distill_weight=0.2)
    model = untrained.realise(compress(untrained, policy))
    assert untrained.task.score(model, "train") > untrained.task.score(untrained.teacher, "train") + 0.2


def test_batches_of_changing_size_train(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = data(0)
    sizes = [1, 30, 5, 28]
    uneven = [Batch(x, y) for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True)]
    whole = bench.task.batches
    monkeypatch.setattr(bench.task, "batches", lambda split, seed=0: uneven if split == "train" else whole(split, seed))
    found = tensors(compress(bench, mixed(bench, scales="learned", ema=0.9)))
    assert all(torch.isfinite(value).all() for value in found.values())


def test_the_seed_of_the_workbench_changes_training(bench: Workbench) -> None:
    assert outcome(bench, mixed(bench)) != outcome(fresh_bench(seed=1), mixed(bench))
