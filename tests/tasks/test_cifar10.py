import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from autocompress.errors import TaskError
from autocompress.task import load_task, probe
from autocompress.tasks.cifar10 import (
    MEAN,
    STD,
    architecture,
    crop_and_flip,
    mirrored_and_moved,
    read_batch,
    read_checkpoint,
)

PER_FILE = 4


class Bomb:
    """Touches a file when it is unpickled by anything that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def content(seed: int, count: int = PER_FILE) -> dict[bytes, Any]:
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": data, b"labels": draw.integers(0, 10, count).tolist(), b"batch_label": b"of 5", b"filenames": []}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps(content(seed), protocol=2))
    return folder


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return architecture(20).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, tmp_path / "resnet20.pt")
    return tmp_path / "resnet20.pt"


def complaint(action: Callable[[], Any]) -> str:
    with pytest.raises(TaskError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- the task -----------------------------------------------------------------------------------------------


def test_the_task_runs_on_a_folder_and_a_checkpoint(data: Path, checkpoint: Path) -> None:
    task = load_task("cifar10", data=data, checkpoint=checkpoint)
    model, batch = probe(task)
    assert task.name == "cifar10-resnet20"
    assert batch.inputs.shape == (2, 3, 32, 32)
    assert model(batch.inputs).shape == (2, 10)
    assert 0.0 <= task.score(model, "test") <= 1.0


def test_the_parent_folder_is_as_good(data: Path, checkpoint: Path) -> None:
    assert load_task("cifar10", data=data.parent, checkpoint=checkpoint).name == "cifar10-resnet20"


def test_the_test_images_are_halved_into_val_and_test(data: Path, checkpoint: Path) -> None:
    task: Any = load_task("cifar10", data=data, checkpoint=checkpoint)
    stored = content(5)
    images = torch.tensor(stored[b"data"]).reshape(-1, 3, 32, 32)
    assert torch.equal(torch.cat([task.split("val")[0], task.split("test")[0]]), images)
    assert torch.cat([task.split("val")[1], task.split("test")[1]]).tolist() == stored[b"labels"]
    assert len(task.split("train")[0]) == 5 * PER_FILE


def test_images_are_normalised_by_channel(data: Path, checkpoint: Path) -> None:
    task: Any = load_task("cifar10", data=data, checkpoint=checkpoint)
    (batch,) = task.batches("val", 0)
    raw = task.split("val")[0]
    for c in range(3):
        torch.testing.assert_close(batch.inputs[:, c], (raw[:, c].float() / 255 - MEAN[c]) / STD[c])


def test_training_images_are_augmented_by_the_seed(data: Path, checkpoint: Path) -> None:
    task: Any = load_task("cifar10", data=data, checkpoint=checkpoint)
    one, again, other = (next(iter(task.batches("train", seed))).inputs for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("depth", "form"),
    [(20, "plain"), (20, "module"), (20, "wrapped"), (20, "safetensors"), (32, "module"), (56, "safetensors")],
)
def test_every_depth_and_form_of_checkpoint(data: Path, tmp_path: Path, depth: int, form: str) -> None:
    torch.manual_seed(depth)
    state = architecture(depth).state_dict()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    prefixed = {f"module.{key}": value for key, value in state.items()}
    if form == "safetensors":
        save_file(prefixed, path)
    else:
        torch.save({"plain": state, "module": prefixed, "wrapped": {"state_dict": prefixed, "top1": 92.6}}[form], path)
    task = load_task("cifar10", data=data, checkpoint=path)
    assert task.name == f"cifar10-resnet{depth}"
    loaded = task.model().state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_architectures_have_their_published_size(depth: int, parameters: int) -> None:
    """0.27, 0.46 and 0.85 million: He et al. 2015, table 6."""
    assert sum(p.numel() for p in architecture(depth).parameters()) == parameters


@pytest.mark.parametrize("depth", [18, 50, 0, -4, 110])
def test_other_depths_are_refused(depth: int) -> None:
    assert complaint(lambda: architecture(depth)) == f"CIFAR ResNet depth is {depth}; it must be one of (20, 32, 56)"


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_cropping_and_flipping_is_what_a_loop_does(seed: int) -> None:
    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    found = crop_and_flip(images, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 9, (16, 2), generator=generator)
    flips = torch.rand(16, generator=generator) < 0.5
    for image, got, (row, column), flip in zip(images, found, corners.tolist(), flips.tolist(), strict=True):
        cropped = F.pad(image, (4, 4, 4, 4))[:, row : row + 12, column : column + 12]
        assert torch.equal(got, cropped.flip(2) if flip else cropped)
    assert 0 < flips.sum() < 16


def test_every_corner_and_both_directions_are_drawn() -> None:
    mark = torch.zeros(2000, 1, 32, 32)
    mark[:, 0, 16, 16] = 1
    places = crop_and_flip(mark, torch.Generator().manual_seed(0)).flatten(1).argmax(1)
    assert {int(p) // 32 for p in places} == set(range(12, 21))
    assert {int(p) % 32 for p in places} == set(range(11, 21))  # 12..20, and mirrored 11..19


def test_views_are_the_mirror_image_and_moved_ones_of_the_same_size() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, *rest = mirrored_and_moved(images)
    assert torch.equal(first, images.flip(3))
    assert len(rest) == 8
    assert len({tuple(v.flatten().tolist()) for v in (images, first, *rest)}) == 10
    inner = images[:, :, 2:-2, 2:-2]
    for moved, (row, column) in zip(rest[1::2], ((2, 0), (-2, 0), (0, 2), (0, -2)), strict=True):
        shifted = moved.roll((-row, -column), (2, 3))
        assert torch.equal(shifted[:, :, 2:-2, 2:-2], inner)
    for mirror, moved in zip(rest[::2], rest[1::2], strict=True):
        assert torch.equal(mirror.flip(3), moved)


# --- data that is wrong ---------------------------------------------------------------------------------------


def test_a_folder_without_the_data_set_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "elsewhere", tmp_path / "absent", checkpoint):
        message = complaint(lambda folder=folder: load_task("cifar10", data=folder, checkpoint=checkpoint))
        assert message == f"{folder} holds no cifar-10-batches-py/ folder with data_batch_1..5 and test_batch"


def test_a_missing_batch_is_named(data: Path, checkpoint: Path) -> None:
    (data / "data_batch_3").unlink()
    message = complaint(lambda: load_task("cifar10", data=data, checkpoint=checkpoint))
    assert message == f"cannot read {data / 'data_batch_3'}: No such file or directory"


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch"])
@pytest.mark.parametrize("kept", [0, 1, 10, 200, -2])
def test_a_truncated_batch_is_named(data: Path, checkpoint: Path, name: str, kept: int) -> None:
    (data / name).write_bytes((data / name).read_bytes()[:kept])
    message = complaint(lambda: load_task("cifar10", data=data, checkpoint=checkpoint))
    assert message.startswith(f"{data / name} is not a CIFAR-10 batch file: ")


def test_a_batch_that_would_run_code_runs_none(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    for protocol in (0, 2, 4):
        (data / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb(mark), b"labels": []}, protocol=protocol))
        message = complaint(lambda: load_task("cifar10", data=data, checkpoint=checkpoint))
        assert "is not a CIFAR-10 batch file: it asks for" in message
        assert "system" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(tR.",
        b"csubprocess\nPopen\n(S'true'\ntR.",
        b"c_codecs\ndecode\n(tR.",
        b"cnumpy\ndtype.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x16ndarray.__subclasses__\x93.",
    ],
)
def test_only_what_rebuilds_arrays_is_let_through(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "batch").write_bytes(payload)
    assert "it asks for" in complaint(lambda: read_batch(tmp_path / "batch"))


@pytest.mark.parametrize(
    "wrong",
    [
        {b"labels": [0, 1, 2]},
        {b"labels": [0, 1, 2, 10]},
        {b"labels": [0, 1, 2, -1]},
        {b"labels": [[0], [1], [2], [3]]},
        {b"labels": ["a", "b", "c", "d"]},
        {b"labels": None},
        {b"data": np.zeros((4, 3071), dtype=np.uint8)},
        {b"data": "text"},
        {b"data": None},
    ],
)
def test_contents_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[bytes, Any]) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(content(0) | wrong, protocol=2))
    assert str(tmp_path / "batch") in complaint(lambda: read_batch(tmp_path / "batch"))


@pytest.mark.parametrize("whole", [[], {}, 5, {"data": 1}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, whole: Any) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(whole, protocol=2))
    assert "is not a CIFAR-10 batch file" in complaint(lambda: read_batch(tmp_path / "batch"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_of_every_pickle_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    stored = content(3)
    (tmp_path / "batch").write_bytes(pickle.dumps(stored, protocol=protocol))
    images, labels = read_batch(tmp_path / "batch")
    assert images.reshape(PER_FILE, -1).tolist() == stored[b"data"].tolist()
    assert labels.tolist() == stored[b"labels"]


def test_a_batch_from_python_2_is_read(tmp_path: Path) -> None:
    """The public files name numpy.core and hold bytes as strings."""
    raw = pickle.dumps(content(3), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in raw
    (tmp_path / "batch").write_bytes(raw)
    assert read_batch(tmp_path / "batch")[0].shape == (PER_FILE, 3, 32, 32)


# --- checkpoints that are wrong ---------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    message = complaint(lambda: load_task("cifar10", data=data, checkpoint=tmp_path / "absent.pt"))
    assert message.startswith(f"cannot read the checkpoint {tmp_path / 'absent.pt'}: ")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 8, 100, 5000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, state: dict[str, Tensor], name: str, kept: int) -> None:
    path = tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert complaint(lambda: read_checkpoint(path)).startswith(f"cannot read the checkpoint {path}: ")


@pytest.mark.parametrize(
    "junk", [b"hello world", b"\x80", b"PK\x03\x04" + bytes(60), b"\x80\x02}.", bytes(300), b"(dp0\n"]
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, junk: bytes) -> None:
    (tmp_path / name).write_bytes(junk)
    assert str(tmp_path / name) in complaint(lambda: read_checkpoint(tmp_path / name))


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert "cannot read the checkpoint" in complaint(lambda: read_checkpoint(tmp_path))


def test_a_checkpoint_that_would_run_code_runs_none(tmp_path: Path) -> None:
    mark, path = tmp_path / "owned", tmp_path / "model.pt"
    for zipped in (True, False):
        torch.save({"state_dict": Bomb(mark)}, path, _use_new_zipfile_serialization=zipped)
        assert "cannot read the checkpoint" in complaint(lambda: read_checkpoint(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [[1, 2], torch.ones(3), {"state_dict": 5}, {"epoch": 3}, {"state_dict": {"a": 1}}, {("a", 1): torch.ones(3)}],
)
def test_a_checkpoint_without_a_state_dict_is_told_how_to_save_one(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "model.pt")
    message = complaint(lambda: read_checkpoint(tmp_path / "model.pt"))
    assert "is not a state dict: save one with torch.save(model.state_dict(), PATH)" in message


@pytest.mark.parametrize("keys", [[], ["layer1.0.conv1.weight"], ["layer1"], ["layer1."], ["features.0.weight"]])
def test_a_checkpoint_of_another_network_is_refused(data: Path, tmp_path: Path, keys: list[str]) -> None:
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "model.pt")
    message = complaint(lambda: load_task("cifar10", data=data, checkpoint=tmp_path / "model.pt"))
    assert "is no CIFAR ResNet-20/32/56: its layer1 has" in message


def test_a_checkpoint_that_lacks_a_weight_is_refused(data: Path, tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({key: value for key, value in state.items() if key != "linear.bias"}, tmp_path / "model.pt")
    message = complaint(lambda: load_task("cifar10", data=data, checkpoint=tmp_path / "model.pt"))
    assert "does not fit a CIFAR ResNet-20" in message
    assert "linear.bias" in message


def test_a_checkpoint_of_another_width_is_refused(data: Path, tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state | {"linear.weight": torch.zeros(100, 64)}, tmp_path / "model.pt")
    message = complaint(lambda: load_task("cifar10", data=data, checkpoint=tmp_path / "model.pt"))
    assert "size mismatch for linear.weight" in message
