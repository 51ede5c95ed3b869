"""The same prompts and completions in another model's tokens, and where in the text both kinds of tokens stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.credit.alignment import Span, decoded_spans
from tokengrain.credit.base import row_of
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.formats import Example
from tokengrain.data.render import Rendered, Renderer
from tokengrain.data.tokenize import Encoder, Tokens, seam
from tokengrain.errors import DataError, ModelError


@dataclass(frozen=True)
class Places:
    """The characters of one completion's tokens in the text that the reward model reads.

    Attributes:
        policy: a span for each token of the policy's completion.
        reward: a span for each of the reward model's tokens of it.
    """

    policy: list[Span]
    reward: list[Span]


@dataclass(frozen=True)
class _Text:
    """A prompt with one completion as the reward model reads it, and the policy's tokens in it."""

    rendered: Rendered
    policy: list[Span]
    ended: bool


class Retokenizer:
    """Turns a batch in the policy's tokens into one in the reward model's.

    A prompt of messages is rendered with the reward model's chat template, and the completion as its answer; other
    prompts are decoded. A completion that the policy ended (its last token is a special one) ends with the reward
    model's end of turn or EOS, one that was cut short does not.

    Args:
        tokenizer: the policy's.
        reward_tokenizer: the reward model's.
    """

    def __init__(self, tokenizer: Any, reward_tokenizer: Any) -> None:
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        config = TokenizeConfig(add_eos=reward_tokenizer.eos_token_id is not None)
        self.encoder, self.renderer = Encoder(reward_tokenizer, config), Renderer(reward_tokenizer, config)

    def __call__(self, batch: TokenBatch) -> tuple[TokenBatch, list[Places]]:
        """The batch in the reward model's tokens, and the places of each completion's tokens.

        Raises:
            DataError: a completion of several turns, whose text belongs to the policy's chat template.
            ModelError: rows of messages, and the reward model's tokenizer has no chat template.
        """
        batch = batch.to("cpu")
        texts = [self._text(batch, c) for c in range(batch.n_completions)]
        tokens = self.encoder([t.rendered.text for t in texts])
        samples, places = [], []
        for group in range(batch.n_prompts):
            members = (batch.group == group).nonzero()[:, 0].tolist()
            sample, spans = self._sample([texts[c] for c in members], [tokens[c] for c in members])
            if not sample.prompt_ids or not all(c.ids for c in sample.completions):
                raise DataError(
                    "nothing is left of the prompt or a completion in the reward model's tokens",
                    row=row_of(batch, members[0]),
                    value=texts[members[0]].rendered.text,
                    expected="text that its tokenizer knows, or a tokenizer with BOS and EOS",
                )
            samples.append(replace(sample, row=row_of(batch, members[0])))
            places += spans
        return TokenBatch.from_samples(samples, batch.prompt_role), places

    def _text(self, batch: TokenBatch, completion: int) -> _Text:
        group = int(batch.group[completion])
        start, end = batch.completion_offsets[completion : completion + 2].tolist()
        if not bool(batch.counted[start:end].all()):
            raise DataError(
                "a completion in which not every token counts (several turns, or tool output) cannot be read by a "
                "reward model with another tokenizer",
                row=row_of(batch, completion),
                expected="completions of one turn, or a reward model with the policy's tokenizer",
            )
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
            place = (rendered.prompt_end, len(kept))
            return replace(rendered, text=kept, contents=(place,), closed=False)
        if not ended:
            return replace(rendered, text=rendered.text[: place[1]], closed=False)
        return rendered

    def _sample(self, texts: list[_Text], tokens: list[Tokens]) -> tuple[Sample, list[Places]]:
        """One prompt with its completions in the reward model's tokens."""
        cut = seam(tokens, [t.rendered.prompt_end for t in texts])
        head = self.encoder.head(texts[0].rendered, tokens[0])
        prompt = [*head, *tokens[0].ids[:cut]]
        if not prompt and self.encoder.bos_id is not None:
            prompt = [self.encoder.bos_id]
        completions, places = [], []
        for text, found in zip(texts, tokens, strict=True):
            own = found.ids[cut:]
            # A completion that was cut short has no EOS, unless nothing else is left of it (half a character, a space).
            tail = self.encoder.tail(text.rendered, found) if text.ended or not own else []
            spans = self._spans(text, found, prompt, cut)
            spans += [(len(text.rendered.text),) * 2 for _ in tail]
            completions.append(Completion(own + tail))
            places.append(Places(text.policy, spans))
        return Sample(prompt, completions), places

    def _spans(self, text: _Text, tokens: Tokens, prompt: list[int], cut: int) -> list[Span]:
        """The characters of the reward model's tokens behind the prompt."""
        if tokens.starts is not None and tokens.ends is not None:
            return list(zip(tokens.starts[cut:], tokens.ends[cut:], strict=True))
        decoded, spans = decoded_spans(self.reward_tokenizer, prompt, tokens.ids[cut:])
        first = text.rendered.text.rfind(decoded)
        if first < 0:
            raise ModelError(
                f"the reward model's tokenizer {type(self.reward_tokenizer).__name__} tells no offsets and does not "
                f"give the text back: got {decoded[:60]!r}; expected a part of {text.rendered.text[-80:]!r}"
            )
        return [(first + low, first + high) for low, high in spans]
