"""`aligndistil evaluate --suite` beside a model and a judge whose every word is known; figures are worked out again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aligndistil.__main__ import main
from megatron_aligndistil.commands.launch import JOB_VARIABLES
from tests.suites import servers
from tests.suites.servers import Body, Handler, Server, answer_to, label, rating, strength

ROOT = Path(__file__).parents[2]
SCORES = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}


@pytest.fixture(autouse=True)
def outside_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of a job, whatever earlier tests in this process have been."""
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    """The model and the judge, deterministic both."""
    started = Server(servers.respond)
    yield started
    started.close()


def mt_bench(data: Path) -> list[str]:
    folder = data / "mt_bench"
    return [
        *("--mt_bench.questions", str(folder / "mt_bench.question.jsonl")),
        *("--mt_bench.references", str(folder / "mt_bench.reference_answer.gpt-4.jsonl")),
        *("--mt_bench.prompts", str(folder / "judge_prompts.jsonl")),
    ]


def arena_hard(data: Path) -> list[str]:
    folder = data / "arena_hard"
    files = [str(folder / "v0.1.question.jsonl"), str(folder / "v0.1.gpt-4-0314.jsonl")]
    return ["--arena_hard.questions", files[0], "--arena_hard.baseline", files[1]]


def evaluate(out: Path, server: Server, suites: str, *arguments: str) -> int:
    """The command, in this process."""
    judge = ["--judge.endpoint", server.url, "--judge.model", "judge"]
    return main(["evaluate", "--suite", suites, "--out", str(out), "--endpoint", server.url, *judge, *arguments])


def report(out: Path, suite: str) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())["suites"][suite]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_mt_bench(tmp_path: Path, server: Server, shared_data: Path) -> None:
    assert evaluate(tmp_path, server, "mt_bench", "--model", "model", *mt_bench(shared_data)) == 0
    questions = lines(shared_data / "mt_bench" / "mt_bench.question.jsonl")
    grades: dict[int, list[int]] = {}
    for question in questions:
        first = answer_to([{"content": question["turns"][0]}])
        second = answer_to([{}, {}, {"content": question["turns"][1]}])
        grades[question["question_id"]] = [rating(first), rating(second)]
    found = report(tmp_path, "mt_bench")
    figures = {name: figure["value"] for name, figure in found["figures"]["model"].items()}
    turns = np.array(list(grades.values()))
    assert figures["MT-Bench 1st"] == pytest.approx(turns[:, 0].mean())
    assert figures["MT-Bench 2nd"] == pytest.approx(turns[:, 1].mean())
    assert figures["MT-Bench avg"] == pytest.approx(turns.mean())
    stderr = turns.mean(1).std() / math.sqrt(len(turns))
    assert found["figures"]["model"]["MT-Bench avg"]["stderr"] == pytest.approx(stderr, rel=0.1)
    for category in {question["category"] for question in questions}:
        mine = [grades[each["question_id"]] for each in questions if each["category"] == category]
        assert found["categories"]["model"][category]["value"] == pytest.approx(np.mean(mine))
    # References are shown exactly where there are any; the second turn is asked with the first in sight.
    references = {
        each["question_id"]: each for each in lines(shared_data / "mt_bench" / "mt_bench.reference_answer.gpt-4.jsonl")
    }
    for record in lines(tmp_path / "model" / "mt_bench" / "verdicts.jsonl"):
        question, turn = (int(part) for part in record["id"].split("/"))
        text = record["ask"]["messages"][-1]["content"]
        assert ("Start of Reference Answer" in text) == (question in references)
        if question in references:
            assert references[question]["choices"][0]["turns"][turn - 1] in text
    answers = lines(tmp_path / "model" / "mt_bench" / "answers.jsonl")
    assert Counter(len(each["ask"]["messages"]) for each in answers) == {1: 80, 3: 80}
    temperatures = {each["id"]: each["ask"]["temperature"] for each in answers}
    assert (temperatures["81/1"], temperatures["111/1"], temperatures["141/2"]) == (0.7, 0.0, 0.1)
    assert (tmp_path / "report.png").stat().st_size > 5000 and (tmp_path / "mt_bench.png").exists()


