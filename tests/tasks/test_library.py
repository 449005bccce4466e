"""Models from libraries as tasks: small ones with random weights, saved as the library saves them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress import TaskError, load_task
from autocompress.evaluate import Evaluator
from autocompress.policy import LayerChoice, Policy
from autocompress.task import probe
from autocompress.tasks import library
from autocompress.tasks.library import documentation

pytestmark = pytest.mark.slow  # importing transformers alone takes ten seconds

WORDS = [*"abcdefghijklmnopqrstuvw"]
LINES = [f"{a} {b} {c} {d}" for a in WORDS[:4] for b in WORDS[2:7] for c in WORDS[6:10] for d in WORDS[10:13]]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture
def saved(transformers: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A BERT of 2 layers in the class of this name, with its tokeniser."""

    def save(kind: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / kind
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        config = transformers.BertConfig(
            vocab_size=5 + len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            num_labels=3,
        )
        getattr(transformers, kind)(config).save_pretrained(folder)
        transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([*LINES, "", LINES[0]]))
    return path


def test_an_encoder_keeps_its_sentence_embeddings(saved: Callable[[str], Path], texts: Path) -> None:
    task = load_task(f"hf:{saved('BertModel')}", data=texts)
    assert (task.name, task.metric) == ("hf-bertmodel", "rank")
    model, batch = probe(task)
    assert batch.target.shape == (24, 32)
    mask = batch.inputs["attention_mask"].bool()
    positions = model.encoder(**batch.inputs).last_hidden_state  # type: ignore[operator]
    means = torch.stack([rows[on].mean(dim=0) for rows, on in zip(positions, mask, strict=True)])
    torch.testing.assert_close(batch.target, means.detach())
    assert task.score(model, "val") == pytest.approx(1.0)


def test_padding_does_not_move_an_embedding(saved: Callable[[str], Path], texts: Path) -> None:
    model, batch = probe(load_task(f"hf:{saved('BertModel')}", data=texts))
    short = {name: value[:, :12] for name, value in batch.inputs.items()}
    torch.testing.assert_close(model(**short), model(**batch.inputs), atol=1e-5, rtol=1e-4)


def test_a_classifier_keeps_its_answers(saved: Callable[[str], Path], texts: Path) -> None:
    task = load_task(f"hf:{saved('BertForSequenceClassification')}", data=texts)
    assert task.metric == "agreement"
    assert next(iter(task.batches("val", 0))).target.shape == (24, 3)


def test_a_model_that_answers_at_every_position_is_refused(saved: Callable[[str], Path], texts: Path) -> None:
    for kind in ("BertForMaskedLM", "BertForTokenClassification"):
        with pytest.raises(TaskError, match=f"is {kind}, which answers at every position"):
            load_task(f"hf:{saved(kind)}", data=texts)


def test_a_transformer_is_traced_and_compressed(saved: Callable[[str], Path], texts: Path) -> None:
    evaluator = Evaluator(load_task(f"hf:{saved('BertModel')}", data=texts))
    kinds = {layer.kind for layer in evaluator.graph.layers}
    assert kinds == {"linear", "embedding"}
    inner = [group for group in evaluator.graph.prunable if "intermediate" in group.name]
    assert [group.channels for group in inner] == [48, 48]

    def measured(bits: float, keep: float = 1.0) -> Any:
        layers = {layer.name: LayerChoice(bits, scheme="entropy") for layer in evaluator.graph.layers}
        found = evaluator(Policy(layers, {group.name: keep for group in inner}, solver="database"))
        assert found.measurement is not None, found.error
        return found.measurement

    fine, coarse, narrow = measured(6), measured(2), measured(6, keep=0.5)
    assert fine.quality > 0.99
    assert fine.loss < coarse.loss
    assert coarse.bytes < fine.bytes
    assert narrow.bytes < fine.bytes


