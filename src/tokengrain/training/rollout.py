"""What an online step is made with: the ranks, the prompts, and a rollout scored, cut and put together."""

from __future__ import annotations

import copy
import operator
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import datetime
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import Report
from tokengrain.data.rows import Rows, load_rows
from tokengrain.data.tokens import Clock
from tokengrain.errors import DataError, RecipeError, RunError, fingerprint, require
from tokengrain.method import Rollout
from tokengrain.rollout.sampler import (
    PromptItem,
    Rollouts,
    SampledCompletion,
    SamplingConfig,
    derived_seed,
    encode_prompts,
)
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.prepare import unwrapped
from tokengrain.scoring.score import in_parts, score
from tokengrain.training.buffer import concatenate
from tokengrain.training.critic import Critic
from tokengrain.training.step import OLD_LOGPS, MicroRecord, all_gather
from tokengrain.vision import seen


@dataclass(frozen=True)
class _Failed:
    """What a rank sends in place of a value when its work has failed."""

    rank: int
    message: str


@dataclass
class Ranks:
    """This rank, and how it talks to the others; every rank must call `exchange` equally often."""

    rank: int = 0
    world: int = 1
    link: Callable[[Any], list[Any]] = all_gather  # gives the values of all ranks, in their order
    _guarded: bool = field(default=False, init=False)
    _known: bool = field(default=False, init=False)  # the failure that ends the work under way, on all ranks

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order. Raises RunError if another rank's work failed, see `together`."""
        values = self.link(value)
        failed = next((v for v in values if isinstance(v, _Failed)), None)
        if failed is not None:
            self._known = True
            raise RunError(f"the rollout failed on another rank, rank {failed.rank}: {failed.message}")
        return values

    def largest(self, number: int) -> int:
        return max(self.exchange(number))

    def together(self, work: Callable[[], Any]) -> Any:
        """`work()`, which may exchange; if it fails on one rank it fails on all, so that none waits for another.

        A rank that fails says so in place of the next value that it would have exchanged. The others hear of it
        there, wherever they are in their work. May be nested. Raises its own error, or RunError for another rank's.
        """
        if self.world == 1:
            return work()
        if self._guarded:
            return self._met(work)
        self._guarded, self._known = True, False
        try:
            return self._met(work)
        except Exception as error:  # whatever it is: the other ranks must hear of it, once
            if not self._known:
                self.link(_Failed(self.rank, str(error) or type(error).__name__))
            raise
        finally:
            self._guarded = False

    def _met(self, work: Callable[[], Any]) -> Any:
        """`work()`, and then nobody continues before all have done theirs."""
        result = work()
        self.exchange(None)
        return result


# ---- Prompts as training data: token ids with stable row ids, and the order in which they are drawn ----


class PromptDataset(Sequence[PromptItem]):
    """Prompts in memory, no two with the same `row`, which persistent state goes by.

    `name` is for messages, `report` says what became of the rows that they were made of.
    """

    def __init__(self, items: Iterable[PromptItem], *, name: str = "train", report: Report | None = None) -> None:
        self.report = report
        self.items, self.name = [replace(i, row=_plain(i.row, name)) for i in items], name
        require(self.items, DataError, "there are no prompts", file=name, expected="at least one row")
        for item in self.items:
            expected = "at least one (BOS, say)"
            require(item.ids, DataError, "the prompt has no tokens", file=name, row=item.row, expected=expected)
        row, count = Counter(str(i.row) for i in self.items).most_common(1)[0]
        what = "several prompts have the same id"
        require(count == 1, DataError, what, file=name, row=row, field="id", expected="its own")
        self.by_row = {item.row: item for item in self.items}
        self.fingerprint = fingerprint([fingerprint([i.row, i.ids, *seen(i.vision)]) for i in self.items])
        self.clock: Clock | None = None  # of a chat template that writes the date
        self.remake: Callable[[datetime], PromptDataset] | None = None

    def set_time(self, now: datetime) -> None:
        """Let the chat template write this date, as when the run began that is resumed."""
        if self.clock is not None and self.remake is not None and not self.clock.reads(now):
            made = self.remake(now)
            self.items, self.by_row, self.fingerprint = made.items, made.by_row, made.fingerprint
            self.clock.now = now

    @classmethod
    def from_rows(cls, *given: Any, name: str, clock: Clock | None = None, **options: Any) -> PromptDataset:
        """Prompts of rows; other arguments as for `encode_prompts`."""
        clock, report = clock or Clock(), Report()
        items = encode_prompts(*given, clock=clock, report=report, **options)
        made = cls(items, name=name, report=report)
        if clock.shown:
            made.clock = clock
            made.remake = lambda now: cls.from_rows(*given, name=name, clock=Clock(now), **options)
        return made

    @classmethod
    def of(
        cls, data: Any, processor: Any, config: TokenizeConfig | None = None, *, name: str = "train"
    ) -> PromptDataset:
        """Prompts of a `PromptDataset`, of `PromptItem`s, or of rows or their file (see `encode_prompts`)."""
        if isinstance(data, PromptDataset):
            return data
        if isinstance(data, (str, PathLike, Rows)):
            read = load_rows(data)
            return cls.from_rows(read, processor, config, name=read.name)
        name, rows = getattr(data, "name", name), list(data)
        if not rows or isinstance(rows[0], PromptItem):
            return cls(rows, name=name)
        what = "rows of text need a tokenizer (processing_class) to become prompts; or pass PromptItems"
        require(processor is not None, RecipeError, what)
        return cls.from_rows(rows, processor, config, name=name, file=name)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]