def arena_scores(data: Path, version: str) -> dict[str, list[tuple[float, int]]]:
    """(score of the model, weight) in both orders, by question."""
    baselines = {
        each["uid"]: each["messages"][-1]["content"]["answer"]
        for each in lines(data / "arena_hard" / f"{version}.gpt-4-0314.jsonl")
    }
    found = {}
    for question in lines(data / "arena_hard" / f"{version}.question.jsonl"):
        answer, baseline = answer_to([{"content": question["prompt"]}]), baselines[question["uid"]]
        as_second, weight_second = SCORES[label(baseline, answer)]
        as_first, weight_first = SCORES[label(answer, baseline)]
        found[question["uid"]] = [(1 - as_second, weight_second), (as_first, weight_first)]
    return found


def test_arena_hard(tmp_path: Path, server: Server, shared_data: Path) -> None:
    arguments = [*arena_hard(shared_data), "--max_questions", "125"]
    assert evaluate(tmp_path, server, "arena_hard", "--model", "model", *arguments) == 0
    scores = dict(list(arena_scores(shared_data, "v0.1").items())[::4])
    battles = [score for games in scores.values() for score, weight in games for _ in range(weight)]
    found = report(tmp_path, "arena_hard v0.1")
    rate = found["figures"]["model"]["Arena-Hard v0.1 WR"]
    assert rate["value"] == pytest.approx(100 * np.mean(battles)) and rate["count"] == 125
    assert rate["low"] < rate["value"] < rate["high"]
    position = found["position"]["model"]
    first_place = np.mean([score for (second, _), (first, _) in scores.values() for score in (1 - second, first)])
    assert position["first_place"] == pytest.approx(100 * first_place)
    agree = np.mean([np.sign(second - 0.5) == np.sign(first - 0.5) for (second, _), (first, _) in scores.values()])
    assert position["agree"] == pytest.approx(100 * agree)
    assert position["agree"] + position["for_first"] + position["for_second"] == pytest.approx(100)


