"""Single tokens as text for people to read."""

from __future__ import annotations

from megatron_aligndistil.data.tokenizer import Tokenizer, special_ids, to_text

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """Token ids -> the text that each adds to what stands before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether it is a control token, such as the end of sequence."""
        return token in self._special

    def text(self, token: int) -> str:
        """The token's text with its leading space; bytes that are no whole character as the vocabulary's name for them.

        Ids beyond the tokenizer's, for which a model may have rows, are named by number.
        """
        once, twice = (to_text(self._tokenizer, [token] * times, skip_special_tokens=False) for times in (1, 2))
        # The second of two, for many tokenizers take the space off the beginning of a text.
        text = twice[len(once) :]
        if text and _BROKEN not in text:
            return text.strip() if self.is_special(token) else text
        name = self._tokenizer.convert_ids_to_tokens(token)
        return _bytes(name) if isinstance(name, str) and name else f"<{token}>"


def _bytes(name: str) -> str:
    """ASCII or `<0xE2>` for the byte-level alphabet's stand-ins; any other name as it is."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    values = {character: value for value, character in bytes_to_unicode().items()}
    if name.startswith("<") or any(character not in values for character in name):
        return name
    found = [values[character] for character in name]
    return "".join(chr(value) if 0x20 <= value < 0x7F else f"<0x{value:02X}>" for value in found)
