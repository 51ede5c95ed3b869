"""What samplers take and give: `PromptItem`, `SamplingConfig`, `Rollouts`; the protocol `Sampler`."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import RecipeError, TokengrainError, shown

FinishReason = Literal["stop", "length"]


class RolloutError(TokengrainError):
    """Completions that could not be sampled: a server that fails, an unfit model, an answer that is no answer."""


@dataclass(frozen=True)
class PromptItem:
    """One prompt to sample from.

    Args:
        ids: token ids, BOS included where the tokenizer adds one; at least one.
        row: identifies the row in messages, logs and per-prompt state.
        raw: the row it was made from: data columns for rewards and credit sources.
    """

    ids: list[int]
    row: int | str = 0
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    The temperature is applied first, then top-k, top-p and min-p in this order, each to what the one before
    has left, as transformers does.

    Args:
        temperature: 0 takes the most probable token.
        top_p: smallest set of tokens with this probability; 1: all.
        top_k: number of most probable tokens; 0: all.
        min_p: tokens at least this times as probable as the most probable one; 0: all.
        max_new_tokens: a completion without a stop by then is truncated.
        stop: a completion ends with the token that completes one of these strings; that token is part of it.
        stop_ids: token ids that end a completion, and are part of it. None: the tokenizer's and the model's
            end-of-sequence tokens.
        seed: the same seed, prompts and weights give the same completions (a server: if it keeps to seeds).

    Raises:
        RecipeError: a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("top_k", _whole(self.top_k, 0), "a whole number >= 0 (0: all tokens)"),
            ("min_p", 0 <= self.min_p < 1, "0 <= min_p < 1"),
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number, at least 1"),
            (
                "stop",
                not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop),
                "a sequence of strings that are not empty",
            ),
            (
                "stop_ids",
                self.stop_ids is None or all(_whole(i, 0) for i in self.stop_ids),
                "token ids, or none for the model's own",
            ),
        )
        for name, good, expected in checks:
            if not good:
                raise RecipeError(f"sampling: {name} is {shown(getattr(self, name))}; expected {expected}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", tuple(int(i) for i in self.stop_ids))

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.temperature == 0

    @property
    def is_model(self) -> bool:
        """Whether completions are drawn from the model's own distribution, unchanged."""
        return self.temperature == 1 and not self.truncates

    def at(self, step: int) -> SamplingConfig:
        """The same with a seed of its own for training step `step`."""
        return replace(self, seed=derived_seed(self.seed, "step", step))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def derived_seed(*parts: Any) -> int:
    """A non-negative 62-bit seed that depends on every part, the same in every process."""
    text = "/".join(repr(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def occurrences(prompts: Sequence[PromptItem]) -> list[int]:
    """How often each prompt's row came before it: a row that is there twice must not give the same twice."""
    seen: Counter[int | str] = Counter()
    counts = []
    for prompt in prompts:
        counts.append(seen[prompt.row])
        seen[prompt.row] += 1
    return counts


@dataclass(frozen=True)
class SampledCompletion:
    """One completion. All lists have one entry per token.

    Attributes:
        ids: token ids, the end-of-sequence token included when it was drawn.
        sampling_logps: log-probability (nats) of each token under the distribution it was drawn from:
            temperature, top-k, top-p and min-p applied, renormalised. None: the sampler does not know it.
        raw_logps: log-probability under the model's own distribution (temperature 1, all tokens), which is
            what a trainer computes. None: the sampler does not know it.
        finish_reason: "stop" (a stop token or string) or "length" (truncated).
        context: how many tokens at its start were drawn for another completion that it branches off from; they are
            in `ids` and do not count.
    """

    ids: list[int]
    sampling_logps: list[float] | None
    raw_logps: list[float] | None
    finish_reason: FinishReason
    context: int = 0

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Rollouts:
    """Prompts with their sampled completions.

    Shapes: P prompts, C completions, N tokens of all completions.

    Attributes:
        prompts: the prompts, in the order they were given.
        groups: per prompt, its completions.
        sampling: the settings they were drawn with.
        seconds: time it took.
    """

    prompts: tuple[PromptItem, ...]
    groups: tuple[tuple[SampledCompletion, ...], ...]
    sampling: SamplingConfig
    seconds: float = 0.0

    @cached_property
    def completions(self) -> list[SampledCompletion]:
        """All C completions, those of a prompt next to each other."""
        return [c for group in self.groups for c in group]

    @cached_property
    def group(self) -> list[int]:
        """The prompt of each completion, C indices into `prompts`."""
        return [index for index, group in enumerate(self.groups) for _ in group]

    @cached_property
    def truncated(self) -> Tensor:
        """Completions that hit `max_new_tokens` without a stop, bool `[C]`."""
        return torch.tensor([c.truncated for c in self.completions], dtype=torch.bool)

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The data row of each completion, C mappings."""
        return [self.prompts[index].raw for index in self.group]

    def texts(self, tokenizer: Any) -> list[str]:
        """The C completions as text, without special tokens."""
        return decode(tokenizer, [c.ids for c in self.completions])

    def to_batch(self) -> TokenBatch:
        """One prompt per group, with columns over all completion tokens `[N]`.

        Tokens that a completion shares with the one it branches off from are context. Columns over the others:
        `sampling_logps` and `raw_logps` where every completion has them (see `SampledCompletion`), and
        `truncated` (1 on every token of a truncated completion), so that the mark survives `select` and `split`.
        """
        names = [
            name
            for name in ("sampling_logps", "raw_logps")
            if all(getattr(c, name) is not None for c in self.completions)
        ]
        samples = []
        for prompt, group in zip(self.prompts, self.groups, strict=True):
            completions = [
                Completion(
                    c.ids,
                    [False] * c.context + [True] * (len(c.ids) - c.context) if c.context else None,
                    columns={n: getattr(c, n)[c.context :] for n in names}
                    | {"truncated": [float(c.truncated)] * (len(c.ids) - c.context)},
                )
                for c in group
            ]
            samples.append(Sample(prompt.ids, completions, row=prompt.row, raw=prompt.raw))
        return TokenBatch.from_samples(samples)

    def metrics(self) -> dict[str, float]:
        """Lengths in tokens, the share that was truncated, tokens per second."""
        lengths = [len(c.ids) for c in self.completions]
        drawn = sum(lengths) - sum(c.context for c in self.completions)
        return {
            "rollout/completions": float(len(lengths)),
            "rollout/tokens": float(drawn),
            "rollout/length": sum(lengths) / len(lengths),
            "rollout/length_max": float(max(lengths)),
            "rollout/truncated": float(self.truncated.float().mean()),
            "rollout/tokens_per_second": drawn / self.seconds if self.seconds else 0.0,
        }

    def __iter__(self) -> Iterator[tuple[PromptItem, tuple[SampledCompletion, ...]]]:
        return iter(zip(self.prompts, self.groups, strict=True))


@runtime_checkable
class Sampler(Protocol):
    """Draws completions."""

    name: str

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError`."""
        ...

    def refresh(self, model_or_path: Any) -> None:
        """Sample from these weights from now on: a model, or the folder of a checkpoint or adapter."""
        ...


def decode(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    """Token ids as texts, without special tokens and with spaces left as they are."""
    texts = tokenizer.batch_decode([list(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return list(texts)


def checked_prompts(prompts: Sequence[PromptItem], n: int) -> tuple[PromptItem, ...]:
    """The prompts as a tuple. Raises `RolloutError` where there is nothing to sample from."""
    if not prompts:
        raise RolloutError("there are no prompts to sample from")
    if n < 1:
        raise RolloutError(f"n is {n}; expected at least 1 completion per prompt")
    for prompt in prompts:
        if not prompt.ids:
            raise RolloutError(f"row {prompt.row}: the prompt has no tokens; expected at least one (BOS, say)")
    return tuple(prompts)