def test_arena_hard_v2_has_a_baseline_a_category(tmp_path: Path, server: Server, shared_data: Path) -> None:
    """With arena-hard-auto's own file of prompts (here one made like it) and two files of baseline answers."""
    questions = lines(shared_data / "arena_hard" / "v2.0.question.jsonl")
    for model in ("o3-mini-2025-01-31", "gemini-2.0-flash-001"):
        with (tmp_path / f"{model}.jsonl").open("w") as file:
            for number, each in enumerate(questions):
                content = {"answer": f"{model} says " + " ".join(f"w{n}" for n in range(number % 40))}
                record = {
                    "uid": each["uid"],
                    "model": model,
                    "messages": [{"role": "user"}, {"role": "assistant", "content": content}],
                }
                file.write(json.dumps(record) + "\n")
    (tmp_path / "judge_utils.py").write_text(
        'HARD = "Judge hard prompts."\n'
        'JUDGE_SETTINGS = {"hard_prompt": {"baseline": "x", "system_prompt": HARD},\n'
        '    "creative_writing": {"baseline": "y", "system_prompt": "Judge creative writing."}}\n'
        'raise SystemExit("read, not run")\n'
    )
    arguments = [
        "--arena_hard.questions",
        str(shared_data / "arena_hard" / "v2.0.question.jsonl"),
        "--max_questions",
        "150",
    ]
    files = json.dumps([str(tmp_path / "o3-mini-2025-01-31.jsonl"), str(tmp_path / "gemini-2.0-flash-001.jsonl")])
    arguments += ["--arena_hard.baseline", files, "--arena_hard.prompts", str(tmp_path / "judge_utils.py")]
    assert evaluate(tmp_path / "out", server, "arena_hard", "--model", "model", *arguments) == 0
    found = report(tmp_path / "out", "arena_hard v2.0")
    by_uid = {each["uid"]: (number, each) for number, each in enumerate(questions)}
    scores: dict[str, list[tuple[float, int]]] = {}
    for record in lines(tmp_path / "out" / "model" / "arena_hard_v2.0" / "answers.jsonl"):
        number, question = by_uid[record["id"]]
        creative = question["category"] == "creative_writing"
        model = "gemini-2.0-flash-001" if creative else "o3-mini-2025-01-31"
        baseline = f"{model} says " + " ".join(f"w{n}" for n in range(number % 40))
        answer = answer_to([{"content": question["prompt"]}])
        second, first = SCORES[label(baseline, answer)], SCORES[label(answer, baseline)]
        scores.setdefault(question["category"], []).extend([(1 - second[0], second[1]), first])
    for category, games in scores.items():
        expected = 100 * np.average([score for score, _ in games], weights=[weight for _, weight in games])
        assert found["categories"]["model"][category]["value"] == pytest.approx(expected)
    assert len(scores) == 2 and not math.isnan(found["figures"]["model"]["Arena-Hard v2.0 SC"]["value"])
    told = {
        record["ask"]["messages"][0]["content"]
        for record in lines(tmp_path / "out" / "model" / "arena_hard_v2.0" / "verdicts.jsonl")
    }
    assert told == {"Judge hard prompts.", "Judge creative writing."}


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def alpaca(tmp_path: Path) -> list[str]:
    """Forty instructions with a baseline's outputs; a judge's prompt and a data file in the package's form."""
    rng = np.random.default_rng(0)
    texts = [
        {"instruction": f"Do {'it ' * n}", "output": "word " * (n % 9) + f"w{n} " * (n % 5), "dataset": "ab"[n % 2]}
        for n in range(40)
    ]
    shown = "{instruction} <first>{output_1}</first> {not a place} <second>{output_2}</second>"
    messages = [("system", "Be fair."), ("user", shown)]
    prompt = "\n".join(f"<|im_start|>{role}\n{text}\n<|im_end|>" for role, text in messages)
    (tmp_path / "prompt.txt").write_text(prompt)
    difficulty = rng.normal(size=40)
    rows = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    rows += [f"g{m},{n},{rng.uniform()},{rng.normal()},{difficulty[n]},False" for m in range(2) for n in range(40)]
    (tmp_path / "df_gamed.csv").write_text("\n".join(rows) + "\n")
    questions = write_records(tmp_path / "baseline.jsonl", texts)
    return ["--alpaca_eval.questions", questions, "--alpaca_eval.prompt", str(tmp_path / "prompt.txt")]


def alpaca_preferences(questions: Path) -> list[float]:
    """P(the model's output is better), whatever the order: the judge of letters has no bias."""
    return [
        servers.second_probability(each["output"], answer_to([{"content": each["instruction"]}]))
        for each in lines(questions)
    ]


@pytest.mark.parametrize("orders", ["random", "both"])
def test_alpaca_eval(tmp_path: Path, server: Server, alpaca: list[str], orders: str) -> None:
    arguments = [*alpaca, "--alpaca_eval.length_controlled", "false", "--alpaca_eval.orders", orders]
    assert evaluate(tmp_path / "out", server, "alpaca_eval", "--model", "model", *arguments) == 0
    preferences = np.array(alpaca_preferences(tmp_path / "baseline.jsonl"))
    found = report(tmp_path / "out", "alpaca_eval")
    rate = found["figures"]["model"]["AlpacaEval WR"]
    assert rate["value"] == pytest.approx(100 * preferences.mean())
    assert rate["stderr"] == pytest.approx(100 * preferences.std(ddof=1) / math.sqrt(40))
    ids = [record["id"] for record in lines(tmp_path / "out" / "model" / "alpaca_eval" / "verdicts.jsonl")]
    model_first = sum(name.endswith("model-first") for name in ids)
    assert (len(ids), model_first) == (80, 40) if orders == "both" else len(ids) == 40 and 8 < model_first < 32
    if orders == "both":
        assert found["position"]["model"]["first_place"] == pytest.approx(50)
    assert "{not a place}" in server.bodies[-1]["messages"][-1]["content"]


