"""The text of tokens that come one at a time: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what tokenizers decode an unfinished character to
_MOST_BYTES = 4  # of a character, and so tokens
_CONTEXT = 8  # tokens of a prompt that tell how its first continuation is written, with or without a space


class Detokeniser:
    """Tokens -> the characters that each completes.

    A token's text depends on those before it (a leading space, the bytes of one character), so each is decoded behind
    those that came with the last whole characters, the first one behind the end of the prompt: prompt and pieces put
    together are one text. A character that is not finished is held back.

    Args:
        to_text: token ids -> text.
        prompt: tokens that come before.
    """

    def __init__(self, to_text: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._to_text = to_text
        self._window = _context(to_text, prompt)
        self._num_old = len(self._window)  # tokens of the window whose text is out
        self._num_known = len(to_text(self._window).rstrip(_BROKEN))  # characters of the window's text that are out

    def add(self, token: int) -> str:
        """The text that `token` completes; often one word, sometimes nothing."""
        self._window.append(token)
        text = self._to_text(self._window)
        whole = text.rstrip(_BROKEN)
        piece = whole[self._num_known :]
        self._num_known = max(self._num_known, len(whole))
        if piece and whole == text:
            self._move_on()
        return piece

    def _move_on(self) -> None:
        """Leave behind what the next token does not depend on."""
        newest = self._window[self._num_old :]
        text = self._to_text(newest)
        if text and not text.endswith(_BROKEN):
            self._window, self._num_known = newest, len(text)
        self._num_old = len(self._window)


def _context(to_text: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from the beginning of a character on; none where that cannot be told."""
    for length in range(_CONTEXT, _CONTEXT - _MOST_BYTES, -1):
        if not to_text(prompt[-length:]).startswith(_BROKEN):
            return list(prompt[-length:])
    return []


class StopStrings:
    """Holds back the end of a text for as long as it may be the beginning of a stop string.

    Attributes:
        met: whether a stop string has come; nothing is given out from it on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.met = False

    def add(self, piece: str) -> str:
        """What may be given out now that `piece` has come."""
        text = self._held + piece
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.met, self._held = True, ""
            return text[: min(places)]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back, once nothing more can come."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
