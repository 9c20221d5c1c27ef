"""Prompts for judges: ours, and how those of the benchmarks' own packages are read from the user's copy."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.suites.asks import Message, system, user

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is told.

    Attributes:
        name: what the report calls it.
        template: the user's message, with places such as {question}.
        system: the system message; none where empty.
        by_category: system messages of categories that have their own.
    """

    name: str
    template: str
    system: str = ""
    by_category: dict[str, str] = field(default_factory=dict)

    def messages(self, values: dict[str, str], category: str = "") -> tuple[Message, ...]:
        """The conversation that asks for a verdict."""
        instructions = self.by_category.get(category, self.system)
        request = user(fill(self.template, values))
        return (system(instructions), request) if instructions else (request,)


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with its places filled, all at once: braces in what is filled in mean nothing."""
    places = re.compile(r"\{(" + "|".join(map(re.escape, values)) + r")\}")
    return places.sub(lambda found: values[found.group(1)], template)


_PAIR = """[Prompt]
{question}

[Answer A]
{answer_a}
[End of answer A]

[Answer B]
{answer_b}
[End of answer B]"""

PAIRWISE = JudgePrompt(
    "pairwise_v1",
    _PAIR,
    "You judge which of two assistants has answered a prompt better. First work out in brief what a correct and "
    "complete answer says. Then compare both answers with it: correctness comes first, then whether the prompt's "
    "instructions are followed, then clarity. Length, formatting and the order of the answers are no merits. Explain "
    "in a few sentences, then end with exactly one label: [[A>>B]] if A is much better, [[A>B]] if A is somewhat "
    "better, [[A=B]] if they are about equal, [[B>A]] if B is somewhat better, [[B>>A]] if B is much better.",
)

SUMMARIES = JudgePrompt(
    "tldr_v1",
    "[Post]\n{question}\n\n[Summary A]\n{answer_a}\n\n[Summary B]\n{answer_b}",
    "You judge which of two summaries of a forum post is better. A good summary states the post's most important "
    "points, is true to the post, invents nothing, leaves out what matters little, and is short. The order of the "
    "summaries is no merit. Explain in one or two sentences, then end with exactly one label: [[A]] if A is better, "
    "[[B]] if B is better, [[C]] if neither is.",
)


def arena_hard_prompt(path: str) -> JudgePrompt:
    """The judge's prompt of arena-hard-auto, from its utils/judge_utils.py (read, not run).

    Raises DataError where the file is not it.
    """
    try:
        tree = ast.parse(_text(path))
        texts = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        settings = next(
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "JUDGE_SETTINGS"
        )
        by_category = {}
        for category, values in zip(settings.keys, settings.values, strict=True):  # type: ignore[attr-defined]
            entries = dict(zip([ast.literal_eval(key) for key in values.keys], values.values, strict=True))
            prompt = entries["system_prompt"]
            text = texts[prompt.id] if isinstance(prompt, ast.Name) else ast.literal_eval(prompt)
            by_category[ast.literal_eval(category)] = str(text)
    except (SyntaxError, StopIteration, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not arena-hard-auto's utils/judge_utils.py: it has no JUDGE_SETTINGS") from error
    places = "<|User Prompt|>\n{question}"
    for letter in "AB":
        title = f"Assistant {letter}'s Answer|>"
        places += f"\n\n<|The Start of {title}\n{{answer_{letter.lower()}}}\n<|The End of {title}"
    return JudgePrompt(f"arena-hard-auto ({Path(path).name})", places, by_category=by_category)


def alpaca_eval_prompt(path: str) -> list[Message]:
    """The judge's prompt of the alpaca-eval package as messages with the places {instruction}, {output_1}, {output_2}.

    Raises DataError where the file is not one.
    """
    messages = [{"role": role, "content": text.strip()} for role, text in _CHATML.findall(_text(path))]
    whole = " ".join(message["content"] for message in messages)
    missing = [place for place in ("{instruction}", "{output_1}", "{output_2}") if place not in whole]
    if missing:
        raise DataError(f"{path} is no prompt of the alpaca-eval package: it has no place {missing[0]}")
    return messages


def _text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the judge's prompt {path}: {getattr(error, 'strerror', error)}") from error