def test_length_control_is_the_packages_own(
    tmp_path: Path, server: Server, alpaca: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_aligndistil.errors import ConfigError
    from megatron_aligndistil.suites.alpaca_eval import _package

    try:
        package = _package()
    except ConfigError as error:
        pytest.skip(f"alpaca-eval cannot be imported here: {error}")
    gamed = str(tmp_path / "df_gamed.csv")
    assert (
        evaluate(tmp_path / "out", server, "alpaca_eval", "--model", "model", *alpaca, "--alpaca_eval.gamed", gamed)
        == 0
    )
    found = report(tmp_path / "out", "alpaca_eval")["figures"]["model"]
    annotations = [
        {
            "instruction": each["instruction"],
            "output_1": each["output"],
            "output_2": answer_to([{"content": each["instruction"]}]),
            **{"generator_1": "baseline", "generator_2": "us", "annotator": "judge", "preference": 1 + preference},
        }
        for each, preference in zip(
            lines(tmp_path / "baseline.jsonl"), alpaca_preferences(tmp_path / "baseline.jsonl"), strict=True
        )
    ]
    monkeypatch.setattr(package, "hf_hub_download", lambda **which: gamed)
    expected = package.get_length_controlled_winrate(annotations, save_weights_dir=None)
    assert found["AlpacaEval LC"]["value"] == pytest.approx(expected["length_controlled_winrate"], abs=1e-9)
    assert found["AlpacaEval LC"]["stderr"] == pytest.approx(expected["lc_standard_error"], abs=1e-9)
    assert found["AlpacaEval WR"]["value"] == pytest.approx(expected["win_rate"], abs=1e-9)
    assert found["AlpacaEval WR"]["stderr"] == pytest.approx(expected["standard_error"], abs=1e-9)
    assert abs(expected["length_controlled_winrate"] - expected["win_rate"]) > 0.01


def test_tldr(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"prompt": f"POST {'x' * n} TL;DR:", "completion": " ".join(f"w{k}" for k in range(n % 8))} for n in range(30)
    ]
    questions = write_records(tmp_path / "posts.jsonl", records)
    assert evaluate(tmp_path / "out", server, "tldr", "--model", "model", "--tldr.questions", questions) == 0
    scores = []
    for record in records:
        answer, baseline = answer_to([{"content": record["prompt"]}]), record["completion"]
        simple = {"A": 1, "B": 0, "=": 0.5}
        orders = [label(answer, baseline), label(baseline, answer)]
        first, second = (simple["=" if "=" in each else each[0]] for each in orders)
        scores.append((first + 1 - second) / 2)
    found = report(tmp_path / "out", "tldr")["figures"]["model"]["TL;DR WR"]
    assert found["value"] == pytest.approx(100 * np.mean(scores)) and 5 < found["value"] < 95
    # Another model under the same name is not mixed in.
    asked = len(server.bodies)
    assert evaluate(
        tmp_path / "out", server, "tldr", "--model", "judge", "--name", "model", "--tldr.questions", questions
    )
    assert "has the results of model (served); give judge (served) another --name" in capsys.readouterr().err
    assert len(server.bodies) == asked


