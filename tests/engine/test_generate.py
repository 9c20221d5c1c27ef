"""Sampling from Megatron models: transformers' greedy tokens, the same at any layout, true log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_aligndistil.config import ParallelConfig, PrecisionConfig
from megatron_aligndistil.engine.checkpoint import load_model, read_architecture
from megatron_aligndistil.engine.completions import Completion, Sampling
from megatron_aligndistil.engine.decoder import Decoder, Request
from megatron_aligndistil.engine.generate import MegatronSampler, gather_completions
from megatron_aligndistil.engine.model import build_model, freeze
from megatron_aligndistil.engine.parallel import parallel_session
from megatron_aligndistil.engine.schedule import Model
from megatron_aligndistil.errors import ConfigError
from tests.engine.tiny import make_checkpoint

PROMPTS = [[0, 5, 9], [0], [0, 7, 7, 30, 41, 2], [0, 99], [0, 3, 4, 5]]


def completions(
    folder: str, prompts: list[list[int]], sampling: Sampling, layout: ParallelConfig, batch_size: int
) -> list[Completion]:
    with parallel_session(layout) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_model(chunks, folder, arch, parallel)
        freeze(chunks)
        sampler = MegatronSampler(Model(chunks, arch), parallel, batch_size, as_text)
        return gather_completions(sampler.generate(prompts, sampling), parallel)


def as_text(tokens: Sequence[int]) -> str:
    """A text in which each token is one character."""
    return "".join(chr(0x4E00 + token) for token in tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that speaks with some conviction."""
    path = tmp_path_factory.mktemp("model")
    make_checkpoint("llama-tied", path)
    return path


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_equals_transformers_on_the_pretrained_model(workers, shared_data: Path, tp: int) -> None:
    folder = shared_data / "stories260K" / "hf"
    prompts = [[1, 403, 407, 261, 378], [1, 410], [1]]
    sampling = Sampling(max_new_tokens=60, temperature=0.0, seed=0, stop_tokens=frozenset({2}))
    found = workers.run(tp, completions, str(folder), prompts, sampling, ParallelConfig(tp=tp), 2)[0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, completion in zip(prompts, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :]
        assert completion.tokens == expected.tolist()
        assert completion.finish == ("stop" if completion.tokens[-1] == 2 else "length")


def test_samples_are_the_same_at_any_layout_and_batch_size(workers, folder: Path) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3, stop_tokens=frozenset({1, 50, 51, 52}))
    (alone,) = workers.run(1, completions, str(folder), PROMPTS, sampling, ParallelConfig(), 8)
    # Batches of fewer rows than prompts: finished rows make room for waiting ones, at other times in each layout.
    layouts = (
        (1, {}, 2),
        (1, {}, 4),
        (2, {"tp": 2}, 8),
        (2, {"tp": 2, "sequence_parallel": True}, 2),
        (2, {}, 1),
        (4, {"tp": 2}, 3),
        (4, {"tp": 4}, 8),
        (2, {"pp": 2}, 8),
        (2, {"pp": 2, "vpp": 2}, 3),
        (4, {"tp": 2, "pp": 2}, 3),
        (4, {"pp": 2}, 2),
    )
    for world_size, sizes, batch_size in layouts:
        layout = ParallelConfig.model_validate(sizes)
        found = workers.run(world_size, completions, str(folder), PROMPTS, sampling, layout, batch_size)
        for rank in found:
            assert [each.tokens for each in rank] == [each.tokens for each in alone]
    assert {each.finish for each in alone} <= {"stop", "length"}
    assert len({tuple(each.tokens) for each in alone}) == len(PROMPTS)
    other = workers.run(1, completions, str(folder), PROMPTS, Sampling(12, 4, frozenset({1})), ParallelConfig(), 8)[0]
    assert [each.tokens for each in other] != [each.tokens for each in alone]


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3-tied", "mistral-untied"])
def test_logprobs_are_those_of_a_full_forward(workers, tmp_path: Path, architecture: str) -> None:
    folder = tmp_path / architecture
    make_checkpoint(architecture, folder)
    sampling = Sampling(max_new_tokens=10, temperature=0.7, seed=0, stop_tokens=frozenset({1}))
    found = workers.run(2, completions, str(folder), PROMPTS, sampling, ParallelConfig(tp=2), 8)[0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, completion in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion.tokens])).logits[0].double().log_softmax(-1)
        expected = [float(logprobs[len(prompt) - 1 + index, token]) for index, token in enumerate(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_samples_follow_the_models_distribution(workers, folder: Path) -> None:
    """Chi-squared of 4,000 first tokens against the dense softmax, the rare tokens pooled."""
    count = 4000
    sampling = Sampling(max_new_tokens=1, temperature=1.5, seed=0, stop_tokens=frozenset())
    found = workers.run(2, completions, str(folder), [[0, 5, 9]] * count, sampling, ParallelConfig(tp=2), 500)[0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = (model(torch.tensor([[0, 5, 9]])).logits[0, -1].double() / 1.5).softmax(-1).numpy() * count
    observed = Counter(each.tokens[0] for each in found)
    common = [token for token in range(len(expected)) if expected[token] >= 10]
    cells = [(observed[token], expected[token]) for token in common]
    cells.append((count - sum(o for o, _ in cells), count - sum(e for _, e in cells)))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = len(cells) - 1
    assert freedom >= 5
    # Within 4 standard deviations of the statistic's mean: it has mean k and variance 2k.
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_top_k_of_one_is_greedy(workers, folder: Path) -> None:
    hot = Sampling(max_new_tokens=8, temperature=2.0, top_k=1, seed=0, stop_tokens=frozenset())
    cold = Sampling(max_new_tokens=8, temperature=0.0, seed=0, stop_tokens=frozenset())
    found = [
        workers.run(2, completions, str(folder), PROMPTS, sampling, ParallelConfig(tp=2), 8)[0]
        for sampling in (hot, cold)
    ]
    assert [each.tokens for each in found[0]] == [each.tokens for each in found[1]]


def test_a_stop_string_ends_a_response_where_it_appears(workers, folder: Path) -> None:
    free = Sampling(max_new_tokens=12, seed=3, stop_tokens=frozenset())
    (alone,) = workers.run(1, completions, str(folder), PROMPTS, free, ParallelConfig(), 8)
    stop = as_text(alone[1].tokens[4:7])
    sampling = replace(free, stop_strings=("never", stop))
    found = workers.run(2, completions, str(folder), PROMPTS, sampling, ParallelConfig(pp=2), 2)[0]
    for whole, cut in zip(alone, found, strict=True):
        end = as_text(whole.tokens).find(stop)
        length = end + len(stop) if end >= 0 else 12
        assert cut.tokens == whole.tokens[:length]
        assert cut.finish == ("stop" if end >= 0 else "length")
    assert found[1].finish == "stop"


def answers_one_by_one_and_together(folder: str, layout: ParallelConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Requests of unlike settings: each by itself, then joining and leaving one batch of three rows."""
    requests = [
        (
            number,
            prompt,
            Sampling(4 + 3 * number, number, frozenset(), 0.5 * number, top_k=(0, 5)[number % 2], top_p=0.9),
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    with parallel_session(layout) as parallel:
        arch = read_architecture(folder)
        chunks = build_model(arch, parallel, PrecisionConfig(dtype="fp32"))
        load_model(chunks, folder, arch, parallel)
        decoder = Decoder(Model(chunks, arch), parallel, num_rows=3, max_length=32, to_text=as_text)

        def answer(numbers: Sequence[int]) -> list[list[int]]:
            pending = [Request(number, prompt, sampling, 7) for number, prompt, sampling in requests]
            for number in numbers:
                decoder.add(pending[number])
                decoder.step()  # the next one joins when this one is on its way
            decoder.add(Request(99, [0, 1, 2], Sampling(20, 0, frozenset()), 0))
            decoder.cancel(99)
            while not decoder.is_idle:
                assert all(request.key != 99 for request in decoder.step())
            return [pending[number].completion().tokens for number in numbers]

        with decoder.cache.attached():
            return [answer([number])[0] for number in range(len(PROMPTS))], answer(range(len(PROMPTS)))


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}])
def test_an_answer_does_not_depend_on_its_company(workers, folder: Path, sizes: dict[str, int]) -> None:
    alone, together = workers.run(
        2, answers_one_by_one_and_together, str(folder), ParallelConfig.model_validate(sizes)
    )[0]
    assert alone == together
    assert [len(tokens) for tokens in alone] == [4, 7, 10, 13, 16]


def test_a_prompt_without_tokens_is_refused(workers, folder: Path) -> None:
    sampling = Sampling(max_new_tokens=3, seed=0, stop_tokens=frozenset())
    with pytest.raises(ConfigError, match="no tokens at all"):
        workers.run(1, completions, str(folder), [[0], []], sampling, ParallelConfig(), 8)


def test_a_response_that_does_not_fit_is_refused(workers, folder: Path) -> None:
    sampling = Sampling(max_new_tokens=300, temperature=1.0, seed=0, stop_tokens=frozenset())
    with pytest.raises(ConfigError, match="256 positions"):
        workers.run(1, completions, str(folder), PROMPTS, sampling, ParallelConfig(), 8)
