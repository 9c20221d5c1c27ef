"""Responses to look at: a file of whatever form, or one prompt and response typed by a user."""

from __future__ import annotations

from megatron_aligndistil.config import DataConfig
from megatron_aligndistil.data.dataset import TokenDataset, load_dataset
from megatron_aligndistil.data.examples import DatasetReport
from megatron_aligndistil.data.forms import Turn
from megatron_aligndistil.data.tokenizer import Tokenizer
from megatron_aligndistil.data.tokens import Encoder, truncate
from megatron_aligndistil.errors import DataError


def load_given(config: DataConfig, tokenizer: Tokenizer) -> tuple[TokenDataset, DatasetReport]:
    """The records of `config.train` as pairs where all of them are pairs, else every response by itself.

    Raises DataError as :func:`load_dataset` does.
    """
    try:
        return load_dataset(config, config.train, tokenizer, "pairs")
    except DataError:  # a pair with a fault is told as such below too, and what is no pair may be a response
        both = config.model_copy(update={"responses": "both"})
        return load_dataset(both, config.train, tokenizer, "responses")


def one_response(prompt: str, response: str, config: DataConfig, tokenizer: Tokenizer) -> TokenDataset:
    """One example of a prompt and the response to it, within the lengths of `config`.

    Raises DataError where there is no token of the response to look at.
    """
    (row,) = Encoder(tokenizer).encode([Turn(prompt, response)], ["the prompt and response given"])
    row = truncate(row, max_prompt_length=config.max_prompt_length, max_length=config.max_length)
    if not row.num_targets:
        raise DataError("the response is empty, or the prompt alone fills max_length; there is no token to look at")
    return TokenDataset([(row,)])
