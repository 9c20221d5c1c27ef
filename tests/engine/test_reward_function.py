"""Reward functions: how they are found, how they are called, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from megatron_aligndistil.engine.reward_function import load_reward_function, rate
from megatron_aligndistil.errors import ConfigError

PROMPTS, COMPLETIONS = ["one", "two"], ["a b", "a b c"]

SOURCE = """
    from dataclasses import dataclass

    import numpy
    import torch

    from lexicon_beside_it import BASE

    @dataclass
    class Rater:  # dataclasses look their module up
        base: float

        def __call__(self, prompts, completions):
            assert (prompts, completions) == (["one", "two"], ["a b", "a b c"])
            return [self.base + len(text) for text in completions]

    callable_object = Rater(BASE)

    def any_keywords(completions, **kwargs):
        assert set(kwargs) == {"prompts"}
        return numpy.array([len(text) for text in completions], dtype=numpy.float32)

    def tensor(prompts, completions):
        return torch.tensor([1, 2])

    def generator(prompts, completions):
        return (True for _ in prompts)

    def too_few(prompts, completions): return [1.0]
    def one_number(prompts, completions): return 1.0
    def nothing(prompts, completions): pass
    def text(prompts, completions): return "12"
    def texts(prompts, completions): return ["1", "2"]
    def not_applicable(prompts, completions): return [1.0, None]
    def not_finite(prompts, completions): return [1.0, float("nan")]
    def raises(prompts, completions): return [1 / 0]
    def other_keywords(texts): return [0.0 for _ in texts]
    number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "lexicon_beside_it.py").write_text("BASE = 0.5\n")
    (folder / "rewards.py").write_text(dedent(SOURCE))
    (folder / "broken.py").write_text("x = 1\nimport a_module_that_is_not_there\n")
    return folder / "rewards.py"


@pytest.mark.parametrize(
    ("function", "expected"),
    [("callable_object", [3.5, 5.5]), ("any_keywords", [3, 5]), ("tensor", [1, 2]), ("generator", [1, 1])],
)
def test_numbers_come_back(file: Path, function: str, expected: list[float]) -> None:
    found = rate(f"{file}:{function}", PROMPTS, COMPLETIONS)
    assert found == expected
    assert [type(number) for number in found] == [float, float]


def test_a_module_on_the_path() -> None:
    from examples.demo import reward

    assert load_reward_function("examples.demo.reward:words") is reward.words


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_few", "returned a list of 1 for 2 completions; it has to return a list with one number each"),
        ("one_number", "returned float for 2 completions"),
        ("nothing", "returned NoneType for 2 completions"),
        ("text", "returned str for 2 completions"),
        ("texts", "returned '1' for completion 0; each has to be a finite number"),
        ("not_applicable", "returned None for completion 1"),
        ("not_finite", "returned nan for completion 1"),
        ("raises", r"failed: ZeroDivisionError: division by zero \(.*rewards.py line \d+\)"),
        ("other_keywords", "failed: TypeError: other_keywords.. got an unexpected keyword argument 'prompts'"),
        ("number", "has no function number"),
        ("absent", "has no function absent"),
    ],
)
def test_a_wrong_function_is_told_in_one_line(file: Path, function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rate(f"{file}:{function}", PROMPTS, COMPLETIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewards.py", "names no function; write module:function, or path/to/file.py:function"),
        ("rewards.py:", "names no function"),
        ("nowhere/rewards.py:f", "there is no file nowhere/rewards.py"),
        ("a_module_that_is_not_there:f", "cannot be imported: ModuleNotFoundError: No module named"),
    ],
)
def test_a_wrong_name_is_told(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward_function(name)


def test_a_file_that_does_not_run_is_told_with_its_line(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError: No module named .*broken.py line 2\)"):
        load_reward_function(f"{file.with_name('broken.py')}:f")
