import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import BudgetError
from autocompress.policy import LayerChoice, Policy
from autocompress.trial import Budget, Curve, Evaluation, Limit, Measurement

DENSE = Measurement(bytes=4_000_000, macs=1_000_000, quality=0.9, loss=0.0, latency_ms=20.0)


# --- reading a limit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "quantity", "amount"),
    [
        ("4MB", "bytes", 4e6),
        ("4 MB", "bytes", 4e6),
        ("  4mb  ", "bytes", 4e6),
        ("+4MB", "bytes", 4e6),
        ("0.5MB", "bytes", 5e5),
        (".5MB", "bytes", 5e5),
        ("4e6B", "bytes", 4e6),
        ("1e-3 GB", "bytes", 1e6),
        ("900kB", "bytes", 9e5),
        ("1GB", "bytes", 1e9),
        ("900KiB", "bytes", 900 * 1024),
        ("4MiB", "bytes", 4 * 1024**2),
        ("1GiB", "bytes", 1024**3),
        ("12b", "bytes", 12),
        ("size=4MB", "bytes", 4e6),
        ("5ms", "ms", 5.0),
        ("800us", "ms", 0.8),
        ("800µs", "ms", 0.8),
        ("2s", "ms", 2000.0),
        ("latency=5ms", "ms", 5.0),
        ("20MMACs", "macs", 2e7),
        ("20kmacs", "macs", 2e4),
        ("1GMACs", "macs", 1e9),
        ("300 MACs", "macs", 300),
        ("macs = 20 MMACs", "macs", 2e7),
    ],
)
def test_amounts_are_read_in_every_unit(text: str, quantity: str, amount: float) -> None:
    limit = Limit.parse(text)
    assert (limit.quantity, limit.share) == (quantity, False)
    assert limit.amount == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "quantity", "amount"),
    [
        ("size=25%", "bytes", 0.25),
        ("SIZE = 25 %", "bytes", 0.25),
        ("latency=40%", "ms", 0.4),
        ("macs=50%", "macs", 0.5),
        ("size=0.5%", "bytes", 0.005),
        ("size=120%", "bytes", 1.2),
    ],
)
def test_shares_are_of_the_dense_model(text: str, quantity: str, amount: float) -> None:
    assert Limit.parse(text) == Limit(quantity, amount, share=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "4",
        "4.5",
        "MB",
        "%",
        "5%",
        "=5%",
        "4 bananas",
        "4MBs",
        "4M",
        "-1MB",
        "0MB",
        "0%",
        "size=0%",
        "size=-5%",
        "nan MB",
        "inf MB",
        "1e999MB",
        "1e308GB",
        "1e-400MB",
        "1.2.3MB",
        ".MB",
        "..%",
        "size=5ms",
        "latency=4MB",
        "macs=4MB",
        "size=",
        "size",
        "speed=5%",
        "size=25",
        "size==25%",
        "4MB 5ms",
        "4MB,5ms",
        "4MB\n5ms",
        "1_000MB",
        "4,5MB",
        "0x10MB",
        "4\x00MB",
        "9" * 400 + "MB",
    ],
)
def test_anything_else_is_refused_with_the_ways_to_write_it(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Limit.parse(text)
    assert "use bytes (4MB, 900KiB), time (5ms, 800us) or a share" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12) | st.from_regex(r"(size=)?[-+0-9.e]{0,6} ?[%a-zA-Zµ]{0,4}", fullmatch=True))
def test_any_text_is_a_positive_limit_or_an_error_of_ours(text: str) -> None:
    try:
        limit = Limit.parse(text)
    except BudgetError:
        return
    assert math.isfinite(limit.amount)
    assert limit.amount > 0


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e6), st.sampled_from(["B", "kB", "MB", "KiB", "MiB", "ms", "us", "s", "MACs", "MMACs"]))
def test_a_written_number_is_read_as_itself(number: float, unit: str) -> None:
    one, two = Limit.parse(f"{number!r}{unit}"), Limit.parse(f"1{unit}")
    assert one.quantity == two.quantity
    assert one.amount == pytest.approx(number * two.amount)


