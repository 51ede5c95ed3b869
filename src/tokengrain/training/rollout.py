"""`RolloutLoop`: prompts -> samples -> rewards -> scores -> credit -> minibatches, and the state of all that."""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import Report
from tokengrain.errors import DataError, RecipeError, RunError, fingerprint
from tokengrain.method import CreditStep, CriticLike, RolloutStep
from tokengrain.rewards.suite import RewardResult, RewardSuite
from tokengrain.rollout.sampler import PromptItem, Rollouts, Sampler, derived_seed, encode_prompts
from tokengrain.scoring.head import Head
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.score import in_parts, score
from tokengrain.training.buffer import RolloutBuffer, concatenate
from tokengrain.training.config import OnlineConfig
from tokengrain.training.rollout_log import Drawn, drawn_metrics, joined_mismatch, mismatch, step_sums, summed
from tokengrain.training.step import HostBatch

# ----------------------------------------------------------------------------------------------------
# What the trainer itself computes about a rollout: old log-probabilities, entropy, reference, values.

OLD_LOGPS = "old_logps"
POLICY = {OLD_LOGPS: "logps", "entropy": "entropy", "hidden": "hidden"}


class RolloutScorer:
    """Scores rollouts the way the trainer scores its batches: same layout, precision and micro-batches, in
    evaluation mode, without gradient.

    Args:
        model: the policy, without wrappers.
        reference: gives `ref_logps`; None if nothing needs them.
        critic: gives `values`; None if there is none.
        max_tokens: per micro-batch.
        mixed_precision: a context around every forward pass.
        options: passed to `score`.
    """

    def __init__(
        self,
        model: Any,
        reference: Any,
        critic: CriticLike | None,
        *,
        max_tokens: int | None,
        mixed_precision: Callable[[], AbstractContextManager[Any]],
        options: dict[str, Any],
    ) -> None:
        self.model, self.reference, self.critic = model, reference, critic
        self.max_tokens, self.mixed_precision, self.options = max_tokens, mixed_precision, options

    def add(self, step: RolloutStep, names: Collection[str]) -> None:
        """Add those of `names` to the step's columns that it does not have."""
        wanted = set(names) - step.quantities.keys()
        if not wanted or not step.batch.n_completions:
            return

        def measure(part: TokenBatch) -> dict[str, Tensor]:
            return self._policy(part, wanted & POLICY.keys()) | self._others(part, wanted)

        with torch.no_grad():
            step.quantities.update(in_parts(step.batch, self.max_tokens, measure))

    def _policy(self, part: TokenBatch, wanted: set[str]) -> dict[str, Tensor]:
        if not wanted:
            return {}
        with evaluating(self.model), self.mixed_precision():
            scores = score(self.model, part, [POLICY[name] for name in sorted(wanted)], **self.options)
        return {name: getattr(scores, POLICY[name]).detach() for name in sorted(wanted)}

    def _others(self, part: TokenBatch, wanted: set[str]) -> dict[str, Tensor]:
        found = {}
        if "ref_logps" in wanted:
            with self.mixed_precision():
                found["ref_logps"] = self.reference(part, {"logps"}).logps.detach()
        if "values" in wanted:
            assert self.critic is not None  # checked when the trainer was made
            with self.mixed_precision():
                found["values"] = self.critic.values(part).detach()
        return found


# ----------------------------------------------------------------------------------------------------
# Prompts as training data: token ids with stable row ids, and the order in which they are drawn.


