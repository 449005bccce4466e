"""A file that was damaged or made to harm is refused with an error of the package, in bounded memory."""

from __future__ import annotations

import copy
import json
import math
import resource
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_workbench
from torch import nn

from autocompress import ArtifactError, AutocompressError, LayerChoice, Policy, compress
from autocompress.artifact import layout, packed
from autocompress.artifact.packed import Artifact, build, pack, unpack
from autocompress.measure.size import Size
from autocompress.stored import Half, Raw, Stored

MEGABYTE = 2**20


def _sound() -> tuple[bytes, nn.Module]:
    bench, model = tiny_workbench()
    policy = Policy({"conv": LayerChoice(3, 0.5), "body.0": LayerChoice(8, 0.5, "asymmetric"), "fc": LayerChoice(16)})
    compressed = compress(bench, policy)
    return pack(Size(bench.graph, "tiny", "accuracy").header(policy), compressed.tensors, 0.5, policy.key()), model


SOUND, MODEL = _sound()
HEADER = zlib.decompress(SOUND[36 : 36 + int.from_bytes(SOUND[16:20], "little")])
DATA: dict[str, Any] = json.loads(HEADER)
PAYLOAD = SOUND[36 + int.from_bytes(SOUND[16:20], "little") :]


def repaired(header: bytes, payload: bytes = b"", *, key: bytes = b"\0" * 8, quality: float = 0.5) -> bytes:
    """A file whose lengths and checksum are right whatever it holds."""
    deflated = zlib.compress(header, 9)
    rest = struct.pack("<QI8sd", 36 + len(deflated) + len(payload), len(deflated), key, quality) + deflated + payload
    return b"ACZ1" + struct.pack("<I", zlib.crc32(rest)) + rest


def with_header(payload: bytes = b"", **members: Any) -> bytes:
    empty = {"task": "t", "metric": "m", "graph": "g", "policy": {}, "folded": [], "tensors": [], "versions": {}}
    return repaired(json.dumps(empty | members).encode(), payload)


