"""Proposals of recovery training: known recipes first, then what trainings taught, for a place and a rung."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest
from fakes import GRAPH, SPACE_TEXT, make_space

from autocompress.controllers.recovery import RECIPES, USUAL, RecoveryProposer
from autocompress.lessons import Lesson
from autocompress.policy import Policy, Recovery
from autocompress.space import Space, parse_space
from autocompress.trial import Evaluation, Measurement

WIDE = """
[layers]
bits = [4]
[recovery]
lr = [0.001, 0.1]
decay = ["cosine", "step", "one-cycle"]
warmup = [0.0, 0.2]
adjust_factor = [0.5, 1.0]
distill_weight = [0.0, 1.0]
temperature = [2.0, 16.0]
hint_weight = [0.0, 2.0]
gradient = ["none", "centralise"]
scales = ["fixed", "learned"]
ema = [0.0, 0.99]
"""
SGD = WIDE + 'optimizer = ["sgd"]\n'
DENSE = GRAPH.dense_bytes
PARENT = make_space(WIDE).smallest()


def shot(loss: float = 1.0) -> Evaluation:
    return Evaluation(PARENT, 0, 0, "ok", Measurement(1000, 1, 0.5, loss))


def trained(policy: Policy, loss: float, *, error: str = "") -> Evaluation:
    if error:
        return Evaluation(policy, 0, 1, "failed", error=error)
    return Evaluation(policy, 0, 1, "ok", Measurement(1000, 1, 0.5, loss))


def after(
    text: str,
    worth: Callable[[Recovery], float],
    count: int,
    earlier: list[Lesson] | None = None,
    damage: float = 1.0,
) -> list[Recovery]:
    """Recipes of `count` trainings, one after another, whose loss is exp(worth); `damage` is that of the parent."""
    proposer, found = RecoveryProposer(make_space(text), earlier or ()), []
    proposer.learn(shot(damage))
    for number in range(count):
        policy = proposer.propose(PARENT, 1, 0.05, number)
        found.append(policy.recovery)
        proposer.learn(trained(policy, math.exp(worth(policy.recovery))))
    return found


def test_known_recipes_come_first_each_once() -> None:
    found = after(WIDE, lambda r: 0.0, len(RECIPES))  # noqa: ARG005
    names = [p.name.removeprefix("recovery/") for p in make_space(WIDE).recovery_parameters]
    known = [tuple((USUAL | changes)[name] for name in names) for changes in RECIPES]
    assert sorted(map(repr, known)) == sorted(repr(tuple(getattr(recipe, name) for name in names)) for recipe in found)


@pytest.mark.parametrize(("damage", "rates"), [(0.016, (0.005, 0.01)), (0.14, (0.01, 0.02)), (1.0, (0.02, 0.04))])
def test_what_lost_little_is_trained_gently(damage: float, rates: tuple[float, float]) -> None:
    found = [r.lr for r in after(SGD, lambda r: 0.0, len(RECIPES), damage=damage)]  # noqa: ARG005
    assert found[0] == rates[0]
    assert list(dict.fromkeys(found))[1] == rates[1]


def test_muon_takes_shorter_steps() -> None:
    muon = WIDE + 'optimizer = ["muon"]\n'
    ways = [after(text, lambda r: 0.0, 1, damage=0.14)[0] for text in (SGD, muon, WIDE)]  # noqa: ARG005
    assert [(r.optimizer, r.lr) for r in ways] == [("sgd", 0.01), ("muon", 0.005), ("muon", 0.005)]


def test_a_teacher_of_several_views_is_followed_at_higher_rates() -> None:
    text = SGD + "views = [1, 2]\n"
    rates = []
    for views in (False, True):
        proposer = RecoveryProposer(Space(parse_space(text, "fake.toml"), GRAPH, views=views))
        proposer.learn(shot(0.1))
        found = proposer.propose(PARENT, 1, 0.05, 0).recovery
        rates.append((found.views, found.lr))
    assert rates == [(1, 0.01), (2, 0.02)]


def test_recipes_are_restricted_to_what_the_space_allows() -> None:
    text = (
        '[layers]\nbits = [4]\n[recovery]\nlr = [0.03, 0.1]\ndecay = ["step", "cosine"]\ndistill_weight = [0.2, 0.6]\n'
    )
    space = make_space(text)
    for recipe in after(text, lambda r: 0.0, 12):  # noqa: ARG005
        assert 0.03 <= recipe.lr <= 0.1
        assert recipe.decay in ("step", "cosine")
        assert 0.2 <= recipe.distill_weight <= 0.6
        policy = replace(PARENT, recovery=recipe)
        assert space.decode(space.encode(policy), 1).recovery == recipe
    first = after(text, lambda r: 0.0, 1)[0]  # noqa: ARG005
    assert (first.lr, first.decay, first.distill_weight) == (0.03, "cosine", 0.6)


def test_space_without_choices_gives_its_one_recipe() -> None:
    found = after("[layers]\nbits = [4]\n[recovery]\nlr = [0.02, 0.02]\n", lambda r: 0.0, 3)  # noqa: ARG005
    assert len(set(found)) == 1


def test_best_recipe_so_far_is_taken_again_for_about_half() -> None:
    found = after(WIDE, lambda r: 0.0 if r.gradient == "centralise" and r.lr == 0.01 else 1.0, 45)
    (best,) = {r for r in found[: len(RECIPES)] if r.gradient == "centralise"}
    later = found[len(RECIPES) :]
    assert 0.25 < sum(r == best for r in later) / len(later) < 0.75


def test_samples_move_to_where_trainings_were_worth_most() -> None:
    """The optimum is far from all recipes; random draws of the same space lie much farther from it."""

    def distance(r: Recovery) -> float:
        return abs(math.log10(r.lr / 0.06)) + abs(r.distill_weight - 0.3) + abs(r.temperature - 3) / 4

    found = after(WIDE, lambda r: distance(r) - 1.0, 40)
    random = after(WIDE, lambda r: 0.0, 40)  # noqa: ARG005 (a constant teaches nothing)
    new, other = [[r for i, r in enumerate(x) if i >= 20 and r not in x[:i]] for x in (found, random)]
    assert min(len(new), len(other)) >= 5
    assert fmean(map(distance, new)) < 0.75 * fmean(map(distance, other))


def lessons(best_lr: Callable[[float], float]) -> list[Lesson]:
    """Trainings on a grid of sizes and rates whose best rate depends on the size; small files gain more."""
    return [
        Lesson(Recovery(epochs=1, lr=lr), share, -1.0 - share + abs(math.log10(lr / best_lr(share))))
        for share in (0.02, 0.2)
        for lr in (0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.1)
    ]


def test_proposals_are_for_the_size_that_is_asked_for() -> None:
    text = "[layers]\nbits = [4]\n[recovery]\nlr = [0.001, 0.1]\n"
    known = lessons(lambda share: 0.06 if share < 0.1 else 0.002)
    proposer = RecoveryProposer(make_space(text), known)
    small, large = (
        fmean(math.log10(proposer.propose(PARENT, 1, share, seed).recovery.lr) for seed in range(10, 22))
        for share in (0.02, 0.2)
    )
    assert small > large + 0.3


def test_small_files_gain_more_and_that_is_not_held_for_a_better_recipe() -> None:
    """The gain depends on the size alone, but small files were trained at low rates: the best is not sought there."""
    text = "[layers]\nbits = [4]\n[recovery]\nlr = [0.001, 0.1]\n"
    draws = {}
    for slope in (0.0, 2.0):
        known = [
            Lesson(Recovery(epochs=1, lr=lr), share, slope * math.log2(share) + abs(math.log10(lr / 0.03)))
            for share in (0.02, 0.04, 0.08, 0.16)
            for lr in (0.001, 0.01, 0.03, 0.1)
        ]
        proposer = RecoveryProposer(make_space(text), known)
        found = [proposer.propose(PARENT, 1, 0.08, seed).recovery.lr for seed in range(12)]
        draws[slope] = fmean(abs(math.log10(lr / 0.03)) for lr in found)
    assert draws[2.0] < draws[0.0] + 0.2


def test_one_training_of_a_small_file_does_not_make_its_recipe_the_best() -> None:
    """Four trainings as a first search leaves them; the second recipe is a little better, small files gain much."""
    recipes = after(WIDE, lambda r: 0.0, len(RECIPES))[:4]  # noqa: ARG005
    better = (0.0, -0.04, 0.02, 0.0)
    known = [
        Lesson(recipe, share, 0.35 * math.log2(share / 0.04) - 0.35 + effect)
        for recipe, share, effect in zip(recipes, (0.0393, 0.0385, 0.0128, 0.0224), better, strict=True)
    ]
    assert after(WIDE, lambda r: 0.0, 1, known) == [recipes[1]]  # noqa: ARG005


@pytest.mark.parametrize(("share", "first"), [(0.05, True), (0.04, True), (0.02, False), (0.15, False)])
def test_what_earlier_runs_found_for_other_sizes_does_not_go_first(share: float, first: bool) -> None:
    best = after(WIDE, lambda r: 0.0, len(RECIPES))[-1]  # noqa: ARG005
    proposer = RecoveryProposer(make_space(WIDE), [Lesson(best, share, -0.5)])
    proposer.learn(shot(0.05))
    found = proposer.propose(PARENT, 1, 0.05, 0).recovery
    assert (found == best) == first


def test_best_of_earlier_runs_goes_first_and_what_they_tried_is_not_tried_again() -> None:
    first = after(WIDE, lambda r: 0.0, len(RECIPES))  # noqa: ARG005
    earlier = [Lesson(recovery, 0.05, gain) for recovery, gain in zip(first, (-0.1, -0.3, -0.2), strict=False)]
    assert after(WIDE, lambda r: 0.0, 3, earlier) == [first[1], *first[3:5]]  # noqa: ARG005


def test_lessons_from_outside_of_the_space_do_no_harm() -> None:
    wide = [Lesson(recovery, 0.05, -0.5) for recovery in after(WIDE, lambda r: 0.0, 12)]  # noqa: ARG005
    for recipe in after(SPACE_TEXT, lambda r: 0.0, 10, wide):  # noqa: ARG005
        assert recipe.decay in ("cosine", "step")


def test_rates_stay_below_half_of_the_lowest_that_diverged() -> None:
    proposer = RecoveryProposer(make_space(WIDE))
    proposer.learn(shot())
    lowest = math.inf
    for number in range(16):
        policy = proposer.propose(PARENT, 1, 0.05, number)
        assert policy.recovery.lr <= max(0.001, lowest / 2)
        if policy.recovery.lr > 0.003:
            lowest = min(lowest, policy.recovery.lr)
            proposer.learn(trained(policy, 0.0, error="FloatingPointError: the recovery loss became nan"))
        else:
            proposer.learn(trained(policy, 0.5))
    assert lowest < 0.02
    assert len(proposer.lessons) >= 8


def test_other_failures_say_nothing_about_the_rate() -> None:
    proposer = RecoveryProposer(make_space(WIDE))
    proposer.learn(trained(replace(PARENT, recovery=Recovery(epochs=1, lr=0.002)), 0.0, error="MemoryError"))
    assert proposer.propose(PARENT, 1, 0.05, 0) == RecoveryProposer(make_space(WIDE)).propose(PARENT, 1, 0.05, 0)


def test_worth_is_the_logarithm_of_what_is_left_of_the_loss() -> None:
    proposer = RecoveryProposer(make_space(WIDE))
    policy = proposer.propose(PARENT, 2, 0.05, 0)
    proposer.learn(shot(0.8))
    proposer.learn(trained(policy, 0.2))
    (lesson,) = proposer.lessons
    assert lesson.gain == pytest.approx(math.log(0.25))
    assert lesson.share == 1000 / DENSE
    assert lesson.recovery == policy.recovery


def test_where_a_teacher_has_several_views_worth_is_what_is_left_of_the_distance_from_it() -> None:
    proposer = RecoveryProposer(make_space(WIDE))
    policy = proposer.propose(PARENT, 2, 0.05, 0)
    for found, taught in ((shot(0.2), 0.4), (trained(policy, 0.3), 0.1)):
        assert found.measurement is not None
        proposer.learn(replace(found, measurement=replace(found.measurement, teacher_loss=taught)))
    assert proposer.lessons[0].gain == pytest.approx(math.log(0.25))


@pytest.mark.parametrize(("before", "now"), [(0.0, 0.1), (-0.1, 0.1), (0.1, 0.0), (0.1, -0.2)])
def test_losses_without_a_logarithm_teach_nothing(before: float, now: float) -> None:
    proposer = RecoveryProposer(make_space(WIDE))
    policy = proposer.propose(PARENT, 1, 0.05, 0)
    proposer.learn(shot(before))
    proposer.learn(trained(policy, now))
    assert proposer.lessons == []


def test_told_the_same_it_proposes_the_same() -> None:
    whole = after(WIDE, lambda r: r.lr, 10)
    again = RecoveryProposer(make_space(WIDE))
    again.learn(shot())
    for number, recovery in enumerate(whole):
        if number >= 8:
            assert again.propose(PARENT, 1, 0.05, number).recovery == recovery
        again.learn(trained(replace(PARENT, recovery=recovery), math.exp(recovery.lr)))


def test_another_seed_draws_otherwise() -> None:
    earlier = [Lesson(recovery, 0.05, -0.1) for recovery in after(WIDE, lambda r: 0.0, len(RECIPES))]  # noqa: ARG005
    drawn = set()
    for seed in range(8):
        proposer = RecoveryProposer(make_space(WIDE), earlier)
        proposer.propose(PARENT, 1, 0.05, seed)  # the best of the earlier ones
        drawn.add(proposer.propose(PARENT, 1, 0.05, seed))
    assert len(drawn) >= 4
