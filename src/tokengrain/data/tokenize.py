"""Text -> token ids, and where among the tokens a position in the text lies.

The seam. Prompt and completion are tokenised together, because that is what the model is given, and
tokenizers merge across the place where they meet. A token that contains a character of the completion belongs
to the completion, even if it also contains the end of the prompt. All completions of a prompt share its token
ids, so the prompt is the longest common beginning of the tokens that hold nothing but prompt; whatever else
there is goes to the completions, and counts. Hence always `prompt_ids + completion_ids` = the tokens of the
whole text (+ EOS).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from tokengrain.data.config import TokenizeConfig
from tokengrain.data.render import Rendered, template_text
from tokengrain.data.sequences import common_length
from tokengrain.errors import ModelError
from tokengrain.files import fingerprint

# How byte-level tokenizers write a space.
SPACE = "Ġ"


@dataclass
class Tokens:
    """The tokens of a text.

    Attributes:
        ids: token ids, special tokens that the tokenizer adds by itself not included.
        starts, ends: the characters `[start, end)` of each token; None if the tokenizer does not tell.
        ids_of: tokenises another text in the same way; used where there are no offsets.
    """

    text: str
    ids: list[int]
    starts: list[int] | None = None
    ends: list[int] | None = None
    ids_of: Callable[[str], list[int]] | None = field(default=None, repr=False)

    def within(self, position: int) -> int:
        """How many tokens at the start hold only characters before `position`."""
        if self.ends is not None:
            return bisect_right(self.ends, position)
        return common_length(self._ids_before(position), self.ids)

    def touching(self, position: int) -> int:
        """How many tokens at the start hold at least one character before `position` (or none at all)."""
        if self.starts is not None:
            return bisect_right(self.starts, position - 1)
        before = self._ids_before(position)
        shared = common_length(before, self.ids)
        return shared + (shared < len(before))

    def _ids_before(self, position: int) -> list[int]:
        if self.ids_of is None:
            raise ValueError("tokens have neither offsets nor a tokenizer")
        return self.ids_of(self.text[:position])


class Encoder:
    """Tokenises texts with a tokenizer: many at a time, with offsets where it has them.

    Attributes:
        prefix: ids that the tokenizer puts before a text by itself (BOS).
        bos_id: BOS, for a prompt that would otherwise be empty; None if there is none.
        eos_id: EOS, or None if the config does not ask for it.

    Raises:
        ModelError: `config.add_eos` is set and the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Any, config: TokenizeConfig) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id if config.add_eos else None
        if config.add_eos and self.eos_id is None:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} has no EOS token, got eos_token None; "
                "expected one, since EOS ends every completion (or `add_eos: false`)"
            )
        self.prefix = self._own_prefix()
        self._spaces: dict[int, tuple[int, ...]] = {}
        self._trimmed = tokenizer.is_fast and self._trims_offsets()

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, without special tokens that are not in the text."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [Tokens(text, self._ids(text), ids_of=self._ids) for text in texts]
        found = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = []
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"]):
            if self._trimmed:
                offsets = [self._with_spaces(i, start, end) for i, (start, end) in zip(ids, offsets)]
            starts, ends = zip(*offsets) if offsets else ((), ())
            tokens.append(Tokens(text, ids, _not_decreasing(starts), _not_decreasing(ends)))
        return tokens

    def head(self, rendered: Rendered, tokens: Tokens) -> list[int]:
        """Ids to put before the tokens: what the tokenizer adds by itself, BOS never twice."""
        if rendered.special or (self.prefix and tokens.ids[: len(self.prefix)] == self.prefix):
            return []
        return self.prefix

    def tail(self, rendered: Rendered, tokens: Tokens) -> list[int]:
        """Ids to put behind the tokens: EOS, unless a token that ends the text is there already."""
        if self.eos_id is None or rendered.closed or tokens.ids[-1:] == [self.eos_id]:
            return []
        return [self.eos_id]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _trims_offsets(self) -> bool:
        """Whether offsets leave out the spaces that byte-level tokens begin with (as Llama 3's do)."""
        probe = " a a"
        found = self.tokenizer(probe, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = self.tokenizer.convert_ids_to_tokens(found["input_ids"])
        return any(
            token.startswith(SPACE) and probe[start : start + 1] != " "
            for token, (start, _) in zip(tokens, found["offset_mapping"])
        )

    def _with_spaces(self, token_id: int, start: int, end: int) -> tuple[int, int]:
        """The characters of a token whose offsets were trimmed."""
        if token_id not in self._spaces:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            counts = (len(token) - len(rest) for rest in (token.lstrip(SPACE), token.rstrip(SPACE)))
            self._spaces[token_id] = (*counts, len(token))
        before, behind, length = self._spaces[token_id]
        if before == length:  # nothing but spaces: reported as empty, at its end (or, in front, at 0)
            end = max(end, length)
            return end - length, end
        return max(start - before, 0), end + behind

    def _own_prefix(self) -> list[int]:
        probe = "a"
        plain = self._ids(probe)
        full = list(self.tokenizer(probe, verbose=False)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start]
        return [self.bos_id] if self.bos_id is not None and full[:1] == [self.bos_id] else []


def seam(tokens: Sequence[Tokens], prompt_end: Sequence[int]) -> int:
    """How many tokens at the start are the prompt that all these texts share (see the top of the file)."""
    whole = [t.within(end) for t, end in zip(tokens, prompt_end)]
    shared = tokens[0].ids[: whole[0]]
    for other, count in zip(tokens[1:], whole[1:]):
        shared = shared[: common_length(shared, other.ids[:count])]
    return len(shared)


def tokenizer_fingerprint(tokenizer: Any, config: TokenizeConfig | None = None) -> str:
    """16 hex digits that identify what a tokenizer does: vocabulary, rules, special tokens, chat template.

    Args:
        tokenizer: the tokenizer.
        config: if given, its settings that change token ids or spans are included.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not what the tokenizer is.
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    parts: list[Any] = [rules, dict(tokenizer.special_tokens_map), tokenizer.chat_template]
    if config is not None:
        names = ("max_length", "max_prompt_length", "truncation_side", "add_eos")
        values = {name: getattr(config, name) for name in names}
        parts.append({**values, "chat_template": template_text(config.chat_template)})
        parts.append(dict(config.chat_template_kwargs))
        if config.span_config is not None:
            parts.append(config.span_config.describe())
    return fingerprint(parts)


def _not_decreasing(positions: Sequence[int]) -> list[int]:
    """Some normalisers report tokens without characters of their own at 0; they go with what precedes."""
    return list(accumulate(positions, max))
