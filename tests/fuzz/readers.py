"""Every reader of the package with sound files for it, and what each input is held to.

An input gives a value or an error of the package, in bounded time and memory. Where a checksum guards a file, a second
reader is given files whose checksum is right: an enemy knows how to compute it.
"""

from __future__ import annotations

import functools
import json
import pickle
import resource
import sqlite3
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from fakes import GRAPH, evaluation, make_profile, make_space
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save
from tiny import Tiny, tiny_workbench
from torch import Tensor

from autocompress import LayerChoice, Policy, Recovery, Workbench, compress
from autocompress.ablation import read_ablation, summarise
from autocompress.artifact.onnx import About
from autocompress.artifact.packed import build, pack, unpack
from autocompress.baselines import Baseline, read_baselines, write_baselines
from autocompress.engine.cache import Cache, digest
from autocompress.engine.checkpoint import Checkpoint
from autocompress.engine.database import LayerDatabase
from autocompress.errors import AutocompressError
from autocompress.journal import FILE, Journal
from autocompress.lessons import Lesson, read_lessons
from autocompress.measure.latency import Latency, RememberedTimes
from autocompress.measure.latency_table import Deployment, Entry, LatencyTable, Precision, read_table
from autocompress.measure.size import Size
from autocompress.policy import BITS
from autocompress.report.tables import Run, summary
from autocompress.space import Space, SpaceFile, load_space, shipped
from autocompress.study import Settings, _read_profile, read_config
from autocompress.tasks.cifar10 import read_batch, read_checkpoint
from autocompress.trial import Curve, Evaluation, Measurement

SECONDS = 1.0
"""Processor time of one input."""
MEMORY = 200 * 2**20
"""Bytes by which the process may have grown."""

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Reader:
    """`read` takes the bytes of one file; `seeds` are sound ones."""

    name: str
    seeds: Sequence[bytes]
    read: Read


class Broken(AssertionError):
    """An input that took too long or too much memory."""


class Judge:
    """Holds a reader to the limits, and counts what became of its inputs."""

    def __init__(self, reader: Reader) -> None:
        self._read = reader.read
        self.read = self.refused = 0
        self.slowest = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # caches warn of what they pass over
            for seed in reader.seeds:
                self._read(seed)
        self._peak = _peak()

    def __call__(self, content: bytes) -> None:
        """Read `content`. Raises whatever is no error of the package, and `Broken`."""
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._read(content)
            self.read += 1
        except AutocompressError:
            self.refused += 1
        took = time.process_time() - start
        self.slowest = max(self.slowest, took)
        if (grown := _peak() - self._peak) > MEMORY:
            raise Broken(f"the process grew by {grown / 2**20:.0f} MiB")
        if took > SECONDS:
            raise Broken(f"an input of {len(content)} bytes took {took:.2f} s")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- artifacts ------------------------------------------------------------------------------------------


@functools.cache
def _bench() -> Workbench:
    return tiny_workbench()[0]


def _packed() -> list[bytes]:
    found, bench = [], _bench()
    for layers in (
        {"conv": LayerChoice(3, 0.5), "body.0": LayerChoice(8, 0.5, "asymmetric"), "fc": LayerChoice(16)},
        {"conv": LayerChoice(1), "body.0": LayerChoice(2), "fc": LayerChoice(32, 0.5)},
        {name: LayerChoice(2.5, 0.5, "entropy") for name in ("conv", "body.0", "fc")},
    ):
        policy = Policy(layers, {g.name: 0.5 for g in bench.graph.prunable[:1]})
        made = compress(bench, policy)
        header = Size(bench.graph, "tiny", "accuracy").header(policy, made.codings())
        found.append(pack(header, made.tensors, 0.5, policy.key()))
    return found


def _built(content: bytes) -> object:
    return build(unpack(content), Tiny())


def _opened(content: bytes) -> bytes:
    """A packed file as header, a zero byte, payload: what `_closed` takes."""
    length = int.from_bytes(content[16:20], "little")
    return zlib.decompress(content[36 : 36 + length]) + b"\0" + content[36 + length :]


def _closed(content: bytes) -> bytes:
    """A packed file whose lengths and checksum are right."""
    header, _, payload = content.partition(b"\0")
    deflated = zlib.compress(header, 1)
    rest = struct.pack("<QI8sd", 36 + len(deflated) + len(payload), len(deflated), bytes(8), 0.5) + deflated + payload
    return b"ACZ1" + struct.pack("<I", zlib.crc32(rest)) + rest


ABOUT = About("tiny", "accuracy", "0123456789abcdef", 0.5)


def _network() -> bytes:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    branch = helper.make_graph([], "b", [], [helper.make_tensor_value_info("w", 1, [4, 3])], [weight])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", k]) for name, k in (("x", 4), ("y", 3))]
    return helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight])).SerializeToString()