class PromptDataset(Sequence[PromptItem]):
    """Prompts in memory.

    Args:
        items: the prompts; no two with the same `row`, which persistent state goes by.
        name: in messages.
        report: what became of the rows that they were made of.

    Raises:
        DataError: no prompt, one without tokens, two with the same row, or a row that is no number and no text.
    """

    def __init__(self, items: Iterable[PromptItem], *, name: str = "train", report: Report | None = None) -> None:
        self.report = report
        self.items, self.name = [replace(i, row=_plain(i.row, name)) for i in items], name
        if not self.items:
            raise DataError("there are no prompts", file=name, expected="at least one row")
        for item in self.items:
            if not item.ids:
                raise DataError("the prompt has no tokens", file=name, row=item.row, expected="at least one (BOS, say)")
        row, count = Counter(str(i.row) for i in self.items).most_common(1)[0]
        if count > 1:
            raise DataError("several prompts have the same id", file=name, row=row, field="id", expected="its own")
        self.by_row = {item.row: item for item in self.items}
        self.fingerprint = fingerprint([fingerprint([i.row, i.ids]) for i in self.items])

    @classmethod
    def of(
        cls, data: Any, tokenizer: Any, *, name: str = "train", config: TokenizeConfig | None = None
    ) -> PromptDataset:
        """Prompts of a `PromptDataset`, of `PromptItem`s, or of rows (see `encode_prompts`).

        Raises:
            DataError: a row without a usable prompt; as the class.
            RecipeError: rows without a tokenizer.
        """
        if isinstance(data, PromptDataset):
            return data
        name, rows = getattr(data, "name", name), list(data)
        if not rows or isinstance(rows[0], PromptItem):
            return cls(rows, name=name)
        if tokenizer is None:
            raise RecipeError("rows of text need a tokenizer (processing_class) to become prompts; or pass PromptItems")
        report = Report()
        return cls(encode_prompts(rows, tokenizer, config, file=name, report=report), name=name, report=report)

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
        raise DataError(
            "a prompt's id cannot be kept in a checkpoint",
            file=name,
            field="id",
            value=row,
            expected="a whole number or text",
        ) from None


class PromptOrder:
    """An endless sequence of prompts: pass after pass over the data, each in an order of its own.

    Args:
        size: number of prompts.
        seed: another seed gives other orders.
        shuffle: False: the data's own order in every pass.
    """

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


# ----------------------------------------------------------------------------------------------------
# What the rollout loop works with: models, data, settings, and the other ranks.


@dataclass(frozen=True)
class _Failed:
    """What a rank sends in place of a value when its work has failed."""

    rank: int
    message: str


