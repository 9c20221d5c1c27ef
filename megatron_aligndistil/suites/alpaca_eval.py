"""AlpacaEval 2.0: win rate against the GPT-4 baseline raw and length-controlled (Dubois et al. 2024)."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_aligndistil.config import Section
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites import pairwise, statistics
from megatron_aligndistil.suites.asks import Ask, Reply, user
from megatron_aligndistil.suites.base import (
    Example,
    JudgedSuite,
    Judging,
    Replies,
    Result,
    Sampling,
    by_category,
    excerpt,
    read_questions,
    spread,
)
from megatron_aligndistil.suites.judging import letter_probability
from megatron_aligndistil.suites.pairwise import Contest, Orders, Verdict
from megatron_aligndistil.suites.prompts import alpaca_eval_prompt, fill

_PROMPT = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
_FIRST, _SECOND = "m", "M"  # the letters that the package's prompt gives the two outputs
_MAX_TOKENS = 2048
_TOP_LOGPROBS = 5


class AlpacaEvalConfig(Section):
    questions: str | None = None
    """AlpacaEval: the baseline's outputs, which hold the instructions (alpaca_eval_gpt4_baseline.json)."""
    prompt: str | None = None
    """AlpacaEval: the judge's prompt; that of the installed alpaca-eval package when not given."""
    gamed: str | None = None
    """AlpacaEval: local copy of df_gamed.csv for the length-controlled win rate; from the hub when not given."""
    weighted: bool = True
    """AlpacaEval: preferences from the judge's log-probabilities of the two letters; false takes the letter written."""
    length_controlled: bool = True
    """AlpacaEval: work out the length-controlled win rate (needs the alpaca-eval package)."""
    orders: Orders = "random"
    """AlpacaEval: `random` shows each pair in one order, drawn from its text, as the package does; `both` in both."""


class AlpacaEval(JudgedSuite):
    """Preferences of the judge for the model's output over the baseline's, from 0 to 1."""

    name = "alpaca_eval"

    def __init__(self, config: AlpacaEvalConfig, sampling: Sampling, judging: Judging, limit: int | None) -> None:
        if not config.questions:
            raise ConfigError(
                "alpaca_eval needs --alpaca_eval.questions, a copy of alpaca_eval_gpt4_baseline.json from the dataset "
                "tatsu-lab/alpaca_eval (CC BY-NC 4.0, therefore not part of this project)"
            )
        self._config, self._sampling, self._judging = config, sampling, judging
        records = read_questions(config.questions, ("instruction", "output"))
        self._places = spread(len(records), limit)
        self._records = [records[place] for place in self._places]
        self._prompt = alpaca_eval_prompt(config.prompt or _package_prompt())
        if config.length_controlled:
            _package()
            if config.gamed and not Path(config.gamed).is_file():
                raise ConfigError(f"there is no file {config.gamed}; alpaca_eval.gamed is a copy of df_gamed.csv")

    def asks(self, answers: Replies) -> list[Ask]:
        sampling = self._sampling
        temperature = 0.0 if sampling.temperature is None else sampling.temperature
        max_tokens = sampling.max_tokens or _MAX_TOKENS
        return [
            Ask(
                str(place),
                (user(record.values["instruction"]),),
                temperature,
                max_tokens,
                0,
                sampling.top_p,
                sampling.seed,
            )
            for place, record in zip(self._places, self._records, strict=True)
        ]

    def _contests(self, answers: Replies) -> list[Contest]:
        return [
            Contest(
                id=str(place),
                category=str(record.values.get("dataset", "")),
                question=record.values["instruction"],
                baseline=record.values["output"],
                answer=answers[str(place)].text,
                index=place,
            )
            for place, record in zip(self._places, self._records, strict=True)
            if str(place) in answers
        ]

    def verdict_asks(self, answers: Replies) -> list[Ask]:
        asks = []
        for contest in self._contests(answers):
            for model_first in pairwise.ordered(contest, self._config.orders):
                outputs = [contest.answer, contest.baseline] if model_first else [contest.baseline, contest.answer]
                values = {"instruction": contest.question, "output_1": outputs[0], "output_2": outputs[1]}
                messages = tuple({**each, "content": fill(each["content"], values)} for each in self._prompt)
                # The package asks for one token at temperature 1, where log-probabilities are those of the model.
                asks.append(
                    Ask(
                        pairwise.verdict_id(contest, model_first),
                        messages,
                        1.0 if self._config.weighted else self._judging.temperature,
                        self._judging.max_tokens or 1,
                        top_logprobs=_TOP_LOGPROBS if self._config.weighted else 0,
                    )
                )
        return asks

    def score(self, answers: Replies, verdicts: Replies, measured: Mapping[str, statistics.Figure]) -> Result:
        orders, contests = self._config.orders, self._contests(answers)
        read = {name: self._read(name, reply) for name, reply in verdicts.items()}
        whole, unread = pairwise.read_all(contests, orders, verdicts, read)
        examples = [_example(contest, whole[contest.id]) for contest in contests if contest.id in whole]
        figures = {"AlpacaEval WR": _win_rate(examples)}
        notes = []
        if self._config.weighted and verdicts and len(unread) == len(verdicts):
            notes.append(
                "No verdict came with log-probabilities of the two letters; use a judge that gives them, or "
                "--alpaca_eval.weighted false"
            )
        if self._config.length_controlled and examples:
            found = length_controlled(
                package_annotations(contests, examples), [each.index for each in examples], self._config.gamed
            )
            figures = {"AlpacaEval LC": found, **figures}
        return Result(
            suite="alpaca_eval",
            main="AlpacaEval WR",
            figures=figures,
            categories=by_category(examples, _win_rate),
            position=pairwise.position(whole),
            counts={"questions": len(self._records), "answers": len(contests), "verdicts": len(verdicts)}
            | {"unreadable verdicts": len(unread), "questions scored": len(examples)},
            unread=unread,
            examples=examples,
            settings={"questions": self._config.questions, "weighted": self._config.weighted, "orders": orders},
            notes=notes,
        )

    def _read(self, name: str, reply: Reply) -> Verdict | None:
        model_first = name.endswith("/model-first")
        if self._config.weighted:
            first = letter_probability(reply.first_token, _FIRST, _SECOND)
        else:
            first = {_FIRST: 1.0, _SECOND: 0.0}.get(reply.text.strip())
        if first is None:
            return None
        return Verdict(model_first, first if model_first else 1 - first)