def test_each_text_is_in_one_split(transformers: Any) -> None:  # noqa: ARG001
    parts = library._parts(LINES)
    assert [len(parts[split]) for split in ("train", "val", "test")] == [192, 24, 24]
    assert sorted(text for part in parts.values() for text in part) == sorted(LINES)


def test_code_beside_a_model_is_not_run(saved: Callable[[str], Path], texts: Path) -> None:
    folder = saved("BertModel")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "unheard-of"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    with pytest.raises(TaskError, match="cannot be loaded"):
        load_task(f"hf:{folder}", data=texts)
    assert not (folder / "ran").exists()


def test_a_pickled_checkpoint_is_not_loaded(saved: Callable[[str], Path], texts: Path) -> None:
    folder = saved("BertModel")
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(TaskError, match="cannot be loaded"):
        load_task(f"hf:{folder}", data=texts)


def test_a_missing_folder_is_named(transformers: Any, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaskError, match="hf:nowhere/at-all cannot be loaded"):
        load_task("hf:nowhere/at-all", data=texts)


def test_the_librarys_own_documentation_gives_different_english_sentences() -> None:
    found = documentation(200)
    assert len(found) == len(set(found)) == 200
    assert found == documentation(200)
    assert all(30 <= len(text) <= 300 and text[0].isupper() and text[-1] in ".!?" for text in found)


# --- timm, which is not installed here ------------------------------------------------------------------


def images(path: Path, names: tuple[str, ...] = ("train/images", "val/images", "test/images")) -> Path:
    save_file({name: torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) for name in names}, path)
    return path


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        asked.append({"name": name, "pretrained": pretrained})
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    module = ModuleType("timm")
    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    return asked


def test_a_timm_model_keeps_its_answers(timm: list[dict[str, Any]], tmp_path: Path) -> None:
    task = load_task("timm:small_net", data=images(tmp_path / "x.safetensors"))
    assert (task.name, task.metric, timm) == (
        "timm-small_net",
        "agreement",
        [{"name": "small_net", "pretrained": True}],
    )
    model, batch = probe(task)
    assert batch.inputs.shape == (20, 3, 8, 8)
    assert task.score(model, "test") == 1.0


def test_a_timm_models_checkpoint_is_safetensors(timm: list[dict[str, Any]], tmp_path: Path) -> None:
    data, path = images(tmp_path / "x.safetensors"), tmp_path / "weights.safetensors"
    state: dict[str, Tensor] = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.ones(4)}
    save_file(state | {"3.weight": torch.ones(5, 4), "3.bias": torch.ones(5)}, path)
    model = load_task("timm:small_net", data=data, checkpoint=path).model()
    assert torch.equal(model.get_parameter("3.weight"), torch.ones(5, 4))
    assert timm[-1]["pretrained"] is False
    save_file(state, path)
    with pytest.raises(TaskError, match=r"timm:small_net cannot be loaded: .*3\.weight"):
        load_task("timm:small_net", data=data, checkpoint=path)


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "content", "said"),
    [
        ("hf:", None, "'hf:' names no model"),
        ("timm:net", None, "timm: needs --data FILE.safetensors"),
        ("timm:net", ("x.safetensors", ("train/images", "val/images")), "no tensor named test/ARGUMENT"),
    ],
)
@pytest.mark.usefixtures("timm")
def test_what_is_missing_is_named(spec: str, content: Any, said: str, tmp_path: Path) -> None:
    data = None if content is None else images(tmp_path / content[0], content[1])
    with pytest.raises(TaskError, match=said):
        load_task(spec, data=data)


def test_a_library_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TaskError, match=r"timm: needs timm: pip install 'autocompress\[timm\]'"):
        load_task("timm:net", data=Path("x.safetensors"))


@pytest.mark.parametrize("text", ["one line", "\n".join(["the same"] * 100)])
def test_too_few_texts_are_refused(text: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text(text)
    with pytest.raises(TaskError, match="has 1 different lines"):
        load_task(f"hf:{saved('BertModel')}", data=path)
