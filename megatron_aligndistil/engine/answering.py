"""Answers to conversations that come one by one, each handed over as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_aligndistil.data.forms import Message
from megatron_aligndistil.data.prompts import PromptEncoder
from megatron_aligndistil.data.tokenizer import Tokenizer, to_text
from megatron_aligndistil.data.tokens import stop_ids
from megatron_aligndistil.engine.completions import Completion, Sampling
from megatron_aligndistil.engine.decoder import Decoder, Request
from megatron_aligndistil.engine.parallel import Parallel
from megatron_aligndistil.engine.schedule import Model


@dataclass(frozen=True)
class Question:
    """A conversation to answer.

    Attributes:
        text: the conversation as bare text, for a tokenizer without a chat template.
        stream: number of its random stream, its own whatever else is asked: a run that goes on after a break draws what
            an unbroken one would have drawn.
    """

    messages: list[Message]
    text: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stream: int


@dataclass(frozen=True)
class Answer:
    """The answer to a question, with the tokens of its prompt, and whether that lost its beginning."""

    prompt: list[int]
    prompt_cut: bool
    completion: Completion
    text: str


class Answerer:
    """Answers with one model replica, which all its ranks call together with the same questions.

    Args:
        batch_size: answers in progress at a time.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, parallel: Parallel, batch_size: int) -> None:
        self._model, self._parallel, self._batch_size = model, parallel, batch_size
        self._encoder = PromptEncoder(tokenizer, model.arch.vocab_size)
        self._has_template = bool(tokenizer.chat_template)
        self._stop_ids = stop_ids(tokenizer)
        self._to_text = partial(to_text, tokenizer)
        self._to_text_whole = partial(to_text, tokenizer, skip_special_tokens=False)

    def answer(self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None]) -> None:
        """Answer all questions; `on_answer` gets each one's place among them and its answer, on every rank.

        Collectives: those of :class:`Decoder`.
        """
        made = [self._request(place, question) for place, question in enumerate(questions)]
        requests, cut = [request for request, _ in made], [was_cut for _, was_cut in made]
        if not requests:
            return
        decoder = Decoder(
            self._model,
            self._parallel,
            num_rows=min(self._batch_size, len(requests)),
            max_length=max(request.length + request.sampling.max_new_tokens for request in requests),
            to_text=self._to_text_whole,
        )
        # Prompts that are taken in together are padded to one length, so those of like length go together.
        for request in sorted(requests, key=lambda request: request.length):
            decoder.add(request)
        with decoder.cache.attached():
            while not decoder.is_idle:
                for request in decoder.step():
                    if request.finish is not None:
                        text = self._to_text(request.tokens)
                        prompt = list(request.prompt)
                        on_answer(request.key, Answer(prompt, cut[request.key], request.completion(), text))

    def _request(self, place: int, question: Question) -> tuple[Request, bool]:
        """The tokens of a question, with as many new ones as there is room for; and whether the prompt was cut.

        An answer gets at least half of the model's positions, or all that it may have; a longer prompt loses its
        beginning.
        """
        as_text = not self._has_template
        prompt = self._encoder.text(question.text) if as_text else self._encoder.messages(question.messages)
        positions = self._model.arch.max_positions
        longest = positions - min(question.max_tokens, positions // 2)
        is_cut, prompt = len(prompt) > longest, prompt[-longest:]
        room = min(question.max_tokens, positions - len(prompt))
        sampling = Sampling(room, question.seed, self._stop_ids, question.temperature, 0, question.top_p)
        return Request(place, prompt, sampling, stream=question.stream), is_cut