def test_two_models_are_compared_over_the_questions_of_both(tmp_path: Path, shared_data: Path) -> None:
    """The second model answers as the first does, in more words for every other question."""

    def respond(handler: Handler, body: Body) -> None:
        if body["model"] == "wordy" and len(body["messages"][-1]["content"]) % 2:
            handler.reply(answer_to(body["messages"]) + " " + " ".join(f"w{number}" for number in range(400)))
        else:
            servers.respond(handler, body)

    server = Server(respond, ("model", "wordy", "judge"))
    try:
        for model in ("model", "wordy"):
            arguments = [*arena_hard(shared_data), "--max_questions", "100"]
            assert evaluate(tmp_path, server, "arena_hard", "--model", model, *arguments) == 0
    finally:
        server.close()
    found = report(tmp_path, "arena_hard v0.1")
    (difference,) = found["differences"]
    rates = {model: figures["Arena-Hard v0.1 WR"]["value"] for model, figures in found["figures"].items()}
    assert difference["value"] == pytest.approx(rates["wordy"] - rates["model"]) and difference["value"] > 10
    assert 0 < difference["low"] < difference["value"] < difference["high"] and difference["p"] < 0.01
    page = (tmp_path / "report.md").read_text()
    assert page.index("| model |") < page.index("| wordy |")
    moved = page[page.index("What moved most from model to wordy") :]
    assert moved.count("<details>") == 3 and "w399" not in moved  # rises only, excerpts only


class Unsteady:
    """A judge that now and then says what nobody can read, and refuses one question."""

    def __init__(self) -> None:
        self.mended = False

    def __call__(self, handler: Handler, body: Body) -> None:
        text = body["messages"][-1]["content"]
        if body["model"] == "judge" and not self.mended and "[Question]\nImplement" in text:
            handler.send(400, json.dumps({"error": {"message": "too long for me"}}))
        elif body["model"] == "judge" and "[Question]\nCompose" in text:
            handler.reply("I would say seven out of ten.")
        elif body["model"] == "judge" and "[Question]\nDraft" in text:
            handler.reply("")
        else:
            servers.respond(handler, body)