@dataclass
class Ranks:
    """This rank, and how it talks to the others.

    Attributes:
        link: gives the values of all ranks, in the order of ranks; every rank must call it equally often.
    """

    rank: int = 0
    world: int = 1
    link: Callable[[Any], list[Any]] = lambda value: [value]
    _guarded: bool = field(default=False, init=False)
    _told: bool = field(default=False, init=False)

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks.

        Raises:
            RunError: another rank's work failed, see `together`.
        """
        values = self.link(value)
        failed = next((v for v in values if isinstance(v, _Failed)), None)
        if failed is not None:
            self._told = True
            raise RunError(f"the rollout failed on another rank, rank {failed.rank}: {failed.message}")
        return values

    def largest(self, number: int) -> int:
        return max(self.exchange(number))

    def total(self, number: float) -> float:
        return float(sum(self.exchange(number)))

    def together(self, work: Callable[[], Any]) -> Any:
        """`work()`, which may exchange; if it fails on one rank it fails on all, so that none waits for another.

        A rank that fails says so in place of the next value that it would have exchanged. The others hear of it
        there, wherever they are in their work. May be nested.

        Raises:
            Exception: its own error, or `RunError` where another rank failed.
        """
        if self.world == 1:
            return work()
        if self._guarded:
            return self._met(work)
        self._guarded, self._told = True, False
        try:
            return self._met(work)
        except Exception as error:  # whatever it is: the other ranks must hear of it, once
            if not self._told:
                self.link(_Failed(self.rank, str(error) or type(error).__name__))
            raise
        finally:
            self._guarded = False

    def _met(self, work: Callable[[], Any]) -> Any:
        """`work()`, and then nobody goes on before all have done theirs."""
        result = work()
        self.exchange(None)
        return result


@dataclass
class LoopParts:
    """What a loop works with.

    Attributes:
        wanted: columns that the buffer must keep, if they are there.
        required: quantities to score for the objective, of "old_logps", "ref_logps", "entropy", "values".
        weights_taken: whether the objective takes token weights; if not, advantages are multiplied by them.
        refresh: called before sampling, for samplers that have to be given new weights.
        head_of: the policy's head.
    """

    args: OnlineConfig
    model: Any
    prompts: PromptDataset
    sampler: Sampler
    rewards: RewardSuite | None
    steps: list[CreditStep]
    scorer: RolloutScorer
    wanted: frozenset[str]
    required: frozenset[str]
    weights_taken: bool
    refresh: Callable[[], None]
    head_of: Callable[[], Head]
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)


# ----------------------------------------------------------------------------------------------------
# Taking prompts out of a rollout, and putting rounds of sampling together.

_PER_TOKEN = ("token_rewards", "advantages", "weights")


def select_prompts(step: RolloutStep, prompts: Sequence[int]) -> RolloutStep:
    """The rollout of these prompts, with all that is known of them; `keep` is not taken along."""
    own: dict[str, Any] = {name: getattr(step, name) for name in _PER_TOKEN if getattr(step, name) is not None}
    batch = step.batch.with_columns(**{f"_{name}": values for name, values in own.items()}).select(prompts)
    taken: dict[str, Any] = {name: batch.columns.pop(f"_{name}") for name in own}
    completions = torch.cat([(step.group == g).nonzero()[:, 0] for g in prompts])
    return replace(
        step,
        batch=batch,
        rewards=step.rewards[completions],
        by_name={name: values[completions] for name, values in step.by_name.items()},
        correct=None if step.correct is None else step.correct[completions],
        prompt_ids=tuple(step.prompt_ids[g] for g in prompts),
        keep=None,
        **taken,
    )


def merge(steps: Sequence[RolloutStep]) -> RolloutStep:
    """Rounds of the same rollout as one: their prompts one after the other, metrics averaged over rounds."""
    first = steps[0]
    if len(steps) == 1:
        return first
    names = set.intersection(*(set(s.quantities) for s in steps))
    batches = [replace(s.batch, columns={n: s.quantities[n] for n in sorted(names)}) for s in steps]
    metrics: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.metrics.items():
            metrics.setdefault(name, []).append(value)
    return replace(
        first,
        batch=concatenate(batches),
        rewards=torch.cat([s.rewards for s in steps]),
        by_name={name: torch.cat([s.by_name[name] for s in steps]) for name in first.by_name},
        correct=_joined([s.correct for s in steps]),
        token_rewards=_token_rewards(steps),
        prompt_ids=tuple(p for s in steps for p in s.prompt_ids),
        keep=None if all(s.keep is None for s in steps) else torch.cat([kept(s) for s in steps]),
        metrics={name: sum(values) / len(values) for name, values in metrics.items()},
    )


def kept(step: RolloutStep) -> Tensor:
    """`step.keep`, all True where it is None: bool `[G]`."""
    if step.keep is not None:
        return step.keep
    return torch.ones(step.batch.n_prompts, dtype=torch.bool, device=step.rewards.device)


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [v for v in values if v is not None]
    return torch.cat(known) if len(known) == len(values) else None


def _token_rewards(steps: Sequence[RolloutStep]) -> Tensor | None:
    """Per token; where a round has none they are 0."""
    if all(s.token_rewards is None for s in steps):
        return None
    return torch.cat(
        [s.rewards.new_zeros(s.segments.total) if s.token_rewards is None else s.token_rewards for s in steps]
    )


# ----------------------------------------------------------------------------------------------------
# `RolloutSource`: draws prompts, samples and rewards completions, filters and refills.

PHASES = ("rollout", "reward", "scoring", "credit")


class Stopwatch:
    """Seconds spent in each phase of a rollout."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


