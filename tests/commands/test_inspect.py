"""`aligndistil inspect`: every number worked out with transformers, and the page as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_aligndistil.commands.inspect import InspectConfig, check, inspect, read_config
from megatron_aligndistil.commands.inspection_page import render
from megatron_aligndistil.config import build
from megatron_aligndistil.errors import ConfigError, DataError
from tests.commands.test_cli import PROGRAM, succeeds
from tests.engine.tiny import make_checkpoint, make_pairs
from tests.workers import Workers

MODELS = ("policy", "dpo", "reverse")
EVIL = (
    "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"><!-- <script> ${x} {{data}}"
)
PAIRS = [
    {"prompt": "Once upon a time", "chosen": "there was a girl\n\nnamed Lily.", "rejected": "a <b>cat</b> & a 😀"},
    {"prompt": f"One day {EVIL}", "chosen": f"Tim saw {EVIL}", "rejected": "the\tdog"},
    {"prompt": "He was", "chosen": "sad.", "rejected": "happy, and so was she."},
]
LAYOUTS = {"single": (1, {}), "tp2": (2, {"tp": 2}), "dp2": (2, {})}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Three models that differ a little, pairs, and a page of them."""
    path, source = tmp_path_factory.mktemp("inspect"), shared_data / "stories260K" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    run(**settings(path))
    return path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": str(folder / "pairs.jsonl"),
        "out": str(folder / "page.html"),
        "models": {name: str(folder / name) for name in MODELS},
        "algorithm": {"r": 5},
        "precision": {"dtype": "fp32"},
        "micro_size": 2,
        **changes,
    }


def run(**values: Any) -> None:
    """Call it in a worker too."""
    inspect(build(InspectConfig, values))


def run_in_worker(values: dict[str, Any]) -> None:
    run(**values)


class Elements(HTMLParser):
    """Every element with its attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.texts.append((self.elements[-1][1].get("id") or self.elements[-1][0], data))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def embedded(page: Path) -> dict[str, Any]:
    return json.loads("".join(text for name, text in Elements(page.read_text()).texts if name == "data"))


@cache
def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def dense(folder: Path, tokens: list[int], num_prompt: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The values at the states that predict a response, and log-probabilities [n, V] of the models and the teacher."""
    logprobs = []
    for name in MODELS:
        with torch.no_grad():
            logprobs.append(load(folder / name)(torch.tensor([tokens])).logits[0, num_prompt - 1 : -1].log_softmax(-1))
    policy, dpo, reverse = logprobs
    tvd = (dpo.exp() - reverse.exp()).abs().sum(1) / 2
    alpha = 5 * tvd + 1e-3
    teacher = (dpo + alpha[:, None] * (dpo - reverse)).log_softmax(1)
    targets = torch.tensor(tokens[num_prompt:])[:, None]
    values = {
        "reward": (dpo - reverse).gather(1, targets)[:, 0],
        "tvd": tvd,
        "alpha": alpha,
        "kl": (policy.exp() * (policy - teacher)).sum(1),
    }
    return values, [*logprobs, teacher]