def _plain(row: Any, name: str) -> int | str:
    """A row's id as checkpoints can hold it; numpy's whole numbers become Python's."""
    if isinstance(row, str):
        return str(row)
    try:
        return operator.index(row)
    except TypeError:
        what, expected = "a prompt's id cannot be kept in a checkpoint", "a whole number or text"
        raise DataError(what, file=name, field="id", value=row, expected=expected) from None


class PromptOrder:
    """An endless sequence of prompts: pass after pass over the data, each in an order of its own if shuffled."""

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._pass, self._order = -1, list(range(size))

    def __getitem__(self, position: int) -> int:
        """Index of the prompt at `position`, counted from the start of training."""
        number, place = divmod(position, self.size)
        if self.shuffle and number != self._pass:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "prompts", number))
            self._pass, self._order = number, torch.randperm(self.size, generator=generator).tolist()
        return self._order[place]


class PromptSource:
    """Draws prompts for all ranks. `drawn`, how many so far on all of them, is all that a checkpoint needs."""

    def __init__(self, prompts: PromptDataset, order: PromptOrder, ranks: Ranks) -> None:
        self.prompts, self.order, self.ranks, self.drawn = prompts, order, ranks, 0

    def draw(self, count: int) -> tuple[list[PromptItem], list[PromptItem]]:
        """This rank's `count` next prompts, and the same with what their random numbers go by.

        Prompt i of a draw is rank i % world's, so that a minibatch holds the same prompts whatever the ranks.
        """
        world, seen = self.ranks.world, Counter[int]()
        items, seeds = [], []
        for place in range(count * world):
            prompt = self.order[self.drawn + place]
            if place % world == self.ranks.rank:
                item = self.prompts[prompt]
                items.append(item)
                # Drawn twice, at the end of one pass and at the start of the next, it must not give the same twice.
                seeds.append(replace(item, row=f"{item.row}/{seen[prompt]}") if seen[prompt] else item)
            seen[prompt] += 1
        self.drawn += count * world
        return items, seeds


# ---- One rollout ahead: sampled in a thread, from weights of its own, while the policy is trained ----


class Round:
    """A round of sampling. Called, it samples; once it has begun, a thread does, and a call waits for it.

    `step`: how many optimiser steps the weights have seen that it samples from.
    """

    def __init__(self, work: Callable[[], Rollouts], step: int) -> None:
        self.work, self.step = work, step
        self._thread: threading.Thread | None = None
        self._found: Any = None
        self.error: BaseException | None = None

    def begin(self, device: torch.device) -> Self:
        """Sample in a thread from now on; nothing waits for it when the process ends."""
        self._thread = threading.Thread(target=self._run, args=(device,), name="rollout ahead", daemon=True)
        self._thread.start()
        return self

    def _run(self, device: torch.device) -> None:
        try:
            if device.type == "cuda":  # each thread has a current device of its own
                torch.cuda.set_device(device)
            self._found = self.work()
        except BaseException as error:  # raised where the rollout is wanted
            self.error = error

    def settle(self, seconds: float | None = None) -> None:
        """Wait until the thread has ended, however it did."""
        if self._thread is not None:
            self._thread.join(seconds)

    def __call__(self) -> Rollouts:
        if self._thread is None:
            return self.work()
        self.settle()
        if self.error is not None:
            raise self.error
        sampled: Rollouts = self._found
        return sampled