class RolloutSource:
    """Completions with their rewards.

    Args:
        parts: see `LoopParts`.

    Attributes:
        drawn: prompts drawn so far, on all ranks.
    """

    def __init__(self, parts: LoopParts) -> None:
        self.parts, self.args, self.ranks = parts, parts.args, parts.ranks
        seed = parts.args.seed if parts.args.data_seed is None else parts.args.data_seed
        self.order = PromptOrder(len(parts.prompts), seed, shuffle=parts.args.shuffle_prompts)
        self.drawn = 0

    def sample(self, index: int, drawn: Drawn, timed: Stopwatch) -> RolloutStep:
        """Rollout number `index`: sampled, rewarded, filtered and refilled. `keep` is set only where nothing is left.

        Args:
            drawn: what was sampled is added to it.

        Raises:
            RolloutError, RewardError: sampling or a reward failed; `RunError`: on another rank.
        """
        filters = [s for s in self.parts.steps if s.phase == "filter"]
        refill = any(getattr(s, "refill", False) for s in filters)
        target = count = self.args.prompts_per_rollout // self.ranks.world
        rounds: list[RolloutStep] = []
        sampled = found = 0.0
        while True:
            step = self._round(index, len(rounds), count, drawn, timed)
            with timed("credit"):
                for one in filters:
                    self.parts.scorer.add(step, one.needs)
                    one(step)
            rounds.append(step)
            missing = self.ranks.largest(target - sum(int(kept(s).sum()) for s in rounds))
            if not refill or missing <= 0 or len(rounds) > self.args.max_refills:
                break
            sampled += self.ranks.total(count)
            found += self.ranks.total(int(kept(step).sum()))
            # As many as are likely to give what is missing.
            count = target if not found else min(target, -int(-missing * sampled // found))
        drawn.refills = len(rounds) - 1
        return self._chosen(rounds, target) if filters else rounds[0]

    def _chosen(self, rounds: Sequence[RolloutStep], target: int) -> RolloutStep:
        """The first `target` prompts that filters kept; if there is none, one that they did not, marked so."""
        parts, left = [], target
        for step in rounds:
            prompts = kept(step).nonzero()[:left, 0].tolist()
            left -= len(prompts)
            if prompts:
                parts.append(select_prompts(step, prompts))
        if parts:
            return merge(parts)
        # Every rank takes part in what credit steps exchange.
        alone = select_prompts(rounds[0], [0])
        alone.keep = torch.zeros(1, dtype=torch.bool, device=self.parts.device)
        return alone

    def _round(self, index: int, number: int, count: int, drawn: Drawn, timed: Stopwatch) -> RolloutStep:
        """Sample `count` prompts on every rank and reward the completions."""
        items, seeds = self._draw(count)
        sampling = self.args.sampling().at(index)
        sampling = sampling.at(number) if number else sampling

        def sample() -> tuple[Rollouts, RewardResult | None]:
            with timed("rollout"), self.parts.scorer.mixed_precision():  # as the trainer computes
                rollouts = self.parts.sampler.sample(seeds, n=self.args.num_generations, sampling=sampling)
                rollouts = replace(rollouts, prompts=tuple(items))
            with timed("reward"):
                return rollouts, self._rewarded(rollouts)

        rollouts, result = self.ranks.together(sample)
        step = self._step(index, rollouts, result)
        drawn.add(rollouts, step, result)
        return step

    def _draw(self, count: int) -> tuple[list[PromptItem], list[PromptItem]]:
        """This rank's share of the next prompts, and the same with what their random numbers go by.

        Prompt i of a draw is rank i % world's, so that a minibatch holds the same prompts whatever the ranks.
        """
        world, seen = self.ranks.world, Counter[int]()
        items, seeds = [], []
        for place in range(count * world):
            prompt = self.order[self.drawn + place]
            if place % world == self.ranks.rank:
                item = self.parts.prompts[prompt]
                items.append(item)
                # Drawn twice, at the end of one pass and at the start of the next, it must not give the same twice.
                seeds.append(replace(item, row=f"{item.row}/{seen[prompt]}") if seen[prompt] else item)
            seen[prompt] += 1
        self.drawn += count * world
        return items, seeds

    def _rewarded(self, rollouts: Rollouts) -> RewardResult | None:
        suite = self.parts.rewards
        if suite is None:
            return None
        texts = None if suite.tokenizer is not None else [""] * len(rollouts.completions)
        return suite.score(rollouts, texts)

    def _step(self, index: int, rollouts: Rollouts, result: RewardResult | None) -> RolloutStep:
        batch = rollouts.to_batch().to(self.parts.device)
        step = RolloutStep(
            batch=batch,
            rewards=torch.zeros(batch.n_completions, device=self.parts.device),
            by_name={},
            prompt_ids=batch.rows,
            index=index,
            max_new_tokens=self.args.max_new_tokens,
            max_tokens=self.args.max_tokens_per_microbatch,
            model=self.parts.model,
            head_of=self.parts.head_of,
            exchange=self.ranks.exchange,
        )
        if result is not None:
            step.rewards = result.outcome.to(self.parts.device)
            step.by_name = {name: values.to(self.parts.device) for name, values in result.by_name.items()}
            name = self.args.correct_from or next(iter(result.by_name))
            step.correct = step.by_name[name] > 0.5  # NaN: not correct
            if result.token_rewards is not None:
                step.token_rewards = result.token_rewards.to(self.parts.device)
        return step


class RolloutLoop:
    """Gives minibatches without end; makes a new rollout when one is used up.

    Args:
        parts: what it works with.
        measure: `measure(name, value)` is called for every number of a finished rollout, on every rank with the same
            values in the same order.
        finished: called with every rollout as credit left it, and which prompts are trained on (bool `[G]`).

    Attributes:
        index: rollouts made so far. The one in the buffer is `index - 1`.
        buffer: the rollout under way; None before the first.
    """

    def __init__(
        self,
        parts: LoopParts,
        measure: Callable[[str, float], None],
        finished: Callable[[RolloutStep, Tensor], None] = lambda step, keep: None,
    ) -> None:
        self.parts, self.args, self.ranks = parts, parts.args, parts.ranks
        self.measure, self.finished = measure, finished
        self.source = RolloutSource(parts)
        self.index = 0
        self.buffer: RolloutBuffer | None = None

    def next(self) -> HostBatch:
        """The next minibatch, of a new rollout if the last one is used up.

        Raises:
            RunError: no rollout of the last `max_empty_rollouts` left anything to train on; anything failed on another
                rank, whatever it was.
            RolloutError, RewardError: sampling or a reward failed. Credit steps raise what they raise.
        """
        empty = 0
        while self.buffer is None or self.buffer.done:
            self.buffer = self.ranks.together(self._rollout)
            if self.buffer is None:
                empty += 1
                if empty >= self.args.max_empty_rollouts:
                    raise RunError(
                        f"nothing was left to train on in {empty} rollouts in a row ({self.source.drawn} prompts drawn "
                        "so far); loosen the filters, or look at the rewards: all of a prompt may earn the same"
                    )
        return next(self.buffer)

    @property
    def steps_of_rollout(self) -> int:
        """Optimiser steps of the rollout under way."""
        return self.buffer.total if self.buffer is not None else self.args.steps_per_rollout

    @property
    def passes(self) -> float:
        """Passes over the prompts so far."""
        return self.source.drawn / len(self.parts.prompts)

    # ---- One rollout ----

    def _rollout(self) -> RolloutBuffer | None:
        """Make rollout number `index`; None if nothing of it is left to train on."""
        self.parts.refresh()
        drawn, timed = Drawn(), Stopwatch()
        step = self.source.sample(self.index, drawn, timed)
        keep = kept(step)
        if self.ranks.largest(int(keep.sum())):
            with timed("scoring"):
                wanted = {OLD_LOGPS, *self.parts.required, *(n for s in self.parts.steps for n in s.needs)}
                self.parts.scorer.add(step, wanted)
            with timed("credit"):
                self._credit(step)
            keep = kept(step)
        most = self.ranks.largest(int(keep.sum()))
        self._report(drawn, step, keep, timed)
        self.index += 1
        if not most:
            return None
        self.finished(step, keep)
        return self._buffered(step, keep, most)

    def _credit(self, step: RolloutStep) -> None:
        for one in self.parts.steps:
            if one.phase != "filter":
                one(step)
        advantages = step.advantages
        if advantages is None:
            return
        if step.weights is not None and not self.parts.weights_taken:
            # Outside the clip and not negative: the same as weighing the losses.
            step.advantages = advantages = advantages * step.weights
        if advantages.shape != (step.segments.total,):
            raise RunError(f"advantages have shape {tuple(advantages.shape)}; expected {(step.segments.total,)}")
        if not bool(torch.isfinite(advantages).all()):
            completion = int(step.segments.ids[(~torch.isfinite(advantages)).nonzero()[0, 0]])
            row = step.prompt_ids[int(step.group[completion])]
            raise RunError(f"rollout {step.index}: an advantage of row {row} is not a finite number")

    def _buffered(self, step: RolloutStep, keep: Tensor, most: int) -> RolloutBuffer:
        columns = {n: v for n, v in step.quantities.items() if n in self.parts.wanted}
        if step.advantages is not None:
            columns["advantages"] = step.advantages
        if step.weights is not None and self.parts.weights_taken:
            columns["weights"] = step.weights
        dtype = step.quantity(OLD_LOGPS).dtype
        whole = replace(step.batch, columns={n: v.detach().to(dtype) for n, v in columns.items()})
        prompts = keep.nonzero()[:, 0].tolist()
        return RolloutBuffer(
            whole.select(prompts) if prompts else None,
            whole.select([0]),
            minibatches=min(self.args.minibatches, most),
            epochs=self.args.rollout_epochs,
            seed=derived_seed(self.args.seed, "minibatches", step.index),
        )

    def _report(self, drawn: Drawn, step: RolloutStep, keep: Tensor, timed: Stopwatch) -> None:
        scored = OLD_LOGPS in step.quantities
        own = {
            "drawn": drawn,
            "sums": step_sums(step, keep[step.group]) if scored else {},
            "mismatch": mismatch(step) if scored else {},
            "credit": {name: (value, 1.0) for name, value in step.metrics.items()},
            "kept": int(keep.sum()),
            "seconds": timed.seconds,
        }
        ranks = self.ranks.exchange(own)
        metrics = drawn_metrics([r["drawn"] for r in ranks])
        metrics["rollout/prompts_kept"] = float(sum(r["kept"] for r in ranks))
        metrics |= summed([r["sums"] for r in ranks]) | joined_mismatch([r["mismatch"] for r in ranks])
        metrics |= summed([r["credit"] for r in ranks])
        metrics |= {f"seconds/{name}": max(r["seconds"][name] for r in ranks) for name in PHASES}
        for name, value in metrics.items():
            self.measure(name, value)

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the buffer: JSON-like, the same on all ranks."""
        steps = {key: step.state_dict() for key, step in self._keys().items()}
        return {"index": self.index, "drawn": self.source.drawn, "credit": {k: s for k, s in steps.items() if s}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the buffer is loaded apart.

        Raises:
            RunError: the checkpoint has state of credit steps that this run does not have.
        """
        self.index, self.source.drawn, self.buffer = state["index"], state["drawn"], None
        steps = self._keys()
        if unknown := sorted(set(state["credit"]) - set(steps)):
            raise RunError(f"the checkpoint has state of credit steps {unknown}; this run has {sorted(steps)}")
        for key, stored in state["credit"].items():
            steps[key].load_state_dict(stored)

    def save_buffer(self, folder: Path) -> None:
        """Write this rank's part of the rollout under way, if anything of it is still to be used."""
        if self.buffer is not None and not self.buffer.done:
            folder.mkdir(parents=True, exist_ok=True)
            self.buffer.save(folder / f"rank-{self.ranks.rank}.pt")

    def load_buffer(self, folder: Path) -> None:
        """Take up what all ranks wrote; see `RolloutBuffer.load`."""
        paths = sorted(folder.glob("rank-*.pt"), key=lambda p: int(p.stem.removeprefix("rank-")))
        if paths:
            raw = {row: item.raw for row, item in self.parts.prompts.by_row.items()}
            self.buffer = RolloutBuffer.load(paths, self.ranks.rank, self.ranks.world, raw)

    def _keys(self) -> dict[str, CreditStep]:
        """Steps by name; a second one of a name gets a number."""
        seen, found = Counter[str](), {}
        for step in self.parts.steps:
            seen[step.name] += 1
            found[step.name if seen[step.name] == 1 else f"{step.name}-{seen[step.name]}"] = step
        return found
