from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from autocompress import Batch, ClassificationTask, LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.engine import finetune
from autocompress.engine.checkpoint import Checkpoint
from autocompress.engine.precision import Precision
from autocompress.policy import Scheme

STEPS = 4


class Stopped(BaseException):
    """Stands for the death of the process."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 3)
    ).eval()


def jitter(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draws from the epoch's generator and, as careless tasks do, from the global one."""
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator) + 0.1 * torch.randn(inputs.shape)


def fresh(seed: int = 0, name: str = "task") -> Workbench:
    draw = torch.Generator().manual_seed(1)
    data = torch.randn(16 * STEPS, 2, 4, 4, generator=draw), torch.randint(0, 3, (16 * STEPS,), generator=draw)
    task = ClassificationTask(model(), data, data, data, batch_size=16, augment=jitter, name=name)
    return Workbench(task, seed=seed)


RICH = Recovery(
    epochs=3,
    lr=0.1,
    scales="learned",
    ema=0.8,
    adjust_factor=0.5,
    adjust_patience=0,
    adjust_cooldown=1,
    hint_weight=0.2,
    warmup=0.2,
    gradient="clip",
    reestimate_bn=False,
)


def policy(recovery: Recovery = RICH, scheme: Scheme = "symmetric") -> Policy:
    return Policy({"0": LayerChoice(3, 0.3, scheme), "5": LayerChoice(2, 0.0, scheme)}, recovery=recovery)