class PolicyCopy:
    """The policy's weights as they were at the last `refresh`. What is not trained is shared with it, not copied."""

    def __init__(self, policy: nn.Module) -> None:
        shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
        # It keeps `requires_grad`, by which torch chooses its kernels: sampling rounds as the policy's own would.
        self.policy, self.model = policy, copy.deepcopy(policy, shared).eval()
        self.stopped = False
        unwrapped(self.model).register_forward_pre_hook(self._go_on)

    def _go_on(self, *_: Any) -> None:
        require(not self.stopped, RunError, "the run has ended")

    @torch.no_grad()
    def refresh(self) -> None:
        self.stopped = False
        for own, theirs in zip(self.model.parameters(), self.policy.parameters(), strict=True):
            if own is not theirs:
                own.copy_(theirs)


def packed_round(sampled: Rollouts, step: int) -> dict[str, Any]:
    """One rank's round, JSON-like: its completions, not its prompts, which follow from the order."""
    groups = [[vars(completion) for completion in group] for group in sampled.groups]
    return {"step": step, "seconds": sampled.seconds, "metrics": dict(sampled.metrics), "groups": groups}


def unpacked_round(
    states: Sequence[dict[str, Any]], prompts: Sequence[PromptItem], sampling: SamplingConfig, ranks: Ranks
) -> Round:
    """This rank's part of what `packed_round` gave on all ranks of then, of whom there may have been more or fewer."""
    places = range(ranks.rank, len(prompts) * ranks.world, ranks.world)
    groups = [states[place % len(states)]["groups"][place // len(states)] for place in places]
    completions = tuple(tuple(SampledCompletion(**one) for one in group) for group in groups)
    first = states[0]
    sampled = Rollouts(tuple(prompts), completions, sampling, first["seconds"], first["metrics"])
    return Round(lambda: sampled, first["step"])


POLICY = {OLD_LOGPS: "logps", "entropy": "entropy", "hidden": "hidden"}
"""Columns that the policy gives, by the name of the quantity that `score` calls them."""


@dataclass
class RolloutScorer:
    """Scores rollouts the way the trainer scores its batches: same layout, precision and micro-batches, in
    evaluation mode, without gradient.
    """

    model: Any  # the policy, without wrappers
    reference: Any  # gives `ref_logps`; None if nothing needs them
    critic: Critic | None  # gives `values`
    _: KW_ONLY
    max_tokens: int | None
    mixed_precision: Callable[[], AbstractContextManager[Any]]  # around every forward pass
    options: dict[str, Any]  # passed to `score`
    passes: Callable[[int], int] | None = None  # see `in_parts`

    def add(self, rollout: Rollout, names: Collection[str]) -> None:
        """Add those of `names` to the rollout's columns that it does not have."""
        wanted = set(names) - rollout.quantities.keys()
        if not wanted or not rollout.batch.n_completions:
            return
        with torch.no_grad():
            measure = lambda part: self._measure(part, wanted)  # noqa: E731
            found = in_parts(rollout.batch, self.max_tokens, measure, self.passes)
        rollout.quantities.update(found)

    def _measure(self, part: TokenBatch, wanted: set[str]) -> dict[str, Tensor]:
        found = {}
        if own := sorted(wanted & POLICY.keys()):
            with evaluating(self.model), self.mixed_precision():
                scores = score(self.model, part, [POLICY[name] for name in own], **self.options)
            found = {name: getattr(scores, POLICY[name]).detach() for name in own}
        if "ref_logps" in wanted:
            with self.mixed_precision():
                found["ref_logps"] = self.reference(part, {"logps"}).logps.detach()
        if "values" in wanted:
            assert self.critic is not None  # checked when the trainer was made
            with self.mixed_precision():
                found["values"] = self.critic.values(part).detach()
        return found


PLACE = "place"
"""Column of an update's batches: the token's index in the rollout."""


def take_scores(rollout: Rollout, records: Sequence[MicroRecord]) -> None:
    """Put what the micro-batches of an update measured into the rollout's columns."""
    for name, of in ((OLD_LOGPS, "logps"), ("entropy", "entropy")):
        found = [(record.batch.columns[PLACE], getattr(record, of)) for record in records]
        if found and found[0][1] is not None:
            places, values = (torch.cat(parts) for parts in zip(*found, strict=True))
            rollout.quantities[name] = values[places.argsort()]


# ---- Taking prompts out of a rollout, and putting rounds of sampling together ----

_PER_TOKEN = ("token_rewards", "advantages", "weights")


def kept(rollout: Rollout) -> Tensor:
    """`rollout.keep`, all True where it is None: bool `[G]`."""
    if rollout.keep is not None:
        return rollout.keep
    return torch.ones(rollout.batch.n_prompts, dtype=torch.bool, device=rollout.rewards.device)


def select_prompts(rollout: Rollout, prompts: Sequence[int]) -> Rollout:
    """The rollout of these prompts, with all that is known of them but `keep`."""
    own: dict[str, Any] = {name: getattr(rollout, name) for name in _PER_TOKEN if getattr(rollout, name) is not None}
    batch = rollout.batch.with_columns(**{f"_{name}": values for name, values in own.items()}).select(prompts)
    taken: dict[str, Any] = {name: batch.columns.pop(f"_{name}") for name in own}
    completions = torch.cat([(rollout.group == g).nonzero()[:, 0] for g in prompts])
    return replace(
        rollout,
        batch=batch,
        rewards=rollout.rewards[completions],
        by_name={name: values[completions] for name, values in rollout.by_name.items()},
        correct=None if rollout.correct is None else rollout.correct[completions],
        prompt_ids=tuple(rollout.prompt_ids[g] for g in prompts),
        keep=None,
        **taken,
    )


def chosen_prompts(rounds: Sequence[Rollout], target: int) -> Rollout:
    """The first `target` prompts that filters kept; if there is none, one that they did not, marked so."""
    parts, left = [], target
    for one in rounds:
        prompts = kept(one).nonzero()[:left, 0].tolist()
        left -= len(prompts)
        if prompts:
            parts.append(select_prompts(one, prompts))
    if parts:
        return merge(parts)
    # Every rank takes part in what rollout credits exchange.
    alone = select_prompts(rounds[0], [0])
    alone.keep = torch.zeros_like(kept(alone))
    return alone


def merge(rounds: Sequence[Rollout]) -> Rollout:
    """Rounds of the same rollout as one: their prompts one after the other, metrics averaged over rounds."""
    first = rounds[0]
    if len(rounds) == 1:
        return first
    names = set.intersection(*(set(r.quantities) for r in rounds))
    batches = [replace(r.batch, columns={n: r.quantities[n] for n in sorted(names)}) for r in rounds]
    metrics = {name: [r.metrics[name] for r in rounds if name in r.metrics] for r in rounds for name in r.metrics}
    correct = [r.correct for r in rounds if r.correct is not None]
    rewarded = any(r.token_rewards is not None for r in rounds)
    return replace(
        first,
        batch=concatenate(batches),
        rewards=torch.cat([r.rewards for r in rounds]),
        by_name={name: torch.cat([r.by_name[name] for r in rounds]) for name in first.by_name},
        correct=torch.cat(correct) if len(correct) == len(rounds) else None,
        token_rewards=torch.cat([_token_rewards(r) for r in rounds]) if rewarded else None,
        prompt_ids=tuple(p for r in rounds for p in r.prompt_ids),
        keep=None if all(r.keep is None for r in rounds) else torch.cat([kept(r) for r in rounds]),
        metrics={name: sum(values) / len(values) for name, values in metrics.items()},
    )


def _token_rewards(one: Rollout) -> Tensor:
    return one.rewards.new_zeros(one.segments.total) if one.token_rewards is None else one.token_rewards
