"""`RolloutLoop`: prompts -> samples -> rewards -> scores -> credit -> minibatches, and the state of all that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengrain.errors import RunError
from tokengrain.rollout.base import derived_seed
from tokengrain.training.counting import HostBatch
from tokengrain.training.online.buffer import RolloutBuffer
from tokengrain.training.online.joining import kept
from tokengrain.training.online.measures import Drawn, drawn_metrics, joined_mismatch, mismatch, step_sums, summed
from tokengrain.training.online.sampling import PHASES, RolloutSource, Stopwatch
from tokengrain.training.online.scoring import OLD_LOGPS
from tokengrain.training.online.setting import LoopParts
from tokengrain.training.online.step import CreditStep, RolloutStep


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
