"""What a credit source is, and what sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import DataError, RunError, fingerprint
from tokengrain.methods._shaping import Moments
from tokengrain.scoring.head import Head


@runtime_checkable
class CreditSource(Protocol):
    """Turns a batch into one number per counted completion token.

    Any callable `(batch) -> Tensor [N]` works as one; `name` and `fingerprint` serve annotation files. A class
    may say what its numbers mean in a class attribute `values`: "signed" (sign and size, around 0), "order" (only
    their order within a completion), "marks" (0 but at marked tokens) or "any" (up to the user; the default).
    """

    name: str

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Token credit `[N]`, float, without gradient."""
        ...

    def fingerprint(self) -> str:
        """Identifies the numbers it gives: its settings and the weights of the models it asks."""
        ...


def checked_credit(values: Tensor | Sequence[Any], batch: TokenBatch, name: str) -> Tensor:
    """Credit as a detached float `[N]` on the batch's device.

    Args:
        values: `[N]`, or one sequence of numbers per completion.
        name: the source, for messages.

    Raises:
        DataError: wrong type or length, or a value that is NaN or infinite; names the row.
    """
    flat = values if isinstance(values, Tensor) else _joined(values, batch, name)
    total = batch.segments.total
    if flat.shape != (total,):
        raise DataError(
            f"credit source {name!r} gave a wrong number of values",
            value=tuple(flat.shape),
            expected=f"({total},): one per completion token that counts",
        )
    flat = flat.detach().to(batch.device)
    if not flat.is_floating_point():
        flat = flat.float()
    bad = ~torch.isfinite(flat)
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        completion = int(batch.segments.ids[token])
        raise DataError(
            f"credit source {name!r} gave a value that is not finite for token "
            f"{token - int(batch.segments.offsets[completion])} of completion {_place(batch, completion)}",
            row=row_of(batch, completion),
            value=float(flat[token]),
            expected="finite numbers",
        )
    return flat


def row_of(batch: TokenBatch, completion: int) -> int | str:
    """The row that a completion belongs to."""
    group = int(batch.group[completion])
    return batch.rows[group] if batch.rows else group


def is_peft(model: nn.Module) -> bool:
    """Whether there is a PEFT model, whose adapter can be switched off, in `model` or its wrapper."""
    inner: Any = model
    while inner is not None and not hasattr(inner, "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return hasattr(inner, "peft_config")


def frozen_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probabilities `[N]` under `model` in evaluation mode, without gradient; its mode is restored."""
    from tokengrain.scoring.model import evaluating
    from tokengrain.scoring.score import score

    with evaluating(model):
        return _wanted(score(model, batch, ("logps",)).logps)


def scorer_logps(scorer: Any, batch: TokenBatch) -> Tensor:
    """Log-probabilities `[N]` under a model, or under a `Reference` (called with what is wanted)."""
    if isinstance(scorer, nn.Module):
        return frozen_logps(scorer, batch)
    return _wanted(scorer(batch, {"logps"}).logps)


def scorer_fingerprint(scorer: Any) -> str:
    """Identifies a model's weights and config, or a reference by its class and its model's weights."""
    if isinstance(scorer, nn.Module):
        return model_fingerprint(scorer)
    kind = type(scorer).__name__
    model = getattr(scorer, "model", None)
    # What an adapter that is switched off holds does not change the numbers.
    content = model_fingerprint(model, adapter=kind != "AdapterOffReference") if model is not None else ""
    return fingerprint([kind, content])


def model_fingerprint(model: nn.Module, *, adapter: bool = True) -> str:
    """16 hex digits over names, types and every byte of the weights, and over the config.

    Args:
        adapter: whether LoRA weights count.
    """
    digest = hashlib.blake2b()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        digest.update(config.to_json_string(use_diff=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if "lora_" in name and not adapter:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def _wanted(logps: Tensor | None) -> Tensor:
    assert logps is not None  # it was asked for
    return logps


def _joined(values: Sequence[Any], batch: TokenBatch, name: str) -> Tensor:
    """One sequence per completion, as a flat tensor."""
    expected = batch.segments.lengths.tolist()
    try:
        parts = [torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"credit source {name!r} gave something that is not numbers ({error})",
            expected="a tensor [N], or one list of numbers per completion",
        ) from None
    if len(parts) != len(expected):
        raise DataError(
            f"credit source {name!r} gave values for a wrong number of completions",
            value=len(parts),
            expected=f"{len(expected)}, or a tensor of {batch.segments.total} values",
        )
    for completion, (part, length) in enumerate(zip(parts, expected, strict=True)):
        if part.numel() != length:
            raise DataError(
                f"credit source {name!r} gave a wrong number of values for completion {_place(batch, completion)}",
                row=row_of(batch, completion),
                value=part.numel(),
                expected=f"{length}, one per completion token that counts",
            )
    return torch.cat(parts) if parts else torch.zeros(0)


def _place(batch: TokenBatch, completion: int) -> int:
    """Index of a completion within its prompt."""
    first = int((batch.group < batch.group[completion]).sum())
    return completion - first


# ----------------------------------------------------------------------------------------------------
# `RolloutStep`: one rollout as credit steps see and change it; `CreditStep`, the protocol; what a critic must do.

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


# ----------------------------------------------------------------------------------------------------
# What credit steps share: one rank's share among all ranks, and the reward of a token.


def shares(step: RolloutStep, mine: Any) -> tuple[list[Any], int]:
    """What every rank gave, in the order of ranks, and which of them is this rank's.

    Args:
        mine: compared by equality, so without NaN. Where two ranks gave the same either will do.
    """
    parts = step.gather(mine)
    return parts, parts.index(mine)


def pooled_moments(step: RolloutStep, values: Tensor) -> Moments:
    """Mean and spread of the values of all ranks."""
    return sum(step.gather(Moments.of(values)), Moments())


def scored(step: RolloutStep) -> Tensor:
    """Completions that have a reward and belong to a prompt that is trained on, bool `[C]`."""
    known = ~torch.isnan(step.rewards)
    return known if step.keep is None else known & step.keep[step.group]


def token_level(step: RolloutStep) -> Tensor:
    """The reward of every token `[N]`: what was given per token, and the outcome on the last one.

    0 on all tokens of a completion that could not be scored.
    """
    outcome = torch.where(scored(step), step.rewards, 0.0)
    rewards = torch.where(step.segments.is_last, step.broadcast(outcome), 0.0)
    if step.token_rewards is not None:
        rewards = rewards + step.token_rewards
    return torch.where(step.broadcast(scored(step)), rewards, 0.0)


def mean(values: Tensor) -> float:
    """Mean of the numbers in `values`, NaN left out; 0 of nothing."""
    known = values[~torch.isnan(values)] if values.is_floating_point() else values
    return float(known.double().mean()) if known.numel() else 0.0
