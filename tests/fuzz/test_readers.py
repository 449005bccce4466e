"""Whatever bytes a file holds, its reader gives a value or an error of the package, in bounded time and memory."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.mutate import mutated
from fuzz.readers import Broken, Judge, Reader, readers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import autocompress
from autocompress.errors import SpaceError, TaskError
from autocompress.space import parse_space
from autocompress.tasks.cifar10 import read_batch

NAMES = (
    "packed",
    "packed, checksum right",
    "onnx",
    "onnx, checksum right",
    "policy",
    "journal",
    "journal, rows and facts",
    "config",
    "space",
    "latency table",
    "remembered latency",
    "profile",
    "lessons",
    "baselines",
    "ablation",
    "training checkpoint",
    "training checkpoint, digest right",
    "layer solutions",
    "weights, .pt",
    "weights, .safetensors",
    "CIFAR-10 batch",
)
LATE = ("journal, rows and facts",)
"""Left to the whole run: it takes seven seconds, all others together as long."""
INPUTS = 10_000


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers(tmp_path_factory.mktemp("readers"))}


def test_all_readers_are_here(known: dict[str, Reader]) -> None:
    assert tuple(known) == NAMES


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LATE else ()) for x in NAMES])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(draw=st.randoms(use_true_random=False), junk=st.none() | st.binary(max_size=200))
def test_any_bytes_give_a_value_or_an_error_of_ours(
    known: dict[str, Reader], name: str, draw: random.Random, junk: bytes | None
) -> None:
    reader = known[name]
    Judge(reader)(mutated(draw, reader.seeds) if junk is None else junk)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_nearly_sound_files(known: dict[str, Reader], name: str) -> None:
    reader, draw = known[name], random.Random(name)
    judge = Judge(reader)
    for _ in range(INPUTS):
        judge(mutated(draw, reader.seeds))
    assert judge.read + judge.refused == INPUTS


def test_what_takes_too_much_memory_breaks_the_judge() -> None:
    held = []
    judge = Judge(Reader("greedy", [b""], lambda content: held.append(bytearray(len(content) and 2**30))))
    with pytest.raises(Broken, match="grew by"):
        judge(b"x")


@pytest.mark.slow
def test_what_never_ends_breaks_the_judge() -> None:
    judge = Judge(Reader("slow", [b""], lambda content: sum(range(10**8 if content else 1))))
    with pytest.raises(Broken, match="took"):
        judge(b"x")


def test_what_is_no_error_of_the_package_gets_through_the_judge() -> None:
    judge = Judge(Reader("loud", [b"1"], lambda content: int(content)))
    with pytest.raises(ValueError, match="invalid literal"):
        judge(b"x")


# --- found by fuzzing -----------------------------------------------------------------------------------


def test_journal_does_not_name_files_outside_its_folder(known: dict[str, Reader]) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "artifacts/../x.acz", "artifacts/trial-0.acz\n", "trial-0.acz"):
        judge = Judge(known["journal, rows and facts"])
        judge(b'{"artifact": %s}' % repr(name).replace("'", '"').encode())
        assert (judge.read, judge.refused) == (0, 1), name


@pytest.mark.parametrize("key", ["channels]\nmultiple_of", "recovery]\nadjust_patience", "recovery]\nadjust_cooldown"])
def test_whole_numbers_of_a_space_have_an_end(key: str) -> None:
    number = str(10**400) if "multiple" in key else f"[{10**400}]"
    with pytest.raises(SpaceError, match="less than"):
        parse_space(f"[{key} = {number}\n", "s.toml")


def test_array_that_a_batch_only_names_is_not_allocated(tmp_path: Path) -> None:
    """`ndarray((2**40,), 'u1')` as a pickle: a few bytes that ask for a terabyte."""
    path = tmp_path / "data_batch_1"
    for maker in (b"cnumpy\nndarray\n(L1099511627776L\nt", b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"):
        for end in (b"R.", b"(L1099511627776L\ntVb\ntR."):
            path.write_bytes(maker + end)
            with pytest.raises(TaskError, match="is not a CIFAR-10 batch"):
                read_batch(path)


def test_lists_that_repeat_one_another_are_not_spread_out(tmp_path: Path) -> None:
    """Ten lists, each ten times the one before: ten billion numbers in a few hundred bytes."""
    parts = [b"(dS'data'\n(lp0\nI1\na"]
    parts += [b"(lp%d\n" % (i + 1) + b"g%d\na" % i * 10 for i in range(10)]
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"".join(parts) + b"sS'labels'\n(lI1\nas.")
    with pytest.raises(TaskError, match="is not a CIFAR-10 batch"):
        read_batch(path)


@pytest.mark.parametrize("remembers", [b"r\xff\xff\xff\x0f", b"p268435455\n"])
def test_table_of_what_a_batch_remembers_is_not_larger_than_the_batch(tmp_path: Path, remembers: bytes) -> None:
    """An index of 2**28 into the unpickler's table, which would take 4 GiB."""
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02}" + remembers + b".")
    with pytest.raises(TaskError, match="it remembers 268435455 values"):
        read_batch(path)


def test_schema_that_cannot_be_quoted_is_damage(known: dict[str, Reader]) -> None:
    content = next(iter(known["journal"].seeds))
    judge = Judge(known["journal"])
    at = content.index(b"CREATE TABLE trials")
    judge(content[: at + 13] + b"\xcb" + content[at + 14 :])
    assert judge.refused == 1


def test_row_that_announces_more_than_it_has_is_damage(known: dict[str, Reader]) -> None:
    """Python's sqlite3 raises `MemoryError` of some of these."""
    content = next(iter(known["journal"].seeds))
    judge = Judge(known["journal"])
    for at in range(4096, 8192, 4):
        judge(content[:at] + bytes([255] * 8) + content[at + 8 :])
    assert judge.refused > 0
    assert judge.read > 0


# --- nothing from a file is executed --------------------------------------------------------------------


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in sorted(Path(autocompress.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node


def test_nothing_unpickles_or_evaluates() -> None:
    banned = {"eval", "exec", "pickle.load", "pickle.loads", "np.load", "joblib.load", "yaml.load", "marshal.loads"}
    for path, node in calls():
        name = ast.unparse(node.func)
        assert name not in banned, f"{path}:{node.lineno}"
        if name == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
