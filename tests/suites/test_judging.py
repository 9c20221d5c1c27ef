"""Verdicts as judges write them, and as they should not."""

from __future__ import annotations

import math

import pytest

from megatron_aligndistil.suites.judging import choice, label, letter_probability, rating


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[5]]", 5),
        ("[[7.5]] because", 7.5),
        ("first [[3]], no, [[9]]", 3),
        ("[[11]]", None),
        ("[[0]]", None),
        ("Rating: [5]", None),
        ("Rating: 5", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_rating(text: str, expected: float | None) -> None:
    assert rating(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My final verdict is: [[A>>B]]", (1, 3)),
        ("[[A>B]]", (1, 1)),
        ("[[a=b]]", (0.5, 1)),
        ("[[B>A]] or rather [[B>>A]]", (0, 3)),
        ("[[A<<B]]", (0, 3)),
        ("verdict [A>B]", (1, 1)),
        ("[[A]] [B>A]", None),
        ("[[A>>>B]]", None),
        ("A>>B", None),
        ("", None),
    ],
)
def test_label(text: str, expected: tuple[float, int] | None) -> None:
    assert label(text) == expected


def test_choice() -> None:
    assert [choice(text) for text in ("[[A]]", "[[A]] [[B]]", "so [[C]]", "[[D]]", "A")] == [1, 0, 0.5, None, None]


def test_letter_probability() -> None:
    both = {"m": math.log(0.2), "M": math.log(0.6), "x": math.log(0.2)}
    assert letter_probability(both, "m", "M") == pytest.approx(0.25)
    assert letter_probability({"M": -0.1, "x": -3.0}, "m", "M") == 0
    assert letter_probability({"m": -900.0, "M": -900.0 - math.log(3)}, "m", "M") == pytest.approx(0.75)
    assert [letter_probability(each, "m", "M") for each in ({"x": -1.0}, {}, None, {"m": -math.inf})] == [None] * 4
