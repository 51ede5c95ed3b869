"""The same prompts and completions in another model's tokens, and where in the text both kinds of tokens stand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch, row_of, without_vision
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.formats import Example
from tokengrain.data.tokens import Encoder, Rendered, Renderer, Tokens, prompt_boundary
from tokengrain.errors import DataError, ModelError, RecipeError, require

# Token scores across tokenizers: from the tokens of one to those of another, by the characters they share.
#
# The rule. A token's score is the mean of the scores of the other tokenizer's tokens that share characters with it,
# weighted by the number of characters shared. So what a token receives, times its characters, adds up to the same over
# a text on both sides. A token without characters (EOS, other special tokens) takes the score of the other
# tokenizer's last token, which is its EOS where the text is complete. Where all of a token's characters are dropped by
# the other tokenizer (white space), it takes the score of the token before them.

# How many tokens before a token are decoded with it: enough for a character of four bytes and a leading space.
CONTEXT = 5
UNFINISHED = "\ufffd"

Span = tuple[int, int]


def aligned_scores(scores: Tensor, spans: Sequence[Span], target: Sequence[Span]) -> Tensor:
    """Scores `[R]` of tokens at `spans`, carried over to tokens at `target` `[T]`; see the top of the file.

    Spans are characters `[start, end)` of the same text, empty for a token without any; tokens that only together
    make a character share its span. The last score is that of EOS or, in a text cut short, of the last token.
    """
    if scores.shape != (len(spans),) or not len(spans):
        raise ValueError(f"expected one score per span and at least one, got {tuple(scores.shape)} and {len(spans)}")
    solid = [i for i, (start, end) in enumerate(spans) if end > start]
    ends = [spans[i][1] for i in solid]
    rows, columns, shared = [], [], []
    for row, (start, end) in enumerate(target):
        near = bisect_right(ends, start)  # the first token that reaches beyond our start
        found = []
        for i in solid[near:] if end > start else ():
            if spans[i][0] >= end:
                break
            found.append((i, min(end, spans[i][1]) - max(start, spans[i][0])))
        if not found:
            before = solid[max(near - 1, 0)] if solid and end > start else len(spans) - 1
            found = [(before, 1)]
        rows += [row] * len(found)
        columns += [i for i, _ in found]
        shared += [n for _, n in found]
    index = torch.tensor(rows, dtype=torch.long, device=scores.device)
    weights = torch.tensor(shared, dtype=scores.dtype, device=scores.device)
    taken = weights * scores[torch.tensor(columns, dtype=torch.long, device=scores.device)]
    zeros = scores.new_zeros(len(target))
    return zeros.index_add(0, index, taken) / zeros.index_add(0, index, weights)


def decoded_spans(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text that `ids` add behind `before`, and the characters of it that each token stands for.

    Special tokens have none. Tokens that only together make a character (bytes of it) all have that character's span.
    """
    special = set(tokenizer.all_special_ids)
    text = ""
    spans: list[Span] = []
    context, pending = list(before[-CONTEXT:]), list[int]()
    known, shown = _decoded(tokenizer, context), ""
    for place, token in enumerate(ids):
        pending.append(token)
        if token not in special:
            shown = _decoded(tokenizer, context + pending)[len(known) :]
        follows = place + 1 < len(ids) and ids[place + 1] not in special
        if follows and len(pending) < CONTEXT and (not shown or shown.endswith(UNFINISHED)) and token not in special:
            continue  # the rest of the character is yet to come
        spans += [(len(text), len(text) + len(shown))] * len(pending)
        text += shown
        context = (context + pending)[-CONTEXT:]
        pending, known, shown = [], _decoded(tokenizer, context), ""
    return text, spans


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Places(NamedTuple):
    """Where one completion's tokens, the policy's and the reward model's, stand in the text that the latter reads."""

    policy: list[Span]
    reward: list[Span]


class _Text(NamedTuple):
    """A prompt with one completion as the reward model reads it, and the policy's tokens in it."""

    rendered: Rendered
    policy: list[Span]
    ended: bool


