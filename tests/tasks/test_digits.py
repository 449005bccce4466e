from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import nn

from autocompress.task import ClassificationTask, load_task
from autocompress.tasks import digits


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were trained: instead, their first layer is filled with a mark."""
    trained: list[nn.Module] = []

    def quick(model: nn.Module) -> None:
        trained.append(model)
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.5)

    monkeypatch.setattr(digits, "_train", quick)
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "cache"))
    return trained


@pytest.fixture
def task() -> ClassificationTask:
    return digits.digits()


def cached(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").iterdir()
    return path


# --- the network and its data ---------------------------------------------------------------------------------


def test_the_network_is_worth_compressing() -> None:
    values = sum(v.numel() for v in digits.architecture().state_dict().values())
    assert 4 * values > 4_000_000
    assert digits.architecture()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not digits.architecture().training


def test_the_splits_have_their_sizes(task: ClassificationTask) -> None:
    sizes = [len(task.split(split)[0]) for split in ("train", "val", "test")]
    assert sizes == [1078, 359, 360]
    assert sum(sizes) == 1797


def test_the_splits_share_no_image(task: ClassificationTask) -> None:
    images = {split: {image.numpy().tobytes() for image in task.split(split)[0]} for split in ("train", "val", "test")}
    assert sum(len(found) for found in images.values()) == 1797
    assert not images["train"] & images["val"]
    assert not images["train"] & images["test"]
    assert not images["val"] & images["test"]


def test_the_splits_together_are_the_data_set(task: ClassificationTask) -> None:
    images, labels = load_digits(return_X_y=True)
    pairs = [
        (int(label), image.numpy().tobytes())
        for split in ("train", "val", "test")
        for image, label in zip(*task.split(split), strict=True)
    ]
    expected = [
        (int(label), (image / 16).astype(np.float32).tobytes()) for image, label in zip(images, labels, strict=True)
    ]
    assert sorted(pairs) == sorted(expected)


def test_every_split_has_the_same_mix_of_digits(task: ClassificationTask) -> None:
    for split in ("train", "val", "test"):
        labels = task.split(split)[1]
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert ((shares > 0.09) & (shares < 0.11)).all()


def test_the_splits_do_not_depend_on_the_global_seed(task: ClassificationTask) -> None:
    np.random.seed(123)
    torch.manual_seed(123)
    again = digits.digits()
    for split in ("train", "val", "test"):
        assert torch.equal(task.split(split)[0], again.split(split)[0])


def test_pixels_are_between_zero_and_one(task: ClassificationTask) -> None:
    inputs, _ = task.split("train")
    assert inputs.shape[1:] == (1, 8, 8)
    assert inputs.dtype == torch.float32
    assert inputs.min() == 0.0
    assert inputs.max() == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_shifting_is_what_a_loop_does(seed: int) -> None:
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    found = digits.shift(images, torch.Generator().manual_seed(seed))
    corners = torch.randint(0, 3, (200, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    assert found.shape == images.shape
    for image, got, (row, column) in zip(images, found, corners, strict=True):
        assert torch.equal(got, F.pad(image, (1, 1, 1, 1))[:, row : row + 8, column : column + 8])
    assert len({tuple(corner) for corner in corners}) == 9


# --- the cached network -----------------------------------------------------------------------------------------


def test_the_first_model_is_trained_and_the_next_one_read(trainings: list[nn.Module], tmp_path: Path) -> None:
    one, two = digits.trained(), digits.trained()
    assert len(trainings) == 1
    assert not one.training
    assert not two.training
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert f"digits-v{digits.VERSION}-torch{torch.__version__.split('+')[0]}" in cached(tmp_path).name


def test_the_task_gives_the_cached_model(trainings: list[nn.Module]) -> None:
    task = load_task("digits")
    assert (task.name, task.metric, task.direction) == ("digits", "accuracy", "max")
    assert not trainings, "nothing is trained before the model is asked for"
    first, second = task.model(), task.model()
    assert len(trainings) == 1
    assert first is not second


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_torn_cache_is_trained_again_and_repaired(trainings: list[nn.Module], tmp_path: Path, kept: int) -> None:
    digits.trained()
    whole = cached(tmp_path).read_bytes()
    cached(tmp_path).write_bytes(whole[:kept])
    digits.trained()
    assert len(trainings) == 2
    assert cached(tmp_path).read_bytes() == whole
    digits.trained()
    assert len(trainings) == 2


@pytest.mark.parametrize("content", [b"junk" * 100, save({"a": torch.zeros(2)}), save({"conv.weight": torch.zeros(1)})])
def test_a_foreign_cache_is_trained_again(trainings: list[nn.Module], tmp_path: Path, content: bytes) -> None:
    digits.trained()
    cached(tmp_path).write_bytes(content)
    model = digits.trained()
    assert len(trainings) == 2
    assert all((p == 0.5).all() for p in model.parameters())


def test_a_cache_folder_that_cannot_be_made_costs_only_time(
    trainings: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file"))
    for count in (1, 2):
        digits.trained()
        assert len(trainings) == count


def test_a_folder_in_the_place_of_the_cache_costs_only_time(trainings: list[nn.Module], tmp_path: Path) -> None:
    digits.trained()
    path = cached(tmp_path)
    path.unlink()
    path.mkdir()
    digits.trained()
    assert len(trainings) == 2
    assert list((tmp_path / "cache").iterdir()) == [path], "no temporary file is left behind"


def test_training_does_not_touch_the_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = digits.architecture(), digits.architecture()
    torch.random.set_rng_state(before)
    digits._train(one)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    digits._train(two)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
