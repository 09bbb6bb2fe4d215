"""Text from tokens as they arrive: whole characters only, and stop strings cut out.

A piece of a byte-fallback or byte-level vocabulary can be a part of a character, and some
tokenizers decode the first token of a call differently from the same token later on. So text
is decoded with the settled tokens before it as context, and what may still change is held
back: an incomplete UTF-8 sequence, and the beginning of a possible stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An incomplete UTF-8 sequence is at most three bytes, each decoded as at most one replacement.
_MAX_INCOMPLETE = 3

DecodeFn = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one growing completion.

    Pieces returned by `push` and `finish` concatenate to the same text, however the tokens are
    divided between calls.

    Attributes:
      text: all text returned so far.
      stopped: a stop string was found; the text ends just before it.
    """

    def __init__(self, decode: DecodeFn, *, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        """Args:
        decode: `Tokenizer.decode`.
        stop: strings that end the completion and are not part of it; of several, the one that is complete first.
        prompt: tokens before the completion: context for decoding, not part of the text.
        """
        if "" in stop:
            raise ValueError(f"stop={list(stop)!r}: an empty stop string would end every completion at once")
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens = list(prompt)
        # Tokens before `_settled` are decoded for good; those from `_context` on are decoded
        # again with each new token, so that the text after `_settled` is read in context.
        self._context = 0
        self._settled = len(self._tokens)
        self._num_returned_after_settled = 0
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that is now certain."""
        if self.stopped:
            return ""
        self._tokens.extend(tokens)
        context = self._decode(self._tokens[self._context : self._settled])
        fresh = self._decode(self._tokens[self._context :])[len(context) :]
        whole = _without_incomplete_end(fresh)
        piece = whole[self._num_returned_after_settled :]
        if len(whole) == len(fresh):
            self._context, self._settled = self._settled, len(self._tokens)
            self._num_returned_after_settled = 0
        else:
            self._num_returned_after_settled += len(piece)
        return self._release(piece, at_end=False)

    def finish(self) -> str:
        """Returns what was held back: no more tokens will come."""
        if self.stopped:
            return ""
        context = self._decode(self._tokens[self._context : self._settled])
        fresh = self._decode(self._tokens[self._context :])[len(context) :]
        return self._release(fresh[self._num_returned_after_settled :], at_end=True)

    def _release(self, piece: str, *, at_end: bool) -> str:
        self._held += piece
        # The one that is complete first, whatever else the same piece completes: pieces must not matter.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)[1]], ""
        else:
            keep = 0 if at_end else _possible_stop(self._held, self._stop)
            split = len(self._held) - keep
            out, self._held = self._held[:split], self._held[split:]
        self.text += out
        return out


def _without_incomplete_end(text: str) -> str:
    for _ in range(_MAX_INCOMPLETE):
        text = text.removesuffix(REPLACEMENT)
    return text


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins some stop string."""
    longest = min(len(text), max((len(s) for s in stop), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