# --- run folders ----------------------------------------------------------------------------------------


def _table() -> LatencyTable:
    layers = {
        "conv1": (Entry(8, 3, 0.1), Entry(4, 3, 0.06)),
        "conv2": (Entry(16, 8, 0.2),),
        "fc": (Entry(10, 16, 0.1),),
    }
    where = Deployment(GRAPH.fingerprint, "onnxruntime", "1", "cpu")
    return LatencyTable(where, 0.5, tuple(Precision(a, 0.1, 1.0, layers) for a in (8, 32)), 0.01, 1e-6, 0.02, 9, 3.5)


def _facts() -> dict[str, Any]:
    measured = asdict(Measurement(1000, 2000, 0.9, 0.1, 1.0))
    return {
        "dense": {name: None if value != value else value for name, value in measured.items()},
        "budget": {"bytes": 500, "ms": None, "macs": None},
        "identity": {"task": "t", "metric": "accuracy", "direction": "max", "graph": "g", "weights": "w"},
        "layers": [{"name": "conv1", "kind": "conv2d", "shape": [8, 3, 3, 3], "bytes": 864, "groups": ["conv1"]}],
        "seconds": 3.5,
        "peak_memory_mib": 200,
        "warnings": ["w"],
        "lessons": [],
        "profile": make_profile(make_space()).to_json(),
        "profile_reused": False,
        "latency_table": _table().to_json(),
        "details": {"dense": {"f1": 0.5}, "trials": {"0": {"f1": 0.4}}},
    }


def _config() -> bytes:
    config = {
        "settings": asdict(Settings("digits", ("size=50%",))),
        "space": SpaceFile().model_dump(mode="json"),
        "command": "autocompress search",
        "versions": {"torch": "2"},
        "machine": {"system": "Linux"},
    }
    return json.dumps(config).encode()


def _run(folder: Path) -> None:
    """A run folder of four trials."""
    (folder / "config.json").write_bytes(_config())
    trained = Policy({"conv1": LayerChoice(4, 0.5)}, {"conv1": 0.75}, recovery=Recovery(epochs=2))
    curve = Curve((1, 2), (0.5, 0.4), (0.1, 0.05), ((1, 0.5),))
    rows = [
        evaluation(0.9, 1000, 1.5),
        evaluation(status="failed"),
        Evaluation(trained, 0, 1, "ok", Measurement(400, 7, 0.8, 0.2, 1.0), curve=curve),
        evaluation(0.8, 900, copy_of=0),
    ]
    with Journal.writing(folder) as journal:
        for name, value in _facts().items():
            journal.set_fact(name, value)
        for number, row in enumerate(rows):
            journal.begin(number, row.policy, row.rung)
            journal.finish(number, row, 1.0)
        journal.begin(4, trained, 1)
        journal.arrive(4, rows[2])
        journal.finalise(0, 0.87, "artifacts/trial-0.acz", 1.0)
    database = sqlite3.connect(folder / FILE)
    database.execute("PRAGMA journal_mode=DELETE")
    database.execute("VACUUM")
    database.close()


def _journal_of(folder: Path) -> Callable[[bytes], object]:
    """Reads all that a journal holds, from a file with the bytes."""

    def read(content: bytes) -> object:
        for name in ("", "-wal", "-shm", "-journal"):
            (folder / f"{FILE}{name}").unlink(missing_ok=True)
        (folder / FILE).write_bytes(content)
        with Journal.reading(folder) as journal:
            found = [journal.trials(), journal.told(), journal.untold(), journal.begun(), journal.dates()]
            return [*found, journal.next_number(), journal.fact("dense")]

    return read


_COLUMNS = ("policy", "evaluation", "artifact", "quality_test", "state", "finished")
"""Of a row of the journal; an input of `_rows_of` names them, or facts."""


def _rows_of(folder: Path) -> Callable[[bytes], object]:
    """Reads a whole run in whose sound journal values were replaced: a JSON object of columns and facts."""
    sound = sqlite3.connect(":memory:")
    with sqlite3.connect(folder / FILE) as source:
        source.backup(sound)
    source.close()

    def read(content: bytes) -> object:
        try:
            changes = json.loads(content)
        except (ValueError, RecursionError):
            changes = {"policy": content.decode("latin-1")}
        database = sqlite3.connect(":memory:")
        sound.backup(database)
        for name, value in changes.items() if isinstance(changes, dict) else ():
            text = value if isinstance(value, str | int | float | None) else json.dumps(value)
            if isinstance(text, int) and not -(2**63) <= text < 2**63:
                text = json.dumps(value)
            try:
                if name in _COLUMNS:
                    database.execute(f"UPDATE trials SET {name} = ? WHERE number IN (0, 2)", (text,))
                else:
                    database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))
            except (sqlite3.Error, UnicodeEncodeError):
                continue  # the database itself refuses it
        database.commit()
        (folder / FILE).write_bytes(database.serialize())
        database.close()
        run = Run.read(folder)
        return summary(run), [run.row(trial) for trial in run.front]

    return read


