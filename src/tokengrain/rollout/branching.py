"""`Branching`: further completions that leave others where the model was uncertain for a while.

The paper of ARES (arXiv 2510.08457) describes it and its released code leaves it out: when the entropy of a window of
tokens is high, another completion is sampled from the tokens before it, each window once and not too many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.data.tokens import StopStrings
from tokengrain.methods._entropy_window import (
    Mode,
    Triggers,
    batch_threshold,
    branch_positions,
    high_entropy,
    measured,
    trigger_flags,
    trigger_tokens,
)
from tokengrain.rollout.sampler import (
    FinishReason,
    PromptItem,
    Rollouts,
    SampledCompletion,
    Sampler,
    SamplingConfig,
    needs_tokenizer,
)
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.prepare import causal_lm
from tokengrain.scoring.score import score
from tokengrain.settings import Count, Share, keyword_types, validate_settings

PROMPTS_AT_A_TIME = 8


@dataclass(frozen=True)
class _Branch:
    """Where a completion is left: after `length` tokens of completion `parent` of prompt `prompt`."""

    prompt: int
    parent: int
    length: int


@dataclass(eq=False)
class Branching:
    """Samples `n` completions of each prompt with another sampler, and branches off some of them.

    A branch begins with the tokens of its parent up to where it leaves; they are its context and do not count, so
    that no token is trained on twice. Groups get up to `per_prompt` completions more.

    Args:
        sampler: draws completions and continuations.
        model: gives the entropies: nats of its own distribution (temperature 1, all tokens).
        tokenizer: needed for triggers and stop strings.
        window, quantile, mode: which windows are high, see `tokengrain.methods._entropy_window`; the threshold is that
            of the completions at hand, of this process alone.
        triggers: words at which a completion may be left: "english", a list, or None: every token.
        per_completion, per_prompt: most branches; of a prompt those of the highest entropy.
    """

    name: ClassVar[str] = "branching"
    sampler: Sampler
    model: nn.Module
    tokenizer: Any = None
    _: KW_ONLY
    window: Count = 4
    quantile: Share = 0.95
    mode: Mode = "paper"
    triggers: Triggers = None
    per_completion: Count = 1
    per_prompt: Count = 4

    def __post_init__(self) -> None:
        self.given = {name: getattr(self, name) for name in keyword_types(Branching)}
        validate_settings("sampler 'branching'", Branching, self.given)
        self.trigger_mask = trigger_tokens(self.tokenizer, self.triggers, "sampler 'branching'")

    def refresh(self, model_or_path: Any) -> None:
        """Sample from these weights from now on; entropies are those of a model in this process."""
        self.sampler.refresh(model_or_path)
        if isinstance(model_or_path, nn.Module):
            self.model = model_or_path

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt and their branches."""
        started = time.perf_counter()
        needs_tokenizer(self.tokenizer, sampling.stop)
        found = self.sampler.sample(prompts, n=n, sampling=sampling)
        branches = self._branches(found)
        groups = [list(group) for group in found.groups]
        stops = StopStrings(self.tokenizer, sampling.stop) if sampling.stop else None
        for branch, continuation in zip(branches, self._continued(found, branches, sampling), strict=True):
            joined = _joined(found.groups[branch.prompt][branch.parent], branch, continuation)
            # A stop string may begin before the branch, where the continuation's sampler does not see it.
            end = stops.length(joined.ids) if stops is not None else None
            groups[branch.prompt].append(joined if end is None else _cut(joined, end, "stop"))
        return replace(found, groups=tuple(map(tuple, groups)), seconds=time.perf_counter() - started)

    def _branches(self, found: Rollouts) -> list[_Branch]:
        batch = found.to_batch()
        entropy, segments = self._entropies(batch), batch.segments
        values = measured(entropy, segments, mode=self.mode, window=self.window)
        tau = batch_threshold(entropy, segments, mode=self.mode, window=self.window, quantile=self.quantile)
        triggers = trigger_flags(self.trigger_mask, batch.labels)
        high = high_entropy(values, segments, threshold=tau, triggers=triggers)
        # The first token has nothing before it to share.
        flags = high.mask & (segments.positions > 0)
        fires = branch_positions(flags, segments, window=self.window, limit=self.per_completion)
        first = segments.offsets[:-1].tolist()
        firsts = [found.group.index(g) for g in range(len(found.prompts))]
        taken: list[_Branch] = []
        places = sorted(fires.nonzero()[:, 0].tolist(), key=lambda t: -float(values[t]))
        for place in places:
            completion = int(segments.ids[place])
            prompt = found.group[completion]
            if sum(b.prompt == prompt for b in taken) < self.per_prompt:
                taken.append(_Branch(prompt, completion - firsts[prompt], place - first[completion]))
        return sorted(taken, key=lambda b: (b.prompt, b.parent, b.length))

    def _entropies(self, batch: TokenBatch) -> Tensor:
        """Entropy of every token `[N]`, nats."""
        everyone, parts = range(batch.n_prompts), []
        with evaluating(self.model):
            for start in everyone[::PROMPTS_AT_A_TIME]:
                part = batch.select(everyone[start : start + PROMPTS_AT_A_TIME])
                entropy = score(self.model, part, ("entropy",)).entropy
                assert entropy is not None  # it was asked for
                parts.append(entropy.to(batch.device))
        return torch.cat(parts)

    def _continued(
        self, found: Rollouts, branches: Sequence[_Branch], sampling: SamplingConfig
    ) -> list[SampledCompletion]:
        """A continuation of each branch, of at most as many tokens as its parent could have had there."""
        items = []
        for number, b in enumerate(branches):
            prompt, parent = found.prompts[b.prompt], found.groups[b.prompt][b.parent]
            # A row of its own, so that it draws other numbers than its parent.
            row = f"{prompt.row}/branch {number} of {b.parent} at {b.length}"
            items.append(prompt.then(parent.ids[: b.length], row))
        out: dict[int, SampledCompletion] = {}
        for part in self._together(items, branches, sampling.max_new_tokens):
            room = sampling.max_new_tokens - min(branches[i].length for i in part)
            drawn = self.sampler.sample([items[i] for i in part], n=1, sampling=replace(sampling, max_new_tokens=room))
            for i, completion in zip(part, drawn.completions, strict=True):
                left = sampling.max_new_tokens - branches[i].length
                out[i] = completion if len(completion.ids) <= left else _cut(completion, left, "length")
        return [out[i] for i in range(len(items))]

    def _together(self, items: Sequence[PromptItem], branches: Sequence[_Branch], longest: int) -> list[list[int]]:
        """Which branches are sampled in one call: all with room for the longest, or else those of equal length."""
        if not items:
            return []
        config: Any = causal_lm(self.model).config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        room = longest - min(b.length for b in branches)
        if positions is None or max(len(item.ids) for item in items) + room <= positions:
            return [list(range(len(items)))]
        lengths = sorted({b.length for b in branches})
        return [[i for i, b in enumerate(branches) if b.length == length] for length in lengths]


def _cut(completion: SampledCompletion, length: int, reason: FinishReason) -> SampledCompletion:
    """Its first tokens, and why there are no more."""
    return replace(
        completion,
        ids=completion.ids[:length],
        sampling_logps=None if completion.sampling_logps is None else completion.sampling_logps[:length],
        raw_logps=None if completion.raw_logps is None else completion.raw_logps[:length],
        finish_reason=reason,
    )


def _joined(parent: SampledCompletion, branch: _Branch, continuation: SampledCompletion) -> SampledCompletion:
    def both(name: str) -> list[float] | None:
        before, after = getattr(parent, name), getattr(continuation, name)
        return None if before is None or after is None else before[: branch.length] + after

    return SampledCompletion(
        parent.ids[: branch.length] + continuation.ids,
        both("sampling_logps"),
        both("raw_logps"),
        continuation.finish_reason,
        context=branch.length,
    )