def test_what_cannot_be_read_is_counted_and_what_failed_is_asked_again(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Unsteady()
    server = Server(judge)
    arguments = ["mt_bench", "--model", "model", *mt_bench(shared_data)]
    try:
        assert evaluate(tmp_path, server, *arguments) == 1
        (complaint,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aligndistil:")]
        refused = sum("[Question]\nImplement" in str(body["messages"][-1]["content"]) for body in server.bodies)
        assert (
            refused
            and complaint.startswith(f"aligndistil: {refused} requests got no reply")
            and "too long for me" in complaint
        )
        found = report(tmp_path, "mt_bench")
        assert found["counts"]["model"]["verdicts"] == 160 - refused
        judge.mended = True
        before = len(server.bodies)
        assert evaluate(tmp_path, server, *arguments) == 0
        assert len(server.bodies) - before == refused  # nothing else was asked again
    finally:
        server.close()
    found = report(tmp_path, "mt_bench")
    unread = found["counts"]["model"]["unreadable verdicts"]
    assert found["counts"]["model"]["verdicts"] == 160 and unread == len(found["unread"]["model"]) >= 2
    assert found["figures"]["model"]["MT-Bench 1st"]["count"] == 80 - unread
    assert "Unreadable verdicts on model" in (tmp_path / "report.md").read_text()


def test_a_killed_run_asks_nothing_twice(tmp_path: Path, shared_data: Path) -> None:
    """Server and command are processes; the command is killed twice, the second time with a line torn by hand."""
    environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    environment["PYTHONPATH"] = str(ROOT)
    log, port = tmp_path / "log", tmp_path / "port"
    command = [sys.executable, str(ROOT / "tests" / "suites" / "servers.py"), str(port), str(log), "0.02"]
    server = subprocess.Popen(command, env=environment)

    def asked() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    try:
        wait_for(port.exists)
        url = port.read_text()
        arguments = ["evaluate", "--suite", "arena_hard", "--out", "out", "--endpoint", url, "--model", "model"]
        arguments += ["--judge.endpoint", url, "--judge.model", "judge", "--requests.concurrency", "4"]
        arguments += [*arena_hard(shared_data), "--max_questions", "60"]
        program = [sys.executable, "-m", "megatron_aligndistil", *arguments]
        for until in (25, 100):
            process = subprocess.Popen(program, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
            wait_for(lambda until=until: asked() >= until)
            process.kill()
            process.wait()
        time.sleep(0.3)
        verdicts = tmp_path / "out" / "model" / "arena_hard_v0.1" / "verdicts.jsonl"
        kept = verdicts.read_bytes().splitlines(keepends=True)
        verdicts.write_bytes(b"".join(kept[:-1]) + kept[-1][:50])
        subprocess.run(program, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    finally:
        server.kill()
        server.wait()
    (tmp_path / "out" / "report.md").unlink()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0  # with everything stored, no server is needed
    assert (tmp_path / "out" / "report.md").exists()
    times = Counter(log.read_text().splitlines())
    assert len(times) == 60 + 120  # every answer and every verdict was asked for
    # Only what was under way when a run was killed (4 at a time), and the verdict torn by hand, are asked for again.
    assert sum(times.values()) - len(times) <= 4 + 4 + 1
    found = report(tmp_path / "out", "arena_hard v0.1")
    assert found["counts"]["model"] == {
        "questions": 60,
        "answers": 60,
        "verdicts": 120,
        "unreadable verdicts": 0,
        "questions scored": 60,
    }


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_wrong_input_is_one_sentence(
    tmp_path: Path, server: Server, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: str) -> str:
        assert main(["evaluate", "--suite", *arguments, "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, said
        return said[0].removeprefix("aligndistil: ")

    questions = lines(shared_data / "mt_bench" / "mt_bench.question.jsonl")
    del questions[4]["turns"]
    lacking = write_records(tmp_path / "lacking.jsonl", questions)
    doubled = write_records(tmp_path / "doubled.jsonl", questions[:3] + questions[:1])
    model = ["--model", "model", "--endpoint", server.url]
    judge = ["--judge.endpoint", server.url, "--judge.model", "judge"]
    files = mt_bench(shared_data)
    assert complaint("mt_bensch", *model, *judge).startswith("there is no suite 'mt_bensch'; suites: alpaca_eval")
    assert "mt_bench needs --judge.endpoint" in complaint("mt_bench", *model, *files)
    assert "mt_bench needs --model" in complaint("mt_bench", *judge, *files)
    assert "there is no checkpoint modell" in complaint("mt_bench", "--model", "modell", *judge, *files)
    assert "mt_bench needs --mt_bench.questions" in complaint("mt_bench", *model, *judge)
    said = complaint("mt_bench", *model, *judge, *files, "--mt_bench.questions", lacking)
    assert said == f"{lacking} line 5 has no turns; a question here needs question_id, category, turns"
    said = complaint("mt_bench", *model, *judge, *files, "--mt_bench.questions", doubled)
    assert said == f"{doubled} line 4: question_id 81 was there before; every question needs its own"
    assert "there is no data file" in complaint(
        "mt_bench", *model, *judge, *files, "--mt_bench.questions", "/no/file.jsonl"
    )
    said = complaint("mt_bench", "--model", "modell", *model[2:], *judge, *files)
    assert said == f"{server.url} has no model modell; it has model, judge"
    said = complaint("mt_bench", *model, *judge, *files, "--judge.model", "juge")
    assert said == f"{server.url} has no model juge; it has model, judge"
    wrong = "http://127.0.0.1:9/v1"
    assert complaint("mt_bench", *model, *judge, *files, "--judge.endpoint", wrong).startswith(
        f"nothing answers at {wrong}"
    )
    one = write_records(tmp_path / "one.jsonl", lines(shared_data / "arena_hard" / "v0.1.gpt-4-0314.jsonl")[:1])
    said = complaint("arena_hard", *model, *judge, *arena_hard(shared_data), "--arena_hard.baseline", one)
    assert "v0.1.question.jsonl line 1: " in said and "has no baseline answer to question" in said
    assert not server.bodies and not (tmp_path / "out").exists()  # all of it before anything was asked
    assert strength("a a b") == 2