def assert_numbers(folder: Path, record: dict[str, Any], response: dict[str, Any]) -> None:
    """All that the page says of one response."""
    own = response["tokens"]
    values, distributions = dense(folder, record["prompt"] + own, len(record["prompt"]))
    for key, expected in values.items():
        np.testing.assert_allclose(response["values"][key], expected, rtol=2e-4, atol=2e-5, err_msg=key)
        total = [float(expected.sum()), float(expected.mean())]
        np.testing.assert_allclose(response["totals"][key], total, rtol=2e-4, atol=1e-4, err_msg=key)
    for index, logprobs in enumerate(distributions):
        target = logprobs.gather(1, torch.tensor(own)[:, None])[:, 0]
        np.testing.assert_allclose(response["logprobs"][index], target, rtol=2e-4, atol=2e-4)
        total = response["totals"][[*MODELS, "teacher"][index]]
        np.testing.assert_allclose(total, [float(target.sum()), float(target.mean())], rtol=2e-4)
        top = np.array(response["top"][index]).reshape(len(own), -1, 2)
        np.testing.assert_allclose(top[..., 1], logprobs.exp().topk(5).values, rtol=1e-3, atol=1e-6)
        # Tokens of like probability may change places, so a token is held to its own.
        of_tokens = logprobs.exp().gather(1, torch.tensor(top[..., 0].astype(int)))
        np.testing.assert_allclose(top[..., 1], of_tokens, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number(workers: Workers, folder: Path, tmp_path: Path, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    page = folder / "page.html"
    if parallel or world_size > 1:
        page = tmp_path / "page.html"
        workers.run(world_size, run_in_worker, settings(folder, out=str(page), parallel=parallel, micro_size=1))
    data = embedded(page)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    assert [model["key"] for model in data["models"]] == [*MODELS, "teacher"]
    assert len(data["records"]) == len(PAIRS)
    for record, pair in zip(data["records"], PAIRS, strict=True):
        assert tokenizer.decode(record["prompt"], skip_special_tokens=True) == pair["prompt"]
        assert [response["name"] for response in record["responses"]] == ["chosen", "rejected"]
        for response in record["responses"]:
            assert tokenizer.decode(response["tokens"], skip_special_tokens=True) == pair[response["name"]]
            assert_numbers(folder, record, response)


def test_a_pipeline_gives_the_same_page(workers: Workers, tmp_path: Path) -> None:
    for seed, name in enumerate(MODELS):
        make_checkpoint("qwen2-tied", tmp_path / name, seed=seed)
    make_pairs(tmp_path / "pairs.jsonl", count=5, vocab_size=300)
    pages = []
    for world_size, parallel in ((1, {}), (4, {"pp": 2, "tp": 2})):
        workers.run(world_size, run_in_worker, settings(tmp_path, parallel=parallel))
        pages.append(embedded(tmp_path / "page.html")["records"])
    for one, other in zip(*pages, strict=True):
        assert one["prompt"] == other["prompt"]
        for mine, theirs in zip(one["responses"], other["responses"], strict=True):
            assert mine["tokens"] == theirs["tokens"]
            for key, values in mine["values"].items():
                np.testing.assert_allclose(values, theirs["values"][key], rtol=1e-3, atol=1e-5, err_msg=key)
            np.testing.assert_allclose(mine["logprobs"], theirs["logprobs"], rtol=1e-4)


def test_every_token_has_its_text(folder: Path) -> None:
    data = embedded(folder / "page.html")
    texts = data["tokens"]
    chosen, rejected = data["records"][0]["responses"]
    shown = "".join(texts[str(token)][0] for token in chosen["tokens"])
    assert shown == " there was a girl\n\nnamed Lily.</s>"
    assert texts[str(chosen["tokens"][-1])] == ["</s>", 1]
    assert "<0xF0>" in [texts[str(token)][0] for token in rejected["tokens"]]  # a byte of an emoji
    assert all(
        texts[str(token)][0] for r in (chosen, rejected) for model in r["top"] for t in model for token in t[::2]
    )


def test_the_page_is_whole_and_runs_no_text(folder: Path) -> None:
    text = (folder / "page.html").read_text()
    page = Elements(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and tags.count("style") == 1 and tags.count("title") == 1
    assert not {"img", "link", "iframe", "b"} & set(tags)
    assert not [attributes for _, attributes in page.elements if {"src", "href", "onerror"} & attributes.keys()]
    without_data = text.replace("".join(data for name, data in page.texts if name == "data"), "")
    assert not re.search(r"https?:|@import|url\(|innerHTML|eval\(", without_data)
    (policy,) = [a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")
    assert embedded(folder / "page.html")["records"][1]["prompt"]  # the text that tries to end the element did not


def test_numbers_that_are_none_and_a_hostile_name() -> None:
    data = {"source": "<img src=x>", "records": []}
    assert "<title>Token by token: &lt;img src=x&gt;</title>" in render(data)
    with pytest.raises(ValueError):
        render(data | {"beta0": float("nan")})


# What a person would do, in the page itself: what is seen afterwards becomes its title.
PERSON = """
const token = (n, response = 0) => document.querySelectorAll(`.token[data-response="${response}"]`)[n];
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const cardText = () => $("card").hidden ? null : $("card").textContent;
const background = () => token(2).style.backgroundColor;
const texts = (response) => [...document.querySelectorAll(`.token[data-response="${response}"]`)]
  .map((t) => t.textContent);
const seen = { tokens: [texts(0), texts(1)] };
token(3, 1).dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
seen.hovered = cardText();
document.body.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
seen.left = cardText();
token(0).focus(); press("ArrowRight"); press("ArrowRight");
seen.focused = Number(document.activeElement.dataset.token);
seen.card = cardText();
press("Enter"); seen.pinned = $("card").classList.contains("pinned");
press("Escape"); seen.closed = cardText();
seen.rewardColour = background();
document.querySelector("#measures input[value=tvd]").click();
setTimeout(() => {
  seen.tvdColour = background();
  document.querySelectorAll("#records a")[1].click();
  setTimeout(() => {
    seen.address = location.hash;
    seen.second = document.querySelector(".response .text").textContent;
    seen.prompt = document.querySelector(".prompt .text").textContent;
    seen.open = document.querySelector(".prompt").open;
    document.title = JSON.stringify(seen);
  }, 100);
}, 100);
"""


def in_browser(address: str) -> str:
    """The page's elements once its script has run, as HTML."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser among {', '.join(BROWSERS)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_in_a_browser_by_address(folder: Path) -> None:
    """As it is written, under its own security policy, at a place that the address names."""
    text = in_browser((folder / "page.html").as_uri() + "#record=2&by=kl&response=2&token=3")
    page = Elements(text)
    record = embedded(folder / "page.html")["records"][1]
    assert len(page.of_class("token")) == sum(len(response["tokens"]) for response in record["responses"])
    assert all("background-color" in (each.get("style") or "") for each in page.of_class("token"))
    assert [each["data-token"] for each in page.of_class("shown")] == ["2"]
    assert "img" not in [tag for tag, _ in page.elements] and "<title>Token by token" in text
    assert "token 3 of" in text and text.count("<table") == 3


def test_a_person_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """Pointer, keys, measures and records; without the security policy, which would not let this script in."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", (folder / "page.html").read_text())
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{PERSON}</script></body>"))
    found = in_browser((tmp_path / "page.html").as_uri())
    (title,) = [text for name, text in Elements(found).texts if name == "title"][:1]
    seen = json.loads(title)
    data = embedded(folder / "page.html")
    chosen, rejected = data["records"][0]["responses"]
    assert [len(tokens) for tokens in seen["tokens"]] == [len(chosen["tokens"]), len(rejected["tokens"])]
    assert seen["tokens"][0][0] == "there" and seen["tokens"][0][-1] == "</s>" and "⏎\n" in seen["tokens"][0]
    assert f"token 4 of {len(rejected['tokens'])}, id {rejected['tokens'][3]}" in seen["hovered"]
    assert seen["left"] is None and seen["focused"] == 2 and seen["pinned"] is True and seen["closed"] is None
    for model, likeliest in enumerate(chosen["top"]):
        first = likeliest[2][1]
        assert f"{100 * first:.1f}%" in seen["card"], data["models"][model]
    assert all(model["name"] in seen["card"] for model in data["models"])
    assert seen["rewardColour"] != seen["tvdColour"] and "--size" in seen["tvdColour"]
    assert seen["address"] == "#record=2&by=tvd" and seen["open"] is False
    assert EVIL.split("{{")[0] in seen["second"].replace("·", " ") and "One day" in seen["prompt"]


def test_one_prompt_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "algorithm": {"name": "aligndistil", "teacher": "vanilla_adaptive", "r": 2},
                "models": {"policy": str(folder / "reverse"), "dpo": str(folder / "dpo")},
                "data": {"train": "pairs.jsonl", "max_length": 64},
                "run": {"dir": str(folder)},  # whose policy is the one that was trained
            }
        )
    )
    asked = ["--prompt", "[yes", "--response", "12: 3", "--out", "out/page.html", "--top", "2"]
    result = succeeds(tmp_path, *PROGRAM, "inspect", "--config", "run.yaml", *asked)
    assert "out/page.html, to be opened in a browser, shows one prompt and response" in result.stdout
    data = embedded(tmp_path / "out" / "page.html")
    assert [model["path"] for model in data["models"]] == [
        *(str(folder / n) for n in ("policy", "dpo", "reverse")),
        None,
    ]
    assert [model["key"] for model in data["models"]] == ["policy", "dpo", "reference", "teacher"]
    assert "vanilla_adaptive: z* = z_ref + α_t" in data["teacher"] and data["measures"][0]["name"] == "DPO reward"
    (response,) = data["records"][0]["responses"]
    assert "".join(data["tokens"][str(token)][0] for token in data["records"][0]["prompt"]) == "<s> [yes"
    assert "".join(data["tokens"][str(token)][0] for token in response["tokens"]) == " 12: 3</s>"
    assert all(len(each) == 4 for model in response["top"] for each in model)