@pytest.mark.parametrize("amount", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_is_a_positive_amount(amount: float) -> None:
    with pytest.raises(BudgetError, match="must be a positive amount"):
        Limit("bytes", amount)


# --- budgets --------------------------------------------------------------------------------------------------


def budget(*texts: str) -> Budget:
    return Budget.resolve([Limit.parse(text) for text in texts], DENSE)


def test_limits_become_amounts_of_the_dense_model() -> None:
    assert budget("size=25%", "latency=40%", "macs=50%") == Budget(bytes=1_000_000, ms=8.0, macs=500_000)
    assert budget("100kB") == Budget(bytes=100_000)
    assert budget() == Budget()


def test_of_several_limits_the_tightest_holds() -> None:
    assert budget("2MB", "size=25%", "1MiB").bytes == 1_000_000
    assert budget("size=25%", "10kB").bytes == 10_000
    assert budget("10kB", "size=25%").bytes == 10_000
    assert budget("5ms", "latency=10%", "1s").ms == 2.0
    assert budget("1MMACs", "macs=10%", "2kMACs").macs == 2_000


def test_parts_of_a_byte_are_not_granted() -> None:
    assert budget("10.9B").bytes == 10
    assert budget("macs=0.00015%").macs == 1


def test_a_limit_below_one_byte_is_handled() -> None:
    assert budget("0.5B").excess(Measurement(100, 100)) > 0
    assert budget("size=0.00001%").excess(Measurement(100, 100)) > 0


def test_a_share_of_nothing_is_handled() -> None:
    """A bag of embeddings multiplies nothing."""
    limits = [Limit.parse("macs=50%")]
    assert Budget.resolve(limits, Measurement(bytes=100, macs=0)).excess(Measurement(100, 0)) <= 0


def test_excess_is_the_largest_share_over_a_limit() -> None:
    limit = Budget(bytes=1000, ms=10.0, macs=500)
    assert limit.excess(Measurement(1500, 500, latency_ms=10.0)) == pytest.approx(0.5)
    assert limit.excess(Measurement(1000, 400, latency_ms=12.0)) == pytest.approx(0.2)
    assert limit.excess(Measurement(500, 1500, latency_ms=1.0)) == pytest.approx(2.0)


def test_exactly_at_the_limit_fits() -> None:
    assert Budget(bytes=1000, ms=10.0, macs=500).excess(Measurement(1000, 500, latency_ms=10.0)) == 0
    assert Budget(bytes=1000).excess(Measurement(999, 500)) < 0
    assert Budget(bytes=1000).excess(Measurement(1001, 500)) > 0


def test_without_limits_everything_fits() -> None:
    assert Budget().excess(Measurement(10**12, 10**12)) < 0


def test_a_missing_latency_does_not_fit_a_latency_limit() -> None:
    assert Budget(ms=10.0).excess(Measurement(1, 1)) == math.inf
    assert Budget(bytes=10, ms=10.0).excess(Measurement(1, 1)) == math.inf
    assert Budget(bytes=10).excess(Measurement(1, 1)) < 0


def test_the_static_part_needs_no_measuring() -> None:
    assert Budget(bytes=10, ms=1.0, macs=5).static() == Budget(bytes=10, macs=5)
    assert Budget(ms=1.0).static().excess(Measurement(1, 1)) < 0


def test_a_budget_reads_well() -> None:
    assert str(Budget(bytes=1_000_000, ms=8.0, macs=500_000)) == "1,000,000 bytes and 8 ms and 500,000 MACs"
    assert str(Budget(ms=0.25)) == "0.25 ms"
    assert str(Budget()) == "no budget"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["4MB", "900kB", "size=25%", "5ms", "latency=40%", "2MMACs", "macs=5%"]), max_size=6),
    st.randoms(),
)
def test_the_order_of_limits_does_not_matter(texts: list[str], random: object) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert budget(*texts) == budget(*shuffled)


# --- evaluations ------------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.just(math.nan)
COUNTS = st.integers(0, 2**63 - 1)
EVALUATIONS = st.builds(
    Evaluation,
    policy=st.just(Policy({"a": LayerChoice(4)})),
    seed=st.integers(0, 2**31),
    rung=st.integers(0, 3),
    status=st.sampled_from(["ok", "infeasible", "failed"]),
    measurement=st.none()
    | st.builds(Measurement, bytes=COUNTS, macs=COUNTS, quality=NUMBERS, loss=NUMBERS, latency_ms=NUMBERS),
    error=st.text(max_size=20),
    seconds=st.floats(0, 1e6),
    copy_of=st.none() | st.integers(0),
)


@settings(max_examples=60, deadline=None)
@given(EVALUATIONS)
def test_an_evaluation_survives_strict_json(evaluation: Evaluation) -> None:
    text = json.dumps(evaluation.to_json(), allow_nan=False)
    again = Evaluation.from_json(evaluation.policy, json.loads(text))
    assert repr(again) == repr(evaluation)  # NaN does not equal itself


def test_what_was_not_measured_is_null() -> None:
    data = Evaluation(Policy(), 0, 0, "infeasible", Measurement(10, 20)).to_json()
    unknown = dict.fromkeys(("quality", "loss", "latency_ms", "predicted_ms", "predicted_bytes", "teacher_loss"))
    assert data["measurement"] == {"bytes": 10, "macs": 20, **unknown}
    assert "policy" not in data


def test_a_failed_evaluation_keeps_its_traceback() -> None:
    failed = Evaluation(Policy(), 0, 1, "failed", error="Traceback\n  line", seconds=1.5)
    assert Evaluation.from_json(Policy(), json.loads(json.dumps(failed.to_json()))) == failed
    assert failed.to_json()["measurement"] is None


def test_a_curve_survives_the_journal_and_others_do_not_name_one() -> None:
    curve = Curve((5, 10), (1.25, 0.5), (0.1, 0.01), ((5, 0.75),))
    trained = Evaluation(Policy(), 0, 1, "ok", Measurement(1, 2), curve=curve)
    assert Evaluation.from_json(Policy(), json.loads(json.dumps(trained.to_json()))).curve == curve
    assert "curve" not in replace(trained, curve=None).to_json()


@pytest.mark.parametrize("count", [-1, 2**63, 10**400, True, 1.0, "1", None])
def test_a_measurement_of_an_impossible_size_is_refused(count: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Measurement.from_json({"bytes": count, "macs": 1})