class Retokenizer:
    """Turns a batch in the policy's tokens into one in the reward model's.

    A prompt of messages is rendered with the reward model's chat template, and the completion as its answer; other
    prompts are decoded. A completion whose last token is a special one ends with the reward model's end of turn or EOS.
    """

    def __init__(self, tokenizer: Any, reward_tokenizer: Any) -> None:
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        config = TokenizeConfig(add_eos=reward_tokenizer.eos_token_id is not None)
        self.encoder, self.renderer = Encoder(reward_tokenizer, config), Renderer(reward_tokenizer, config)

    def __call__(self, batch: TokenBatch) -> tuple[TokenBatch, list[Places]]:
        without_vision(batch, "the reward model reads its text with another tokenizer")
        batch = batch.to("cpu")
        texts = [self._text(batch, c) for c in range(batch.n_completions)]
        tokens = self.encoder([t.rendered.text for t in texts])
        samples, places = [], []
        for group in range(batch.n_prompts):
            members = (batch.group == group).nonzero()[:, 0].tolist()
            sample, spans = self._sample([texts[c] for c in members], [tokens[c] for c in members])
            sample.row, text = row_of(batch, members[0]), texts[members[0]].rendered.text
            what = "nothing is left of the prompt or a completion in the reward model's tokens"
            expected = "text that its tokenizer knows, or a tokenizer with BOS and EOS"
            left = sample.prompt_ids and all(c.ids for c in sample.completions)
            require(left, DataError, what, row=sample.row, value=text, expected=expected)
            samples.append(sample)
            places += spans
        return TokenBatch.from_samples(samples), places

    def _text(self, batch: TokenBatch, completion: int) -> _Text:
        group = int(batch.group[completion])
        start, end = batch.completion_offsets[completion : completion + 2].tolist()
        what = "a completion in which not every token counts (several turns, or tool output) cannot be read by a "
        what += "reward model with another tokenizer"
        expected = "completions of one turn, or a reward model with the policy's tokenizer"
        require(batch.counted[start:end].all(), DataError, what, row=row_of(batch, completion), expected=expected)
        prompt_ids, ids = batch.prompt(group).tolist(), batch.completion(completion).tolist()
        text, spans = decoded_spans(self.tokenizer, prompt_ids, ids)
        ended = bool(ids) and ids[-1] in self.tokenizer.all_special_ids
        messages = batch.raw[group].get("prompt") if batch.raw else None
        if messages is None or isinstance(messages, str):
            prompt = self.tokenizer.decode(prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            rendered = Rendered(prompt + text, len(prompt), None, ((len(prompt), len(prompt + text)),))
        else:
            rendered = self._conversation(messages, text, ended)
        first = rendered.contents[0][0] if rendered.contents[0] else rendered.prompt_end
        return _Text(rendered, [(first + low, first + high) for low, high in spans], ended)

    def _conversation(self, messages: Any, text: str, ended: bool) -> Rendered:
        answer = [{"role": "assistant", "content": text}]
        rendered = self.renderer(Example(list(messages), (answer,), ("completion",), ({},), ("",)))[0]
        place = rendered.contents[0]
        if place is None:  # the template changed the text; what the policy wrote is what is judged
            kept = rendered.text[: rendered.prompt_end] + text
            return replace(rendered, text=kept, contents=((rendered.prompt_end, len(kept)),), closed=False)
        return rendered if ended else replace(rendered, text=rendered.text[: place[1]], closed=False)

    def _sample(self, texts: list[_Text], tokens: list[Tokens]) -> tuple[Sample, list[Places]]:
        cut = prompt_boundary(tokens, [t.rendered.prompt_end for t in texts])
        head = self.encoder.head(texts[0].rendered, tokens[0])
        prompt = [*head, *tokens[0].ids[:cut]]
        if not prompt and self.encoder.bos_id is not None:
            prompt = [self.encoder.bos_id]
        completions, places = [], []
        for text, found in zip(texts, tokens, strict=True):
            own = found.ids[cut:]
            # A completion that was cut short has no EOS, unless nothing else is left of it (half a character, a space).
            tail = self.encoder.tail(text.rendered, found) if text.ended or not own else []
            spans = self._spans(text, found, prompt, cut) + [(len(text.rendered.text),) * 2 for _ in tail]
            completions.append(Completion(own + tail))
            places.append(Places(text.policy, spans))
        return Sample(prompt, completions), places

    def _spans(self, text: _Text, tokens: Tokens, prompt: list[int], cut: int) -> list[Span]:
        """The characters of the reward model's tokens behind the prompt."""
        if tokens.starts is not None and tokens.ends is not None:
            return list(zip(tokens.starts[cut:], tokens.ends[cut:], strict=True))
        decoded, spans = decoded_spans(self.reward_tokenizer, prompt, tokens.ids[cut:])
        first = text.rendered.text.rfind(decoded)
        what = f"the reward model's tokenizer {type(self.reward_tokenizer).__name__} gives no offsets and does not "
        what += f"give the text back: got {decoded[:60]!r}; expected a part of {text.rendered.text[-80:]!r}"
        require(first >= 0, ModelError, what)
        return [(first + low, first + high) for low, high in spans]


def retokenizer_for(tokenizer: Any, reward_tokenizer: Any) -> Retokenizer | None:
    """How a reward model reads the policy's completions; None: their token ids as they are."""
    if reward_tokenizer is None:
        return None
    missing = "reward_tokenizer is given, but not the policy's tokenizer to compare it with"
    require(tokenizer is not None, RecipeError, missing)
    return None if same_tokens(tokenizer, reward_tokenizer) else Retokenizer(tokenizer, reward_tokenizer)


def same_tokens(tokenizer: Any, other: Any) -> bool:
    """Whether token ids mean the same in both, and rows of messages look the same (where both have a template)."""
    templates = {t.chat_template for t in (tokenizer, other) if t.chat_template}
    return tokenizer is other or (tokenizer.get_vocab() == other.get_vocab() and len(templates) < 2)
