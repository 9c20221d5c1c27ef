"""Text from tokens that come one at a time: nothing broken, nothing of a stop string, and all of it in the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from megatron_aligndistil.commands.http.text import Detokeniser, StopStrings
from megatron_aligndistil.data.tokenizer import load_tokenizer, special_ids, to_text

TEXTS = [
    "Once upon a time, there was a little girl.",
    "naïve café — 東京 🙂🙃👩‍👩‍👧",
    "  two spaces,\n\na new line\tand more  ",
    "🙂🙂",
]


@pytest.fixture(scope="module", params=["stories260K/hf", "qwen_tokenizer"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path):
    """One that writes unknown characters as byte tokens, and one whose tokens are bytes."""
    return load_tokenizer(shared_data / request.param)


def pieces(to_text: Callable[[Sequence[int]], str], prompt: list[int], tokens: list[int]) -> list[str]:
    detokeniser = Detokeniser(to_text, prompt)
    return [detokeniser.add(token) for token in tokens]


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_pieces_are_one_text(tokenizer, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    as_text = partial(to_text, tokenizer)
    whole = as_text(tokens)
    for cut in range(len(tokens) + 1):
        before = as_text(tokens[:cut])
        if before.endswith("\ufffd"):
            continue  # a prompt that ends in the middle of a character
        found = "".join(pieces(as_text, tokens[:cut], tokens[cut:]))
        assert before + found == whole and "\ufffd" not in found


def test_an_unfinished_character_is_held_back(tokenizer) -> None:
    tokens = tokenizer("a 🙂", add_special_tokens=False)["input_ids"]
    found = pieces(partial(to_text, tokenizer), [], tokens[:-1])
    assert "".join(found).strip() == "a"


def test_tokens_without_text_change_nothing(tokenizer) -> None:
    """Special tokens in the middle, as a model may draw them."""
    tokens = tokenizer("one two", add_special_tokens=False)["input_ids"]
    as_text = partial(to_text, tokenizer)
    special = max(special_ids(tokenizer))
    mixed = [special, *(each for token in tokens for each in (token, special))]
    assert "".join(pieces(as_text, [], mixed)) == "".join(pieces(as_text, [], tokens)) == as_text(tokens)


def test_a_long_text_of_random_words(tokenizer) -> None:
    """Words in any order."""
    draw = random.Random(0)
    as_text = partial(to_text, tokenizer)
    words = [token for token in range(300, 500) if as_text([token]).isascii()]
    tokens = [draw.choice(words) for _ in range(300)]
    assert "".join(pieces(as_text, [], tokens)) == as_text(tokens)


def given_out(stops: Sequence[str], parts: Sequence[str]) -> tuple[list[str], bool]:
    strings = StopStrings(stops)
    found = []
    for part in parts:
        found.append(strings.add(part))
        if strings.met:
            return found, True
    return [*found, strings.rest()], False


@pytest.mark.parametrize(
    ("stops", "parts", "expected", "met"),
    [
        (["END"], ["a E", "N", "D b"], ["a ", "", ""], True),
        (["END"], ["a E", "N", "x"], ["a ", "", "ENx", ""], False),
        (["END"], ["a EN"], ["a ", "EN"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["b", "ab"], ["xab"], ["x"], True),  # the one that begins first
        (["\n\n", "Q:"], ["one\n", "two\n", "\nQ:"], ["one", "\ntwo", ""], True),
        (["."], ["."], [""], True),
        ([], ["a", "b"], ["a", "b", ""], False),
    ],
)
def test_stop_strings(stops: list[str], parts: list[str], expected: list[str], met: bool) -> None:
    assert given_out(stops, parts) == (expected, met)


def test_a_stop_string_however_the_text_is_cut() -> None:
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice("ab") for _ in range(12))
        stops = ["".join(draw.choice("ab") for _ in range(draw.randint(1, 5))) for _ in range(draw.randint(1, 2))]
        parts = list(text)
        found, met = given_out(stops, parts)
        # The stop string that is complete first, and of those the one that begins first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        first = min(end for end, _ in ends) if ends else None
        expected = text if first is None else text[: min(start for end, start in ends if end == first)]
        assert ("".join(found), met) == (expected, bool(ends))