def _rows() -> list[bytes]:
    policy = Policy({"conv1": LayerChoice(4, 0.5)}, {"conv1": 0.75}, recovery=Recovery(epochs=2))
    trial = {
        "policy": json.dumps(policy.to_json()),
        "evaluation": evaluation(0.7, 500).to_json() | {"at": 1.5},
        "artifact": "artifacts/trial-0.acz",
    }
    facts = _facts()
    return [
        json.dumps(trial | {"policy": policy.to_json()}).encode(),
        json.dumps({"state": "ok", "quality_test": 0.5, "finished": "2026-01-01 00:00:00"}).encode(),
        *(json.dumps({name: value}).encode() for name, value in facts.items()),
    ]


def _ablation() -> bytes:
    results = [{"key": k, "seed": s, "quality": 0.5 + s / 10} for k in ("a", "b") for s in (0, 1)]
    data = {
        "trial": 3, "task": "t", "metric": "accuracy", "direction": "max", "dense_quality": 0.9,
        "quality_before": 0.5, "epochs": 2, "seeds": [0, 1], "variants": {"full": "a", "no hints": "b"},
        "results": results,
    }  # fmt: skip
    return json.dumps(data).encode()


def _summarised(path: Path) -> object:
    found = read_ablation(path)
    return None if found is None else summarise(found)


# --- tensors on disk ------------------------------------------------------------------------------------


IDENTITY = "ab" * 32


def _checkpoint() -> bytes:
    tensors = {"weight/a": torch.ones(2, 3), "rng": torch.zeros(16, dtype=torch.uint8)}
    return _with_facts(tensors, json.dumps({"step": 1, "epoch": 1}))


def _with_facts(tensors: dict[str, Tensor], facts: str) -> bytes:
    parts = (part for name in sorted(tensors) for part in (name, tensors[name]))
    return save(tensors, {"identity": IDENTITY, "facts": facts, "digest": digest(facts, *parts)})


def _forged(content: bytes) -> bytes:
    """A checkpoint with these facts and the right digest."""
    return _with_facts({"rng": torch.zeros(4, dtype=torch.uint8)}, content.decode("utf-8", "replace").replace("\0", ""))


class _Entry(Cache):
    """A cache whose only entry is a file of any name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self._only = path

    def _path(self, key: str) -> Path:  # noqa: ARG002
        return self._only

    def write(self, key: str, tensors: Any) -> None:
        """Nothing: the entry stays what it is."""


def _entry() -> tuple[list[bytes], Callable[[Path], object]]:
    """Sound entries of the layer database, and what reads one, None where it is refused."""
    bench = _bench()
    layer = bench.graph.layers[1]
    h = {layer.name: torch.eye(4).reshape(1, 4, 4)}
    choices = (LayerChoice(3, 0.5), LayerChoice(8, 0.0, "asymmetric"), LayerChoice(16, 0.5))
    with tempfile.TemporaryDirectory() as folder:
        for choice in choices:
            LayerDatabase(bench.state, h, Cache(Path(folder))).solve(layer, choice)
        seeds = [path.read_bytes() for path in sorted(Path(folder).glob("level-*"))]

    def read(path: Path) -> object:
        database = LayerDatabase(bench.state, h, _Entry(path))
        return [database._read("level", layer, choice) for choice in choices]

    return seeds, read


def _torch(folder: Path, *values: object, legacy: bool = False) -> list[bytes]:
    found = []
    for value in values:
        torch.save(value, folder / "seed", _use_new_zipfile_serialization=not legacy)
        found.append((folder / "seed").read_bytes())
    return found


def _batches() -> list[bytes]:
    images, labels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), [1, 9]
    return [pickle.dumps({b"data": images, b"labels": labels}, protocol) for protocol in (2, 4)]


# --- all of them ----------------------------------------------------------------------------------------


def _filed(path: Path, read: Callable[[Path], object]) -> Read:
    """Reads bytes from a file."""

    def filed(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return filed


def _unreadable_is_none(content: bytes) -> object:
    """A policy from JSON, as the journal and artifacts hold it; what is no JSON never becomes one."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return Policy.from_json(data).key()


def _space(path: Path) -> object:
    space = Space(load_space(str(path)), GRAPH)
    return [space.encode(space.uniform(bits=bits)) for bits in BITS[:2]]