def outcome(content: bytes) -> Artifact | AutocompressError:
    """What reading and rebuilding gives; any other exception fails the test."""
    try:
        artifact = unpack(content)
        build(artifact, copy.deepcopy(MODEL))
    except AutocompressError as error:
        return error
    return artifact


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """The process may not grow by more than `size` bytes: an allocation beyond fails. No limit but on Linux."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_sound_file_is_read_and_rebuilt() -> None:
    found = outcome(SOUND)
    assert isinstance(found, Artifact)
    assert found.bytes == len(SOUND) < 1000


# --- damage ---------------------------------------------------------------------------------------------


def test_every_truncation_is_refused() -> None:
    for length in range(len(SOUND)):
        with pytest.raises(ArtifactError):
            unpack(SOUND[:length])


@pytest.mark.parametrize("extra", [b"\0", b"A", SOUND])
def test_anything_appended_is_refused(extra: bytes) -> None:
    with pytest.raises(ArtifactError, match="longer than it was written"):
        unpack(SOUND + extra)


def test_every_changed_byte_is_refused() -> None:
    for at in range(len(SOUND)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(SOUND)
            damaged[at] ^= flip
            with pytest.raises(ArtifactError):
                unpack(bytes(damaged))


def test_message_says_what_is_wrong_with_which_file() -> None:
    for content, words in (
        (b"", "m.acz is not an autocompress artifact"),
        (b"PK\3\4" + bytes(100), "m.acz is not an autocompress artifact"),
        (SOUND[:-1], "m.acz is cut short"),
        (SOUND[:-1] + bytes([SOUND[-1] ^ 1]), "m.acz is damaged"),
    ):
        with pytest.raises(ArtifactError, match=words):
            unpack(content, "m.acz")


# --- malice: lengths and checksum are right -------------------------------------------------------------

BIG = 2**40 - 1
WRONG_ROWS: dict[str, Any] = {
    "not a list": 7,
    "no shape": ["w", "h"],
    "too long": ["w", "h", [], 0, 0, 0, 0],
    "name is a number": [1, "h", [1]],
    "name is a list": [[], "h", [1]],
    "unknown kind": ["w", "x", [1]],
    "kind is a list": ["w", [], [1]],
    "unknown dtype": ["w", "r", [1], "float16"],
    "dtype with a dot": ["w", "r", [1], "__class__"],
    "dtype is a list": ["w", "r", [1], []],
    "dtype is an object": ["w", "r", [1], {}],
    "raw without dtype": ["w", "r", [1]],
    "raw with a count": ["w", "r", [1], "int8", 1],
    "shape is text": ["w", "h", "11"],
    "negative size": ["w", "h", [-1]],
    "two negative sizes": ["w", "h", [-1, -1]],
    "boolean size": ["w", "h", [True]],
    "float size": ["w", "h", [1.0]],
    "huge size": ["w", "h", [2**40]],
    "huge product": ["w", "h", [BIG] * 8],
    "nine dimensions": ["w", "h", [1] * 9],
    "nine bits": ["w", "q", [1], 9, 1],
    "zero bits": ["w", "q", [1], 0, 1],
    "negative bits": ["w", "q", [1], -1, 1],
    "bits as text": ["w", "q", [1], "4", 1],
    "bits as a list": ["w", "q", [1], [4], 1],
    "fractional bits": ["w", "q", [1], 4.5, 1],
    "symmetric is two": ["w", "q", [1], 4, 2],
    "quantised without dimensions": ["w", "q", [], 4, 1],
    "one bit and asymmetric": ["w", "q", [1], 1, 0],
    "stream without a length": ["w", "e", [1], 4, 1],
    "stream with two lengths": ["w", "e", [1], 4, 1, 2, 2],
    "stream of negative length": ["w", "e", [1], 4, 1, -1],
    "stream of boolean length": ["w", "e", [1], 4, 1, True],
    "stream of nine bits": ["w", "e", [1], 9, 1, 1],
    "stream of no bits": ["w", "e", [1], 0, 1, 1],
    "stream of one bit and asymmetric": ["w", "e", [1], 1, 0, 1],
    "stream without dimensions": ["w", "e", [], 4, 1, 1],
    "stream that is too short": ["w", "e", [1, 2**30], 4, 1, 60],
    "stream of nothing": ["w", "e", [1, 8], 4, 1, 0],
    "empty and huge, stream": ["w", "e", [0, BIG, BIG], 4, 1, 1],
    "bytes with a count": ["w", "b", [1], 1],
    "bytes of a huge size": ["w", "b", [2**40]],
    "empty and huge, bytes": ["w", "b", [0, BIG, BIG]],
    "halves with scales of a byte": ["w", "h8", [1]],
    "scales of a byte, without dimensions": ["w", "q8", [], 4, 1],
    "scales of a byte, stream without a length": ["w", "e8", [1], 4, 1],
    "count above the size": ["w", "h", [1], 2],
    "negative count": ["w", "h", [1], -1],
    "boolean count": ["w", "h", [1], True],
    "null count": ["w", "h", [1], None],
    "rows with nothing in them": ["w", "q", [BIG, 0], 4, 1],
    "empty and huge, half": ["w", "h", [0, BIG, BIG]],
    "empty and huge, half, bitmask": ["w", "h", [0, BIG, BIG], 0],
    "empty and huge, full": ["w", "f", [0, BIG, BIG]],
    "empty and huge, quantised": ["w", "q", [0, BIG, BIG], 4, 0],
    "empty and huge, raw": ["w", "r", [0, BIG, BIG, BIG], "int64"],
}


@pytest.mark.parametrize("row", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_row_that_no_writer_makes_is_refused(row: Any) -> None:
    for payload in (0, 2, 4, 64):
        with at_most(200 * MEGABYTE), pytest.raises(ArtifactError):
            unpack(with_header(bytes(payload), tensors=[row]))


@pytest.mark.parametrize("row", [["w", "q", [1, 8], True, True], ["w", "q", [1, 8], 1, 1], ["w", "q", [1, 2], 4.0, 1]])
def test_loose_grid_is_refused_or_read_without_harm(row: list[Any]) -> None:
    outcome(with_header(bytes(5), tensors=[row]))


WRONG_MEMBERS: dict[str, dict[str, Any]] = {
    "task is a number": {"task": 1},
    "metric is null": {"metric": None},
    "graph is a list": {"graph": []},
    "folded is text": {"folded": "bn"},
    "folded holds a number": {"folded": [1]},
    "tensors is an object": {"tensors": {}},
    "versions is a list": {"versions": []},
    "versions holds a number": {"versions": {"torch": 2}},
    "one member too many": {"code": "import os"},
    "one name twice": {"tensors": [["w", "f", [0]], ["w", "f", [0]]]},
    "policy is null": {"policy": None},
    "policy has an unknown member": {"policy": {"__class__": {}}},
    "keep is a list": {"policy": {"keep": []}},
    "keep is NaN": {"policy": {"keep": {"a": math.nan}}},
    "keep is a boolean": {"policy": {"keep": {"a": True}}},
    "keep has 400 digits": {"policy": {"keep": {"a": 10**400}}},
    "learning rate has 400 digits": {"policy": {"recovery": {"lr": 10**400}}},
    "learning rate is infinite": {"policy": {"recovery": {"lr": math.inf}}},
    "temperature is infinite": {"policy": {"recovery": {"temperature": math.inf}}},
    "hint weight is infinite": {"policy": {"recovery": {"hint_weight": math.inf}}},
    "epochs is a boolean": {"policy": {"recovery": {"epochs": True}}},
    "bits is 9": {"policy": {"layers": {"a": {"bits": 9}}}},
    "bits is a boolean": {"policy": {"layers": {"a": {"bits": True}}}},
    "sparsity is negative": {"policy": {"layers": {"a": {"sparsity": -0.5}}}},
    "criterion is a list": {"policy": {"criterion": []}},
    "scheme is null": {"policy": {"layers": {"a": {"scheme": None}}}},
}


@pytest.mark.parametrize("members", WRONG_MEMBERS.values(), ids=WRONG_MEMBERS)
def test_header_that_no_writer_makes_is_refused(members: dict[str, Any]) -> None:
    with pytest.raises(AutocompressError):
        unpack(with_header(**members))


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"task": NaN}', b"\x00" * 9, b"1" * 5000, b'{"a": "\\ud800"}'],
)
def test_header_that_is_not_an_object_of_ours_is_refused(header: bytes) -> None:
    with pytest.raises(ArtifactError):
        unpack(repaired(header))


def test_header_that_is_not_deflated_or_not_complete_is_refused() -> None:
    deflated = zlib.compress(HEADER)
    for part in (HEADER, deflated[:-1], deflated + b"\0", deflated + deflated, b""):
        rest = struct.pack("<QI8sd", 36 + len(part) + len(PAYLOAD), len(part), bytes(8), 0.5) + part + PAYLOAD
        with pytest.raises(ArtifactError):
            unpack(b"ACZ1" + struct.pack("<I", zlib.crc32(rest)) + rest)


@pytest.mark.parametrize("length", [0, 1, len(SOUND), 2**32 - 1])
def test_header_length_that_is_wrong_is_refused(length: int) -> None:
    rest = struct.pack("<QI8sd", len(SOUND), length, bytes(8), 0.5) + SOUND[36:]
    with pytest.raises(ArtifactError):
        unpack(b"ACZ1" + struct.pack("<I", zlib.crc32(rest)) + rest)


@pytest.mark.parametrize("place", ["task", "folded", "tensors", "row", "shape", "dtype", "policy", "keep", "sparsity"])
def test_nested_json_is_refused_at_every_depth(place: str) -> None:
    members: dict[str, Any] = {
        "row": {"tensors": ["@"]},
        "shape": {"tensors": [["w", "h", "@"]]},
        "dtype": {"tensors": [["w", "r", [1], "@"]]},
        "keep": {"policy": {"keep": {"a": "@"}}},
        "sparsity": {"policy": {"layers": {"a": {"sparsity": "@"}}}},
    }.get(place, {place: "@"})
    text = zlib.decompress(with_header(**members)[36:])
    for depth in (2, 100, *range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 10, 3), 100_000):
        with pytest.raises(AutocompressError):
            unpack(repaired(text.replace(b'"@"', b"[" * depth + b"]" * depth)))


def test_values_that_no_writer_makes_are_refused() -> None:
    for row, payload in (
        (["w", "h", [1]], struct.pack("<he", 0, math.inf)),
        (["w", "h", [1]], struct.pack("<he", 0, math.nan)),
        (["w", "h", [1]], struct.pack("<he", 161, 1.0)),
        (["w", "h", [1]], struct.pack("<he", -162, 1.0)),
        (["w", "f", [1]], struct.pack("<f", math.nan)),
        (["w", "q", [1, 1], 8, 1], struct.pack("<heB", 0, math.inf, 1)),
        (["w", "h", [8], 1], struct.pack("<hBe", 0, 0b11000000, 1.0)),
        (["w", "h", [8], 1], struct.pack("<hBe", 0, 0, 1.0)),
        (["w", "r", [1], "bool"], b"\2"),
        (["w", "e", [1, 8], 3, 1, 2], struct.pack("<he2B", 0, 1.0, 1, 0)),
        (["w", "e", [1, 8], 3, 1, 9], struct.pack("<he9B", 0, 1.0, *range(1, 10))),
        (["w", "e", [1, 8], 3, 0, 1], struct.pack("<he2B", 0, 1.0, 8, 1)),
    ):
        with pytest.raises(ArtifactError):
            unpack(with_header(payload, tensors=[row]))


# --- bombs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "unit"),
    [
        *(("task", unit) for unit in (b"[", b"{},", b'"a",', b"1.5,", b"\0", b" ", b'{"a":')),
        *((place, b"[],") for place in ("task", "tensors", "policy")),
    ],
)
def test_bomb_of_a_kilobyte_stays_below_200_megabytes(place: str, unit: bytes) -> None:
    text = zlib.decompress(with_header(**{place: "@"})[36:])
    content = repaired(text.replace(b'"@"', b"[" + unit * (900_000 // len(unit)) + b"0]"))
    assert len(content) < 6000
    with at_most(200 * MEGABYTE), pytest.raises(AutocompressError):
        unpack(content)


@pytest.mark.slow
def test_bomb_of_sixteen_kilobytes_stays_below_200_megabytes() -> None:
    text = zlib.decompress(with_header(task="@")[36:])
    content = repaired(text.replace(b'"@"', b"[" + b"[]," * 5_000_000 + b"0]"))
    assert len(content) < 16_000
    with at_most(200 * MEGABYTE), pytest.raises(AutocompressError):
        unpack(content)


def test_header_beyond_the_limit_is_refused_while_it_inflates() -> None:
    deflate = zlib.compressobj(9)
    part = b"".join([*(deflate.compress(bytes(MEGABYTE)) for _ in range(80)), deflate.flush()])
    rest = struct.pack("<QI8sd", 36 + len(part), len(part), bytes(8), 0.5) + part
    with at_most(200 * MEGABYTE), pytest.raises(ArtifactError, match="larger than it may be"):
        unpack(b"ACZ1" + struct.pack("<I", zlib.crc32(rest)) + rest)


@pytest.mark.parametrize(
    "row", [["q", [1, 2**13], 2, 1, 0], ["h", [2**13], 0], ["f", [2**13], 0], ["r", [1024], "int8"]]
)
def test_payload_of_a_kilobyte_stays_below_50_megabytes(row: list[Any]) -> None:
    payload = bytes({"q": 4, "h": 2, "f": 0, "r": 0}[row[0]] + 1024)
    with at_most(50 * MEGABYTE):
        assert unpack(with_header(payload, tensors=[["w", *row]])).tensors["w"].dense().abs().sum() == 0


def test_stream_of_a_kilobyte_stays_below_50_megabytes() -> None:
    payload = struct.pack("<he", 0, 1.0) + bytes(range(1, 256)) * 4
    for size in (2**10, 2**19, 2**20, 2**31, 2**39):
        with at_most(50 * MEGABYTE), pytest.raises(ArtifactError):
            unpack(with_header(payload, tensors=[["w", "e", [1, size], 8, 1, 1020]]))


# --- fuzzing --------------------------------------------------------------------------------------------

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from((0, 1, 2, 3, 4, 8, 9, 16, -1, 2**31, 2**39, 2**40, 2**63, 10**400))
    | st.sampled_from(("", "q", "h", "f", "r", "int8", "bool", "conv.weight", "conv.bias", "__class__.x"))
    | st.sampled_from(("weight/../../x", "conv", "bn", "body", "body.0", "fc", "bn.running_var", "fc.weight", "\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


PLACES = [place for place in places(DATA) if place]
ROWS = [place for place in PLACES if place[0] in ("tensors", "folded")]


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from(PLACES) | st.sampled_from(ROWS), JUNK), min_size=1, max_size=3),
    st.integers(-3, 3),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_mutated_headers_are_refused_or_read(changes: Sequence[tuple[tuple[Any, ...], Any]], longer: int) -> None:
    data = copy.deepcopy(DATA)
    for path, value in changes:
        target = data
        try:
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
        except (TypeError, KeyError, IndexError):  # an earlier change removed the place
            continue
    payload = PAYLOAD + bytes(longer) if longer >= 0 else PAYLOAD[:longer]
    with at_most(500 * MEGABYTE):
        outcome(repaired(json.dumps(data).encode(), payload))


@given(st.lists(st.tuples(st.integers(0, len(HEADER) - 1), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_mutated_header_bytes_are_refused_or_read(changes: list[tuple[int, int]]) -> None:
    header = bytearray(HEADER)
    for at, value in changes:
        header[at] = value
    with at_most(500 * MEGABYTE):
        outcome(repaired(bytes(header), PAYLOAD))


@given(st.lists(st.tuples(st.integers(0, len(PAYLOAD) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.floats())
@settings(max_examples=100, deadline=None, derandomize=True)
@example([(0, 255)], math.nan)
def test_mutated_payloads_are_refused_or_finite(changes: list[tuple[int, int]], quality: float) -> None:
    payload = bytearray(PAYLOAD)
    for at, value in changes:
        payload[at] = value
    found = outcome(repaired(HEADER, bytes(payload), quality=quality))
    if isinstance(found, Artifact):
        assert all(bool(torch.isfinite(stored.dense()).all()) for stored in found.tensors.values())
    else:
        assert isinstance(found, ArtifactError)


# --- tensors that do not belong to the model ------------------------------------------------------------

ARTIFACT = unpack(SOUND)
NAMES = list(ARTIFACT.tensors)


def rebuilt(*, without: str = "", folded: Sequence[str] = ("bn",), **tensors: Stored) -> nn.Module:
    kept = {name: stored for name, stored in ARTIFACT.tensors.items() if name != without}
    kept |= tensors
    header = replace(ARTIFACT.header, folded=tuple(folded))
    return build(replace(ARTIFACT, header=header, tensors=kept), copy.deepcopy(MODEL))


def half(*shape: int) -> Half:
    return Half(torch.ones(shape))


def test_unchanged_tensors_build_a_model_that_runs() -> None:
    assert rebuilt()(torch.zeros(2, 1, 5, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    "name", ["", "w", "conv", "conv.", ".weight", "conv.__class__", "weight/../../x", "fc.weight.data"]
)
def test_tensor_of_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="does not have"):
        rebuilt(**{name: half(1)})


@pytest.mark.parametrize("name", ["__class__.x", "bn.num_batches", "body.1.weight", "conv.in_channels", "training"])
def test_tensor_that_names_something_else_of_the_model_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"does not have|holds its tensors too"):
        rebuilt(**{name: half(1)})


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (4, 4), (3, 4, 1), (4, 3)])
def test_tensor_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="do not belong together"):
        rebuilt(**{"fc.weight": half(*shape)})


@pytest.mark.parametrize("shape", [(), (5,), (3,), (4, 1), (1000, 1000)])
def test_new_bias_that_does_not_fit_its_layer_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError):
        rebuilt(**{"conv.bias": half(*shape)})


def test_new_bias_of_integers_is_refused_or_runs() -> None:
    try:
        model = rebuilt(**{"conv.bias": Raw(torch.ones(4, dtype=torch.int64))})
    except ArtifactError:
        return
    assert model(torch.zeros(2, 1, 5, 5)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "conv.bias"])
def test_missing_tensor_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"lacks|belong"):
        rebuilt(without=name)


@pytest.mark.parametrize("folded", [(), ("nothing",), ("bn", "__class__"), ("bn", "conv"), ("bn", "body"), ("bn", "")])
def test_folded_names_that_are_not_the_models_batch_norms_are_refused(folded: tuple[str, ...]) -> None:
    with pytest.raises(ArtifactError):
        rebuilt(folded=folded)


def test_layer_that_is_folded_away_is_refused() -> None:
    kept = {name: stored for name, stored in ARTIFACT.tensors.items() if not name.startswith("fc.")}
    header = replace(ARTIFACT.header, folded=("bn", "fc"))
    with pytest.raises(ArtifactError):
        build(replace(ARTIFACT, header=header, tensors=kept), copy.deepcopy(MODEL))


@pytest.mark.parametrize(
    "tensors",
    [
        {"body.0.weight": half(4, 0, 1, 1)},
        {"conv.weight": half(0, 1, 3, 3), "conv.bias": half(0)},
        {"fc.weight": half(3, 0)},
        {"conv.weight": half(4, 0, 3, 3)},
        {"body.0.weight": half(0, 0, 1, 1), "body.0.bias": half(0)},
    ],
)
def test_layers_without_channels_between_others_are_refused_or_do_not_run(tensors: dict[str, Stored]) -> None:
    try:
        model = rebuilt(**tensors)
    except ArtifactError:
        return
    with pytest.raises(RuntimeError, match=r"channels|shapes"):
        model(torch.zeros(2, 1, 5, 5))


def test_refused_file_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {**ARTIFACT.tensors, "fc.weight": half(9, 9)}
    with pytest.raises(ArtifactError):
        build(replace(ARTIFACT, tensors=tensors), model)
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("written", [-2 * 115, 2 * 150, -2 * 113, 1 - 2 * 114, 2**15 - 1, -(2**15)])
def test_bytes_whose_exponent_leaves_single_precision_are_refused(written: int) -> None:
    """255 and -128 squared are beyond float32 with exponents that 254 and -127 are not."""
    entry = layout.Entry("w", "byte", (2,), 8, count=2)
    with pytest.raises(ArtifactError, match=r"not finite|impossible exponent"):
        packed.read_section(entry, memoryview(struct.pack("<h", written) + bytes([255, 128])))
