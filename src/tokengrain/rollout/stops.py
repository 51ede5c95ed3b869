"""Stop strings: where a completion ends that has none of the stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Finds the token that completes one of some strings.

    Args:
        tokenizer: a transformers tokenizer.
        strings: none empty.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token that shows at all shows at least one byte; a few more for those that do not show.
        self.window = max(len(s.encode()) for s in self.strings) + 8

    def hit(self, ids: Sequence[int]) -> bool:
        """Whether a stop string ends within the last token of `ids`."""
        text = self._text(ids[-self.window :])
        return any(s in text for s in self.strings) and not any(
            s in self._text(ids[-self.window : -1]) for s in self.strings
        )

    def length(self, ids: Sequence[int]) -> int | None:
        """How many tokens there are up to the one that completes the first stop string; None: there is none."""
        text = self._text(ids)
        if not any(s in text for s in self.strings):
            return None
        return next((end for end in range(1, len(ids) + 1) if self.hit(ids[:end])), None)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
