"""`RolloutStep`: one rollout as credit steps see and change it; `CreditStep`, the protocol; what a critic must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import RunError
from tokengrain.scoring.head import Head

Phase = Literal["filter", "rewards", "advantages", "after"]
PHASES: tuple[Phase, ...] = ("filter", "rewards", "advantages", "after")

NEEDS = frozenset({"ref_logps", "entropy", "hidden", "values"})
"""What a credit step can ask for, beside `old_logps`, which are always there once a rollout is scored."""

T = TypeVar("T")


def _alone(values: Any) -> list[Any]:
    return [values]


@dataclass
class RolloutStep:
    """One rank's share of one rollout.

    Shapes: G prompts, C completions, N tokens of all completions; all tensors on the training device, without
    gradient.

    Attributes:
        batch: prompts with their completions. Columns: `sampling_logps` and `raw_logps` where the sampler knows
            them, `truncated`, `old_logps`, and the quantities that were asked for.
        rewards: outcome per completion `[C]`; NaN where it could not be scored.
        by_name: per reward function its own values `[C]`, without weight; NaN where it has none.
        token_rewards: `[N]`, or None if no reward was given per token.
        correct: bool `[C]`, or None without rewards: the reward `correct_from` is above 0.5.
        prompt_ids: per prompt its row's id: stable over epochs, shuffles and ranks.
        index: number of the rollout, from 0.
        max_new_tokens: the longest completion that could be sampled.
        max_tokens: tokens of one micro-batch, for steps that run models; None: no bound.
        advantages: `[N]`, set by the one step of phase "advantages".
        weights: `[N]`, or None: factors of the policy's token losses.
        keep: bool `[G]`, or None: all. Prompts to train on; what is False is left out of the updates (and, for a
            step of phase "filter" with `refill`, replaced by new prompts).
        metrics: numbers for the log, of this rank; ranks are averaged.
        model: the policy, without wrappers.
        head_of: gives the policy's head.
        exchange: gives the values of all ranks, in the order of ranks; of one rank a list of one.
    """

    batch: TokenBatch
    rewards: Tensor
    by_name: dict[str, Tensor]
    prompt_ids: tuple[int | str, ...]
    index: int
    token_rewards: Tensor | None = None
    correct: Tensor | None = None
    max_new_tokens: int = 0
    max_tokens: int | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    keep: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    model: Any = None
    head_of: Callable[[], Head] | None = None
    exchange: Callable[[Any], list[Any]] = _alone

    @property
    def quantities(self) -> dict[str, Tensor]:
        """The columns of `batch`, by name: `[N]`, or `[N, H]` for "hidden". What is put in here is a column."""
        return self.batch.columns

    @property
    def segments(self) -> Segments:
        """Cuts `[N]` into C completions."""
        return self.batch.segments

    @property
    def group(self) -> Tensor:
        """The prompt of each completion, long `[C]`."""
        return self.batch.group

    @property
    def truncated(self) -> Tensor:
        """Completions that reached `max_new_tokens` without an end, bool `[C]`."""
        return self.segments.max(self.quantities["truncated"]) > 0

    @property
    def total(self) -> Tensor:
        """Outcome plus the sum of a completion's token rewards `[C]`; NaN where it could not be scored."""
        if self.token_rewards is None:
            return self.rewards
        return self.rewards + self.segments.sum(self.token_rewards).to(self.rewards.dtype)

    def quantity(self, name: str) -> Tensor:
        """A column. Raises `RunError` if it is not there."""
        if name not in self.batch.columns:
            raise RunError(f"rollout {self.index} has no {name!r}; it has {sorted(self.batch.columns)}")
        return self.batch.columns[name]

    def gather(self, values: Any) -> Any:
        """The values of all ranks. Every rank must call this.

        A tensor `[n, ...]` comes back with the ranks' tensors one after the other, on the same device; anything
        else as a list with an entry per rank.
        """
        if not isinstance(values, Tensor):
            return self.exchange(values)
        parts = self.exchange(values.detach().cpu())
        return torch.cat(parts).to(values.device)

    def head(self) -> Head:
        """The policy's head, detached."""
        if self.head_of is None:
            raise RunError("this rollout has no model to take a head from")
        return self.head_of()

    def broadcast(self, per_completion: Tensor) -> Tensor:
        """Repeat `[C]` for the tokens of each completion: `[N]`."""
        return self.segments.broadcast(per_completion)

    def drop(self, keep: Tensor) -> None:
        """Leave out the prompts where `keep` (bool `[G]`) is False, beside those left out already."""
        self.keep = keep if self.keep is None else self.keep & keep


@runtime_checkable
class CreditStep(Protocol):
    """Changes a `RolloutStep`. Settings are the keyword-only arguments of the constructor.

    Class attributes that a step may have beside these: `provides` (columns it adds; "weights" if it sets them),
    `needs_group` (True: a prompt must have two completions), `refill` (of a filter: replace what it drops),
    `check_limit` (a method, called with `max_new_tokens` before anything is sampled; may raise `RecipeError`).

    Attributes:
        name: its name in recipes and logs.
        phase: "filter": right after the rewards; "rewards": shapes rewards; "advantages": sets
            `step.advantages`; "after": changes advantages or weights. Within a phase in the order given.
        needs: what must be scored, of `NEEDS`.
    """

    name: str
    phase: Phase
    needs: frozenset[str]

    def __call__(self, step: RolloutStep) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume, JSON-able, equal on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """The parts of a `CreditStep` that a step without state need not write."""

    needs: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise RunError(f"credit step {type(self).__name__} has no state, the checkpoint has {sorted(state)}")


class CriticLike(Protocol):
    """What the trainer asks of a critic. All ranks call each of these equally often."""

    def begin(
        self,
        device: torch.device | str | None = None,
        *,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Called once before the first rollout: move to the device, set up the learning rate's schedule."""
        ...

    def values(self, batch: TokenBatch) -> Tensor:
        """V of the state before each token `[N]`, without gradient."""
        ...

    def update(self, batch: TokenBatch, *, real: bool = True) -> dict[str, float]:
        """One optimiser step on a minibatch with columns `values` and `returns`; numbers for the log.

        Args:
            real: False: this rank has no prompts in the minibatch, and `batch` must get no weight.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Settings that a checkpoint must agree on."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimiser into a folder; the main process calls this."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; after `begin`."""
        ...