def package_annotations(contests: Sequence[Contest], examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The preferences in the form of the alpaca-eval package: 1 where the baseline is better, 2 where the model is."""
    by_id = {contest.id: contest for contest in contests}
    return [
        {
            "instruction": by_id[example.id].question,
            "output_1": by_id[example.id].baseline,
            "output_2": by_id[example.id].answer,
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "judge",
            "preference": 1 + example.score / example.weight,
        }
        for example in examples
    ]


def length_controlled(
    preferences: Sequence[dict[str, Any]], places: Sequence[int], gamed: str | None = None
) -> statistics.Figure:
    """The alpaca-eval package's own length-controlled win rate with its standard error, in percent.

    Args:
        preferences: annotations in the package's form.
        places: the place of each among the 805 instructions, whose difficulty the package looks up by it.
        gamed: local copy of the package's data file; from the hub when not given.

    Raises ConfigError where the package or its data file cannot be had.
    """
    import pandas as pd

    package = _package()
    frame = pd.DataFrame(list(preferences), index=list(places))
    before = package.hf_hub_download
    if gamed:
        package.hf_hub_download = lambda **which: gamed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn announces changes that are for the package to follow
            found = package.get_length_controlled_winrate(frame, save_weights_dir=None)
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"the alpaca-eval package cannot work out the length-controlled win rate ({_first_line(error)}); give "
            "--alpaca_eval.gamed, a copy of df_gamed.csv from the dataset tatsu-lab/alpaca_eval, or "
            "--alpaca_eval.length_controlled false"
        ) from error
    finally:
        package.hf_hub_download = before
    value, stderr = float(found["length_controlled_winrate"]), float(found["lc_standard_error"])
    return statistics.Figure(
        value, value - statistics.Z * stderr, value + statistics.Z * stderr, stderr, len(preferences)
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _package() -> Any:
    """The package's module of length-controlled win rates. Raises ConfigError where it is not installed."""
    # The package asks setuptools' pkg_resources for versions of other packages, in functions that are not used here;
    # setuptools 82 has left that module out.
    if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    try:
        from alpaca_eval.metrics import glm_winrate
    except ImportError as error:
        raise ConfigError(
            f"the length-controlled win rate needs the package alpaca-eval ({_first_line(error)}); install the extra "
            "`eval`: pip install -e '.[eval]', or set --alpaca_eval.length_controlled false"
        ) from error
    return glm_winrate


def _package_prompt() -> str:
    found = importlib.util.find_spec("alpaca_eval")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "the judge's prompt comes from the package alpaca-eval, which is not installed; install the extra `eval`: "
            "pip install -e '.[eval]', or give --alpaca_eval.prompt, its alpaca_eval_clf.txt"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / _PROMPT)


def _example(contest: Contest, verdicts: Sequence[Verdict]) -> Example:
    return Example(
        id=contest.id,
        category=contest.category,
        question=excerpt(contest.question),
        answer=excerpt(contest.answer),
        score=sum(each.score for each in verdicts) / len(verdicts),
        weight=1.0,
        index=contest.index,
    )


def _win_rate(examples: Sequence[Example]) -> statistics.Figure:
    return statistics.mean([each.score for each in examples], scale=100.0)
