"""The parts of the demonstration around training: stories, tokenizer, reward, pairs, report."""

from __future__ import annotations

import doctest
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

import corpus  # noqa: E402
import grammar  # noqa: E402
import pairs  # noqa: E402
import prompts_from_samples  # noqa: E402
import report  # noqa: E402
import reward  # noqa: E402
import split  # noqa: E402
import stories  # noqa: E402
import summary  # noqa: E402
from records import read_jsonl, write_json, write_jsonl  # noqa: E402


def run(module, monkeypatch, *arguments) -> None:
    """Run a script's main with these arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def sample_stories() -> list[stories.Story]:
    rng = random.Random(0)
    return [stories.write_story(rng) for _ in range(2000)]


# Stories


def test_a_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    first, again, other = (corpus.make_stories(50, 20, 10, seed) for seed in (3, 3, 4))
    assert first == again
    assert first[0] != other[0]


def test_prompts_are_fresh_and_apart() -> None:
    written, prompts, eval_prompts = corpus.make_stories(500, 200, 100, seed=0)
    openings = [{story.prompt for story in part} for part in (written, prompts, eval_prompts)]
    assert (len({story.text for story in written}), len(openings[1]), len(openings[2])) == (500, 200, 100)
    assert not openings[0] & openings[1] and not openings[0] & openings[2] and not openings[1] & openings[2]


def test_stories_and_prompts_have_the_lengths_promised(sample_stories) -> None:
    assert all(40 <= len(reward.words(story.text)) <= 90 for story in sample_stories)
    assert all(8 <= len(reward.words(story.prompt)) <= 16 for story in sample_stories)


def test_every_sentence_has_the_mood_it_claims_and_moods_are_equally_likely(sample_stories) -> None:
    counts = dict.fromkeys(stories.MOODS, 0)
    for story in sample_stories:
        assert all(reward.reward(sentence) == 0 for sentence in story.sentences[:-5]), story.text
        for mood, sentence in zip(story.moods, story.sentences[-5:], strict=True):
            value = reward.reward(sentence)
            assert {"pleasant": value > 0, "neutral": value == 0, "sad": value < 0}[mood], sentence
            counts[mood] += 1
    # 10,000 sentences, neighbours correlated: 0.02 is about three standard errors.
    assert all(abs(count / 10_000 - 1 / 3) < 0.02 for count in counts.values()), counts


def test_stories_are_consistent(sample_stories) -> None:
    names = {name: pronoun for pronoun, group in grammar.NAMES.items() for name in group}
    for story in sample_stories:
        found = re.findall(r"\w+", story.text)
        mentioned = list(dict.fromkeys(word for word in found if word in names))
        assert len(mentioned) == 2, story.text
        # "he" and "she" are always the hero; only the friend's "his" or "her" may be of the other gender.
        hero = names[mentioned[0]]
        wrong = {"she": {"he", "He", "him"}, "he": {"she", "She"}}[hero]
        assert not wrong & set(found), story.text
        assert len({word for word in found if word in grammar.OBJECTS}) == 1, story.text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", story.text), story.text


def test_an_object_that_is_gone_is_not_used_again_until_it_is_back(sample_stories) -> None:
    gone = re.compile(r"and broke\.|until it broke|threw the|took the|lost the")
    back = re.compile(r"mend the|found the|brought a new|gave \w+ another")
    lost = 0
    for story in sample_stories:
        has_object = True
        thing = next(word for word in re.findall(r"\w+", story.text) if word in grammar.OBJECTS)
        for sentence in story.sentences[-5:]:
            if back.search(sentence) and not has_object:
                has_object = True
            elif re.search(rf"\b{thing}\b", sentence):
                assert has_object, story.text
            if gone.search(sentence):
                has_object, lost = False, lost + 1
    assert lost > 100


# Tokenizer and model folder


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    patch = pytest.MonkeyPatch()
    sizes = ("--stories", 2000, "--prompts", 40, "--eval-prompts", 20, "--hidden", 32, "--ffn", 48, "--layers", 2)
    run(corpus, patch, "--out", folder, *sizes)
    patch.undo()
    return folder


def test_tokenizer_gives_back_every_story(corpus_folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "init")
    texts = [record["text"] for record in read_jsonl(corpus_folder / "corpus.jsonl", ["text"])]
    ids = tokenizer(texts)["input_ids"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == texts
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in row for row in ids)
    assert tokenizer.chat_template is None

    # A story cut after its prompt has the tokens of its prompt, then those of its continuation.
    story = stories.write_story(random.Random(5))
    rest = story.text.removeprefix(story.prompt + " ")
    assert tokenizer(story.text)["input_ids"] == [
        *tokenizer(story.prompt)["input_ids"],
        *tokenizer(rest, add_special_tokens=False)["input_ids"],
    ]


def test_model_folder_describes_a_llama_that_fits_its_tokenizer(corpus_folder) -> None:
    config = json.loads((corpus_folder / "init" / "config.json").read_text())
    tokenizer = json.loads((corpus_folder / "init" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert (config["model_type"], config["vocab_size"]) == ("llama", len(vocabulary))
    assert (config["bos_token_id"], config["eos_token_id"]) == (vocabulary["<bos>"], vocabulary["<eos>"])
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float32"
    assert not list((corpus_folder / "init").glob("*.safetensors"))


# Reward


def test_reward_by_hand() -> None:
    assert doctest.testmod(reward).failed == 0
    # loved 3, sad -2, terrible -3: s = -2.
    assert reward.reward("He loved the sad, terrible Terrible song.") == -2 / math.sqrt(4 + 15)
    assert reward.reward("") == 0


def test_repetition_gains_nothing_and_the_reward_is_bounded() -> None:
    assert reward.reward("happy " * 1000) == reward.reward("happy")
    best = " ".join(word for word, valence in reward.VALENCES.items() if valence > 0)
    assert 0.99 < reward.reward(best) < 1
    assert all(-3 <= valence <= 3 and valence != 0 for valence in reward.VALENCES.values())


# Pairs


def samples_from_stories(num_prompts: int) -> list[dict]:
    rng = random.Random(1)
    samples = []
    for index in range(num_prompts):
        for number in range(2):
            response = " ".join(stories.write_story(rng).sentences[-5:])
            tokens = [len(word) for word in response.split()]
            sample = {"prompt": f"p{index}", "response": response, "prompt_tokens": [1, index]}
            samples.append(sample | {"response_tokens": tokens, "index": index, "sample": number, "finish": "stop"})
    return samples


def test_noise_temperature_by_hand() -> None:
    # sigma(1 / tau) = 0.75 at tau = 1 / ln 3; the tie says nothing.
    assert pairs.solve_temperature([1.0, -1.0, 0.0], 0.75) == pytest.approx(1 / math.log(3), rel=1e-9)


def test_labels_agree_as_often_as_asked(tmp_path, monkeypatch) -> None:
    samples = samples_from_stories(3000)
    samples[1] |= {key: samples[0][key] for key in ("response", "response_tokens")}  # identical: dropped
    samples[3]["response"], samples[2]["response"] = "She was glad.", "She was happy."  # a tie: kept
    write_jsonl(tmp_path / "samples.jsonl", samples)
    run(pairs, monkeypatch, "--samples", tmp_path / "samples.jsonl", "--out", tmp_path, "--held-out", 512)
    train, held_out = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (2999 - 512, 512)
    figures = json.loads((tmp_path / "pairs.json").read_text())
    agreement = figures["all"]["agreement"]
    assert abs(agreement - 0.72) < 3 * math.sqrt(0.72 * 0.28 / 2800)
    untied = [r for r in train + held_out if r["reward_chosen"] != r["reward_rejected"]]
    assert agreement == sum(r["reward_chosen"] > r["reward_rejected"] for r in untied) / len(untied)
    assert figures["all"]["ties"] == 2999 - len(untied)
    responses = {(sample["prompt"], sample["response"]): sample["response_tokens"] for sample in samples}
    for record in train + held_out:
        assert record["chosen_tokens"] == responses[record["prompt"], record["chosen"]]
        assert record["rejected_tokens"] == responses[record["prompt"], record["rejected"]]
        assert record["reward_chosen"] == reward.reward(record["chosen"])


def test_pairs_refuses_a_prompt_with_one_sample(tmp_path, monkeypatch) -> None:
    write_jsonl(tmp_path / "samples.jsonl", samples_from_stories(4)[:-1])
    with pytest.raises(SystemExit, match="prompt 3 has 1 samples; pairs need 2"):
        run(pairs, monkeypatch, "--samples", tmp_path / "samples.jsonl", "--out", tmp_path, "--held-out", 1)


def test_split_keeps_prompts_together_and_records_as_they_are(tmp_path, monkeypatch) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    answers = [{"role": "assistant", "content": text} for text in ("So.", "No.")]
    records: list[dict] = [{"prompt": f"p{n // 2}", "chosen": f"a{n}", "rejected": "b", "extra": n} for n in range(40)]
    records.append({"chosen": [*messages, answers[0]], "rejected": [*messages, answers[1]]})
    (tmp_path / "mine.json").write_text(json.dumps(records))
    run(split, monkeypatch, "--data", tmp_path / "mine.json", "--out", tmp_path, "--held-out", 10)
    train, held_out, prompts = (read_jsonl(tmp_path / f"{n}.jsonl") for n in ("train", "held_out", "prompts_eval"))
    assert 10 <= len(held_out) <= 11
    assert sorted(map(json.dumps, train + held_out)) == sorted(map(json.dumps, records))
    sides = [{json.dumps(split.prompt_of(record, "")) for record in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert {json.dumps(record["prompt"]) for record in prompts} == sides[1]
    assert split.prompt_of(records[-1], "") == messages
    transcript = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: Yellow"}
    assert split.prompt_of(transcript, "") == "\n\nHuman: Hi\n\nAssistant:"


def test_prompts_from_samples_are_beginnings(tmp_path, monkeypatch, corpus_folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "init")
    texts = [record["text"] for record in read_jsonl(corpus_folder / "corpus.jsonl")[:30]]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows += [rows[0], rows[1][:6], [*rows[2][:3], tokenizer.eos_token_id, *rows[2][3:]]]  # twice, too short, ended
    samples = [{"prompt_tokens": [tokenizer.bos_token_id], "response_tokens": row} for row in rows]
    write_jsonl(tmp_path / "free.jsonl", samples)
    arguments = ("--tokenizer", corpus_folder / "init", "--out", tmp_path, "--tokens", 20, "--eval-prompts", 10)
    run(prompts_from_samples, monkeypatch, "--samples", tmp_path / "free.jsonl", *arguments)
    prompts = read_jsonl(tmp_path / "prompts.jsonl") + read_jsonl(tmp_path / "prompts_eval.jsonl")
    assert len(prompts) == len({tuple(record["prompt_tokens"]) for record in prompts}) == 30
    for record in prompts:
        assert len(record["prompt_tokens"]) == 21 and record["prompt_tokens"][0] == tokenizer.bos_token_id
        assert any(text.startswith(record["prompt"]) for text in texts)


# Report


def write_run(folder: Path) -> None:
    """Two stages over three prompts, small enough to work by hand."""
    responses = {"dpo": ["The box.", "happy", "sad sad"], "policy": ["happy", "glad love", "It is sad."]}
    for name, texts in responses.items():
        rows = [{"index": n, "sample": 0, "prompt": f"Prompt {n}.", "response": t} for n, t in enumerate(texts)]
        extra = [{"response_tokens": [0] * (n + 1), "finish": "stop" if n else "length"} for n in range(3)]
        write_jsonl(folder / f"{name}.jsonl", [row | more for row, more in zip(rows, extra, strict=True)])
        steps = [{"step": s, "time": 0.5, "train/dpo/loss": 1 / s, "train/policy/loss": 2 / s} for s in (1, 2, 3)]
        write_jsonl(folder / f"{name}.metrics.jsonl", steps)
    figure = {"mean": 2.5, "stderr": 0.25, "count": 3}
    write_json(folder / "dpo.json", {"kl_reference": figure})
    write_json(folder / "policy.json", {"kl_reference": figure | {"mean": 4.0}, "kl_dpo": figure})
    write_json(folder / "accuracy.json", {"dpo_reward": {"mean": 0.625, "stderr": 0.05, "count": 64}})
    entries = [
        {
            "label": label,
            "samples": f"{n}.jsonl",
            "evaluation": f"{n}.json",
            "metrics": f"{n}.metrics.jsonl",
            "model": n,
        }
        for label, n in (("DPO", "dpo"), ("AlignDistil", "policy"))
    ]
    (folder / "inspect.html").touch()
    write_json(folder / "stages.json", {"accuracy": "accuracy.json", "inspect": "inspect.html", "stages": entries})


def test_report_has_the_numbers_worked_by_hand(tmp_path, monkeypatch) -> None:
    write_run(tmp_path)
    run(report, monkeypatch, "--run", tmp_path, "--stages", tmp_path / "stages.json", "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    dpo, policy = written["stages"]
    two, five = 2 / math.sqrt(19), 5 / math.sqrt(40)  # R of s = 2 and of s = 5
    # DPO: 0, two, -two. Mean 0, variance two², standard error two / sqrt 3.
    assert dpo["true_reward"]["mean"] == pytest.approx(0, abs=1e-15)
    assert dpo["true_reward"]["stderr"] == pytest.approx(two / math.sqrt(3), rel=1e-12)
    # AlignDistil: two, five, -two.
    assert policy["true_reward"]["mean"] == pytest.approx(five / 3, rel=1e-12)
    assert dpo["length"] == {"mean": 2.0, "stderr": pytest.approx(1 / math.sqrt(3)), "count": 3}
    assert dpo["finished"]["mean"] == pytest.approx(2 / 3)
    assert dpo["distinct_words"]["mean"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert policy["kl_dpo"] == {"mean": 2.5, "stderr": 0.25, "count": 3} and "kl_dpo" not in dpo
    # Differences by prompt: two, five - two, 0.
    differences = [two, five - two, 0.0]
    mean = five / 3
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3)
    (compared,) = written["differences"]
    assert (compared["stage"], compared["baseline"]) == ("AlignDistil", "DPO")
    assert compared["true_reward"]["mean"] == pytest.approx(mean, rel=1e-12)
    assert compared["true_reward"]["stderr"] == pytest.approx(stderr, rel=1e-12)

    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| AlignDistil | {five / 3:.3f} ± " in text
    assert "| 2.50 ± 0.25 | 4.00 ± 0.25 | 2.0 ± 0.6 | 66.7% |" in text
    assert "| DPO reward | 62.5 ± 5.0 | 64 |" in text
    assert "[inspect.html](../inspect.html) shows held-out pairs" in text
    assert "| AlignDistil | +0.79 | glad love |" in text
    images = re.findall(r"!\[.*\]\((.*)\)", text)
    assert set(images) == {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"reward.png", "reward_against_kl.png", "reward_histogram.png", "training.png"} <= set(images)


def test_report_without_a_true_reward_says_so(tmp_path, monkeypatch) -> None:
    write_run(tmp_path)
    arguments = ("--run", tmp_path, "--stages", tmp_path / "stages.json", "--out", tmp_path / "out", "--reward", "none")
    run(report, monkeypatch, *arguments)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "There is no known true reward for this data" in text and "| true reward |" not in text
    assert not (tmp_path / "out" / "reward.png").exists() and (tmp_path / "out" / "kl.png").exists()
    assert "true_reward" not in json.loads((tmp_path / "out" / "report.json").read_text())["stages"][0]


def test_several_samples_of_a_prompt_count_as_one_value() -> None:
    rows = [{"index": n // 2, "response_tokens": [0], "finish": "stop", "response": t} for n, t in enumerate("abcd")]
    stage = summary.Stage("x", "", rows, {}, [], [0.0, 1.0, 0.5, 0.9])
    figure = summary.stage_figures(stage)["true_reward"]
    assert figure == {"mean": pytest.approx(0.6), "stderr": pytest.approx(0.1), "count": 2}


def test_verdict_asks_for_two_standard_errors() -> None:
    assert "is above that of DPO" in summary.verdict("A", "DPO", {"mean": 0.2, "stderr": 0.1, "count": 9})
    assert "is below that of DPO" in summary.verdict("A", "DPO", {"mean": -0.3, "stderr": 0.1, "count": 9})
    assert "do not differ" in summary.verdict("A", "DPO", {"mean": 0.19, "stderr": 0.1, "count": 9})


def test_a_broken_line_is_named(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text('{"index": 1}\n{"index"\n')
    with pytest.raises(SystemExit, match=r"x.jsonl, line 2: not JSON"):
        read_jsonl(tmp_path / "x.jsonl", ["index"])