def _spaces() -> list[bytes]:
    files = Path(load_space.__globals__["__file__"]).parent / "search_spaces"
    own = b'[layers]\nbits = [2, 8]\nsparsity = [0.0, 0.5]\n[[override]]\nmatch = "conv*"\nbits = [8]\nkeep = [1.0]\n'
    return [own, *((files / f"{name}.toml").read_bytes() for name in shipped())]


def _predicted(path: Path) -> object:
    table = read_table(path)
    return [table.predict(GRAPH, Policy(keep={"conv1": keep}), a) for keep in (1.0, 0.5) for a in (8, 32)]


def _lessons() -> bytes:
    rows = [Lesson(Recovery(epochs=e), 0.1, -0.2).to_json() for e in (1, 2)]
    return json.dumps(rows).encode()


def _baselines(folder: Path) -> bytes:
    write_baselines(folder, [Baseline("uniform 8 bits", Measurement(1000, 200, 0.5)), Baseline("x", Measurement(1, 2))])
    return (folder / "baselines.json").read_bytes()


def _latency() -> bytes:
    return json.dumps(asdict(Latency(1.0, 0.9, 1.1, 5))).encode()


def readers(folder: Path) -> list[Reader]:
    """All of them; they write what they are given into `folder`."""
    _run(folder)
    small = {"a.weight": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    state = _torch(folder, small, {"state_dict": small})
    old = _torch(folder, small, legacy=True)
    entries, solve = _entry()
    packed = _packed()
    times = RememberedTimes(folder / "times")
    return [
        Reader("packed", packed, _built),
        Reader("packed, checksum right", [_opened(content) for content in packed], lambda c: _built(_closed(c))),
        Reader("onnx", [ABOUT.sealed(_network())], _filed(folder / "m.onnx", About.read)),
        Reader("onnx, checksum right", [_network()], _filed(folder / "m.onnx", _sealed)),
        Reader("policy", _policies(), _unreadable_is_none),
        Reader("journal", [(folder / FILE).read_bytes()], _journal_of(_copy(folder, "raw"))),
        Reader("journal, rows and facts", _rows(), _rows_of(_copy(folder, "rows"))),
        Reader("config", [_config()], _filed(folder / "config.json", lambda path: read_config(path.parent))),
        Reader("space", _spaces(), _filed(folder / "s.toml", _space)),
        Reader("latency table", [json.dumps(_table().to_json()).encode()], _filed(folder / "t.json", _predicted)),
        Reader("remembered latency", [_latency()], _remembered(folder / "times", times)),
        Reader("profile", [json.dumps(_facts()["profile"]).encode()], _filed(folder / "p.json", _read_profile)),
        Reader("lessons", [_lessons()], _filed(folder / "l.json", read_lessons)),
        Reader(
            "baselines", [_baselines(folder)], _filed(folder / "baselines.json", lambda p: read_baselines(p.parent))
        ),
        Reader("ablation", [_ablation()], _filed(folder / "ablation.json", _summarised)),
        Reader("training checkpoint", [_checkpoint()], _filed(folder / "c", lambda p: Checkpoint(p, IDENTITY).load())),
        Reader("training checkpoint, digest right", [b'{"step": 1, "epoch": 1}'], _facts_of(folder / "c")),
        Reader("layer solutions", entries, _filed(folder / "level", solve)),
        Reader("weights, .pt", [*state, *old], _filed(folder / "w.pt", read_checkpoint)),
        Reader("weights, .safetensors", [save(small)], _filed(folder / "w.safetensors", read_checkpoint)),
        Reader("CIFAR-10 batch", _batches(), _filed(folder / "data_batch_1", read_batch)),
    ]


def _policies() -> list[bytes]:
    some = Policy({"a": LayerChoice(4, 0.5)}, {"a": 0.5}, "l1", Recovery(epochs=2), "database", 8, ("a",))
    return [json.dumps(policy.to_json()).encode() for policy in (some, Policy())]


def _sealed(path: Path) -> object:
    path.write_bytes(ABOUT.sealed(path.read_bytes()))
    found, content = About.read(path)
    onnx.load_from_string(content)
    return found


def _facts_of(path: Path) -> Read:
    def read(content: bytes) -> object:
        path.write_bytes(_forged(content))
        return Checkpoint(path, IDENTITY).load()

    return read


def _remembered(folder: Path, times: RememberedTimes) -> Read:
    """What other processes left there is read again each time."""
    folder.mkdir(exist_ok=True)
    times("key", b"", lambda: Latency(1.0, 0.9, 1.1, 5))
    (path,) = folder.glob("*.json")

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return RememberedTimes(folder)("key", b"", lambda: Latency(2.0, 0.9, 1.1, 5))

    return read


def _copy(folder: Path, name: str) -> Path:
    """A folder beside with the same journal and config."""
    other = folder / name
    other.mkdir()
    for file in (FILE, "config.json"):
        (other / file).write_bytes((folder / file).read_bytes())
    return other