def tensors(bench: Workbench, policy: Policy, **more: Any) -> dict[str, Tensor]:
    return {name: stored.dense() for name, stored in compress(bench, policy, **more).tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def interrupted(path: Path, at: int, policy: Policy, bench: Workbench | None = None, seed: int | None = None) -> None:
    """A training that dies after step `at`."""

    def stop(step: int, total: int) -> None:  # noqa: ARG001
        if step == at:
            raise Stopped

    with pytest.raises(Stopped):
        compress(bench or fresh(), policy, stop, checkpoint=path, seed=seed)


@pytest.mark.parametrize("scheme", ["symmetric", "entropy"])
@pytest.mark.parametrize("at", [STEPS + 1, 2 * STEPS, 2 * STEPS + 2])
@pytest.mark.parametrize(
    "recovery",
    [
        RICH,
        Recovery(epochs=3, distill_weight=0.5),
        replace(RICH, ema=0.0),
        replace(RICH, optimizer="adam"),
        Recovery(epochs=3, lr=0.05, optimizer="muon", reestimate_bn=False),
    ],
)
def test_a_training_that_goes_on_gives_the_same_bits(
    tmp_path: Path, at: int, recovery: Recovery, scheme: Scheme
) -> None:
    path, wanted = tmp_path / "deep" / "training", policy(recovery, scheme)
    whole = tensors(fresh(), wanted)
    interrupted(path, at, wanted)
    heard: list[int] = []
    assert equal(tensors(fresh(), wanted, progress=lambda step, _: heard.append(step), checkpoint=path), whole)
    assert heard[0] == at // STEPS * STEPS + 1 if at % STEPS else at - STEPS + 1
    assert not path.exists()
    assert not list(path.parent.iterdir())


def test_the_first_epoch_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "training"
    interrupted(path, 2, policy())
    assert not path.exists()
    assert equal(tensors(fresh(), policy(), checkpoint=path), tensors(fresh(), policy()))


def test_the_curve_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = compress(fresh(), policy()).curve
    path = tmp_path / "training"
    interrupted(path, STEPS + 1, policy())
    assert whole is not None
    assert compress(fresh(), policy(), checkpoint=path).curve == whole


def test_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    assert equal(tensors(fresh(), policy(), checkpoint=tmp_path / "a"), tensors(fresh(), policy()))


def test_it_holds_all_that_training_changes(tmp_path: Path) -> None:
    path = tmp_path / "training"
    interrupted(path, STEPS + 1, policy())
    with safe_open(path, "pt") as file:
        names = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert names == {"model", "optimizer", "average", "scales", "rng"}


OTHERS: dict[str, tuple[Policy, dict[str, Any], int | None]] = {
    "policy": (policy(replace(RICH, lr=0.05)), {}, None),
    "bits": (Policy({"0": LayerChoice(4, 0.3)}, recovery=RICH), {}, None),
    "training seed": (policy(), {}, 5),
    "seed": (policy(), {"seed": 1}, None),
    "task": (policy(), {"name": "other"}, None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_training_is_ignored(tmp_path: Path, other: str) -> None:
    path = tmp_path / "training"
    wanted, made, seed = OTHERS[other]
    interrupted(path, STEPS + 1, wanted, fresh(**made), seed)
    with pytest.warns(UserWarning, match="training is ignored, and training starts anew: it belongs to another policy"):
        found = tensors(fresh(), policy(), checkpoint=path)
    assert equal(found, tensors(fresh(), policy()))
    assert not path.exists()


def test_the_checkpoint_of_another_precision_is_ignored(tmp_path: Path) -> None:
    path, bench = tmp_path / "training", fresh()
    interrupted(path, STEPS + 1, policy())
    bench.precision = Precision(autocast=True)
    with pytest.warns(UserWarning, match="training starts anew"):
        compress(bench, policy(), checkpoint=path)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_ignored(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "training"
    interrupted(path, STEPS + 1, policy())
    content = path.read_bytes()
    half = len(content) // 2
    damaged = {
        "cut": content[:half],
        "empty": b"",
        "flipped": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "foreign": b"PK\x03\x04 something else entirely",
    }
    path.write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match="training starts anew"):
        found = tensors(fresh(), policy(), checkpoint=path)
    assert equal(found, tensors(fresh(), policy()))


def test_a_training_that_diverges_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bench, steps = tmp_path / "training", fresh(), iter(range(100))
    loss = finetune.recovery_loss

    def diverging(*given: Any) -> Tensor:
        return loss(*given) * (float("nan") if next(steps) == STEPS + 1 else 1.0)

    monkeypatch.setattr(finetune, "recovery_loss", diverging)
    with pytest.raises(FloatingPointError, match=rf"step {STEPS + 1} of {3 * STEPS}, at learning rate 0\.\d+"):
        compress(bench, policy(), checkpoint=path)
    assert not path.exists()


def test_tensors_and_facts_come_back_as_they_were(tmp_path: Path) -> None:
    saved = Checkpoint(tmp_path / "c", "me")
    assert saved.load() is None
    given = {"a": torch.randn(3, 2).T, "b": torch.tensor(7), "c": torch.zeros(0), "d": torch.tensor([True])}
    saved.save(given, {"step": 3, "best": float("inf"), "values": [0.1, 1e-300]})
    found = saved.load()
    assert found is not None
    assert equal(given, found[0])
    assert all(found[0][name].dtype == value.dtype for name, value in given.items())
    assert found[1] == {"step": 3, "best": float("inf"), "values": [0.1, 1e-300]}
    with pytest.warns(UserWarning, match="another policy"):
        assert Checkpoint(tmp_path / "c", "you").load() is None


def test_epochs_of_another_length_go_on_where_they_ended(tmp_path: Path) -> None:
    def uneven() -> Workbench:
        bench = fresh()
        batches = bench.task.batches

        def some(split: Any, seed: int = 0) -> list[Batch]:
            return list(batches(split, seed))[: 2 + seed % 3]

        bench.task.batches = some  # type: ignore[method-assign]
        return bench

    path = tmp_path / "training"
    interrupted(path, 6, policy(), uneven())  # in the third epoch: 2 + 3 steps came before
    heard: list[int] = []
    found = tensors(uneven(), policy(), progress=lambda step, _: heard.append(step), checkpoint=path)
    assert heard[0] == 6
    assert equal(found, tensors(uneven(), policy()))
