"""Quantities: the same values as in Kubernetes, and the same refusals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shim.errors import RequestError
from shim.request import quantity

ACCEPTED = {
    "0": 0,
    "00": 0,
    "1": 1,
    "007": 7,
    "+1": 1,
    "1.0": 1,
    "1.": 1,
    ".5": 1,
    "0.1": 1,
    "1.5": 2,
    "2.0000000001": 3,
    "0.0": 0,
    "1n": 1,
    "1u": 1,
    "1m": 1,
    "1000m": 1,
    "1001m": 2,
    "0m": 0,
    "1k": 1000,
    "1M": 10**6,
    "1G": 10**9,
    "1T": 10**12,
    "1P": 10**15,
    "1E": 10**18,
    "1Ki": 1 << 10,
    "1Mi": 1 << 20,
    "1Gi": 1 << 30,
    "1Ti": 1 << 40,
    "1Pi": 1 << 50,
    "1Ei": 1 << 60,
    "1.5Gi": 3 << 29,
    "0.5Ki": 512,
    "0.1Ki": 103,
    "1e3": 1000,
    "1E3": 1000,
    "1e+3": 1000,
    "1e-3": 1,
    "12e0": 12,
    "1.5e1": 15,
    "0e9": 0,
    "5e-1": 1,
    "1e18": 10**18,
    "9223372036854775807": quantity.MAX,
    "9223372036854775807000m": quantity.MAX,
    "7.999999999999999999Ei": None,
    "1e9999": None,
    "1e-9999": None,
    "9223372036854775806.1": quantity.MAX,
}
del ACCEPTED["7.999999999999999999Ei"], ACCEPTED["1e9999"], ACCEPTED["1e-9999"]
REFUSED = [
    "",
    " ",
    " 1",
    "1 ",
    "1\n",
    "a",
    "1a",
    "1i",
    "1mi",
    "1ki",
    "1KI",
    "1kI",
    "1Kib",
    "1KiB",
    "1B",
    "1b",
    "1 Gi",
    "Gi",
    "m",
    ".",
    "+",
    "+.",
    "1.1.1",
    "1.1.M",
    "1,5",
    "1_000",
    "0x10",
    "1e",
    "1e+",
    "1e1.5",
    "1e3Ki",
    "1e3m",
    "1ee3",
    "1e3e3",
    "1e+-3",
    "1e-+3",
    "1e++3",
    "1Ki1",
    "1+1",
    "1-1",
    "1+1.0M",
    "0.1mi",
    "0.1am",
    "aoeu",
    ".5i",
    "-",
    "inf",
    "Infinity",
    "nan",
    "NaN",
    "\u0661",
    "1\u0662",
    "1e\u0663",
    "\u00b2",
    "1\u00b2",
    "1e\u00b2",
    "1\u00bd",
    "\uff11",
    "1\0",
    "\ud800",
    "1" * 65,
    "1e12345",
    "++1",
    "+-1",
    "-+1",
]
NEGATIVE = ["-1", "-0.1", "-1Gi", "-1e3", "-1m", "-5.5Ki"]
TOO_LARGE = [
    "9223372036854775808",
    "8Ei",
    "10E",
    "1e19",
    "9223372036854775807001m",
    "1" * 64,
    "1e999",
    "9999999999999999Gi",
    "9223372036854775807.1",
]


@pytest.mark.parametrize(("text", "value"), ACCEPTED.items())
def test_accepted(text: str, value: int) -> None:
    assert quantity.scaled(text) == value


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no quantity|is negative"):
        quantity.scaled(text)


@pytest.mark.parametrize("text", NEGATIVE)
def test_negative(text: str) -> None:
    with pytest.raises(RequestError, match="is negative"):
        quantity.scaled(text)


@pytest.mark.parametrize("text", TOO_LARGE)
def test_overflow(text: str) -> None:
    with pytest.raises(RequestError, match="is too large"):
        quantity.scaled(text)


@pytest.mark.parametrize(
    ("text", "thousandths"),
    [
        ("1", 1000),
        ("500m", 500),
        ("0.5", 500),
        ("0.0001", 1),
        ("1500u", 2),
        ("1e-3", 1),
        ("2.5", 2500),
        (".001", 1),
        ("1n", 1),
    ],
)
def test_scale(text: str, thousandths: int) -> None:
    assert quantity.scaled(text, 1000) == thousandths


def test_scale_counts_for_overflow() -> None:
    assert quantity.scaled("9223372036854775", 1000) == 9223372036854775000
    with pytest.raises(RequestError, match="is too large"):
        quantity.scaled("9223372036854776", 1000)


SUFFIXES = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "": Fraction(1),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "E": Fraction(10**18),
    "Ki": Fraction(1 << 10),
    "Mi": Fraction(1 << 20),
    "Gi": Fraction(1 << 30),
    "Ti": Fraction(1 << 40),
    "Pi": Fraction(1 << 50),
    "Ei": Fraction(1 << 60),
}
digits = st.text("0123456789", min_size=1, max_size=22)


def agree(text: str, exact: Fraction, scale: int) -> None:
    expected = -(-exact * scale // 1)  # rounded up
    if expected > quantity.MAX:
        with pytest.raises(RequestError, match="is too large"):
            quantity.scaled(text, scale)
    else:
        assert quantity.scaled(text, scale) == expected


@given(
    digits,
    st.one_of(st.none(), digits),
    st.sampled_from(list(SUFFIXES)),
    st.sampled_from([1, 1000]),
    st.sampled_from(["", "+"]),
)
@example("0", "1", "n", 1, "")
def test_suffixes_are_exact(whole: str, fraction: str | None, suffix: str, scale: int, sign: str) -> None:
    number = whole if fraction is None else f"{whole}.{fraction}"
    agree(sign + number + suffix, Fraction(number) * SUFFIXES[suffix], scale)


@given(digits, digits, st.integers(-99, 99), st.sampled_from("eE"), st.booleans(), st.sampled_from([1, 1000]))
def test_exponents_are_exact(whole: str, fraction: str, exponent: int, letter: str, plus: bool, scale: int) -> None:
    sign = "+" if plus and exponent >= 0 else ""
    agree(f"{whole}.{fraction}{letter}{sign}{exponent}", Fraction(f"{whole}.{fraction}e{exponent}"), scale)


@given(st.text("0123456789.+-eEnumkKMGTPi \u0661\u00b2", max_size=12))
def test_any_text_gives_a_number_or_a_request_error(text: str) -> None:
    try:
        value = quantity.scaled(text)
    except RequestError:
        return
    assert type(value) is int and 0 <= value <= quantity.MAX
