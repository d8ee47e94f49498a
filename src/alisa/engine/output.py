"""The text of a running request: grows token by token, and ends before the first stop string."""

from __future__ import annotations

from alisa.model.tokenizer import Detokenizer


class TextStream:
    """Turns token ids into text that can be shown at once.

    What might be the beginning of a stop string is held back until the next tokens decide.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""
        self._shown: list[str] = []
        self.stopped = False
        """A stop string has been reached; nothing more will be shown."""

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token."""
        return self._release(self._detokenizer.feed(token_id), final=False)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return self._release(self._detokenizer.flush(), final=True)

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + new
        cuts = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            self._held, ready = "", pending[: min(cuts)]
        else:
            keep = 0 if final else max((_overlap(pending, stop) for stop in self._stop), default=0)
            ready, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        if ready:
            self._shown.append(ready)
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