def test_without_a_policy_and_responses_as_generated(folder: Path, tmp_path: Path) -> None:
    records = [{"prompt_tokens": [1, 403], "response_tokens": [407, 2]}, {"prompt": "He", "response": "was"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    models = {name: str(folder / name) for name in MODELS[1:]}
    run(**settings(folder, models=models, data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "page.html")))
    data = embedded(tmp_path / "page.html")
    assert [measure["key"] for measure in data["measures"]] == ["reward", "tvd", "alpha"]
    assert [record["responses"][0]["name"] for record in data["records"]] == ["response", "response"]
    assert data["records"][0]["responses"][0]["tokens"] == [407, 2]


REQUIRED = ["--models.dpo", "d", "--models.reverse", "r", "--out", "o.html"]
WRONG = {
    "no data": (REQUIRED, "needs --data FILE, or --prompt TEXT with --response TEXT"),
    "a prompt alone": ([*REQUIRED, "--prompt", "a"], "needs --data FILE, or --prompt"),
    "both": ([*REQUIRED, "--data", "f", "--prompt", "a", "--response", "b"], "and not both"),
    "no reverse": (
        ["--models.dpo", "d", "--data", "f", "--out", "o"],
        "needs --models.reverse for the teacher adaptive",
    ),
    "no reference": ([*REQUIRED, "--data", "f", "--algorithm.teacher", "vanilla"], "needs --models.reference for"),
    "another algorithm": ([*REQUIRED, "--data", "f", "--algorithm.name", "dpo"], "and algorithm.name is dpo; give"),
    "misspelt key": ([*REQUIRED, "--data", "f", "--algorithm.rr", "1"], "unknown configuration key algorithm.rr"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_told(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(read_config(arguments))


def test_data_that_is_wrong_is_told_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    with pytest.raises(
        DataError, match="data.jsonl line 1: a record with the keys question cannot be read as responses"
    ):
        run(**settings(folder, data=str(tmp_path / "data.jsonl")))
    with pytest.raises(DataError, match="there is no token to look at"):
        run(**settings(folder, data=None, prompt="Once", response=" "))
