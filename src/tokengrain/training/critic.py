"""The critic of PPO: a token classifier with one label whose score of a state is the value of what follows.

It is read before the action, at the position that predicts the token, when values are collected and when it is trained
alike. It has weights, an optimiser and a learning rate of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import NonFiniteLossError, RecipeError, RunError, require
from tokengrain.loss import Counts, make_normaliser
from tokengrain.methods._clipped import value_loss
from tokengrain.models import reset_head, reward_model_from, trained
from tokengrain.scoring.model import evaluating, is_token_classifier
from tokengrain.scoring.prepare import causal_lm, prepare
from tokengrain.scoring.reference import disable_dropout, is_peft
from tokengrain.scoring.score import in_parts, score
from tokengrain.scoring.token_scores import completion_statistics_of, statistics_of
from tokengrain.settings import Count, NonNegative, Positive, Share, Whole, keyword_types, validate_settings
from tokengrain.training.step import HostBatch, all_reduce, plan_step, several_ranks, wide

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"
Schedule = Literal["constant", "linear", "cosine", "cosine_with_min_lr"]


def critic_model(source: nn.Module, *, fresh_head: bool = False) -> nn.Module:
    """A token classifier of its own, ready to be trained: a copy of `source`, or of its decoder with a fresh head."""
    if is_token_classifier(_inner(source)):
        model = copy.deepcopy(source)
        if not is_peft(model):
            model.requires_grad_(True)
        if fresh_head:
            reset_head(_inner(model))
    else:
        causal_lm(source, "a critic, which reads prompt and completion as one text")
        model = reward_model_from(source, share=False).requires_grad_(True)
    trained(model)
    disable_dropout(model)
    return model.train()


def _inner(model: nn.Module) -> nn.Module:
    inner: Any = model
    return inner.get_base_model() if is_peft(inner) else inner


class Critic:
    """Values of states, and how they are learnt: by `value_loss` over a whole minibatch, however it is cut.

    Ranks need not run the model equally often: gradients are added up over ranks after the last micro-batch.

    Args:
        source: a token classifier with one label, such as a reward model, is copied with its head (and its adapter),
            as in RTO; of a causal language model the decoder is copied and the head is fresh (torch's random numbers:
            seed them first).
        lr, betas, eps, weight_decay: of AdamW; RTO's learning rate is 18 times the policy's.
        max_grad_norm: gradients are scaled down to this norm; None: not.
        clip_range: values are clipped to this around those of the rollout in the loss; None: not clipped.
        weight: factor of the loss; 0.5 in RTO, 1 in Q-RM.
        reduction: "mean": tokens of a completion are averaged, then completions (RTO); "sum": all tokens of the
            minibatch are averaged (Q-RM).
        schedule: of the learning rate, over the optimiser steps of the run, after `warmup_steps`.
        fresh_head: draw the head of a token classifier anew, as Q-RM does.
        use_statistics: put values on the scale of rewards with the mean and deviation of a reward model's scores,
            where its config has them (and the head is not fresh).
        max_tokens_per_microbatch: token budget of one forward pass.
    """

    def __init__(
        self,
        source: nn.Module,
        *,
        lr: Positive = 9e-6,
        betas: tuple[Share, Share] = (0.9, 0.95),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        max_grad_norm: Positive | None = 1.0,
        clip_range: Positive | None = 0.2,
        weight: NonNegative = 0.5,
        reduction: Literal["mean", "sum"] = "mean",
        schedule: Schedule = "constant",
        warmup_steps: Whole = 0,
        fresh_head: bool = False,
        use_statistics: bool = True,
        max_tokens_per_microbatch: Count | None = None,
    ) -> None:
        given = locals()
        validate_settings("critic", Critic, {name: given[name] for name in keyword_types(Critic)})
        what = "critic: fresh_head is for a whole model; give an adapter with a head of its own"
        require(not fresh_head or not is_peft(source), RecipeError, what)
        self._loss: dict[str, Any] = {"clip_range": clip_range, "weight": weight, "reduction": reduction}
        adam: dict[str, Any] = {"lr": lr, "betas": list(betas), "eps": eps, "weight_decay": weight_decay}
        self.settings: dict[str, Any] = {**adam, "max_grad_norm": max_grad_norm, **self._loss}
        self.settings |= {"schedule": schedule, "warmup_steps": warmup_steps}
        self.model = critic_model(source, fresh_head=fresh_head)
        # Of the scores of tokens; where only the last one was trained, its own.
        whole = completion_statistics_of(self.model)
        found: Any = whole if whole is not None and whole.pooling == "last" else statistics_of(self.model)
        fresh = fresh_head or not is_token_classifier(_inner(source))
        usable = use_statistics and not fresh and found is not None and found.std > 0
        self.statistics = found if usable else None
        self.max_grad_norm, self.max_tokens = max_grad_norm, max_tokens_per_microbatch
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._normaliser = make_normaliser("mean" if reduction == "mean" else "token_mean")
        self.optimizer = torch.optim.AdamW(self._trained.values(), **(adam | {"betas": betas}))
        self._scheduler: Any = None

    def begin(
        self,
        device: torch.device | str | None = None,
        *,
        max_steps: int | None = None,
        max_tokens: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Move to the device, take rank 0's weights on all ranks and set up the learning rate's schedule.

        `max_tokens`: budget of a forward pass, unless the critic was made with one; `autocast`: around every pass.
        """
        if device is not None:
            self.model.to(device)
        self.autocast, self.max_tokens = autocast, self.max_tokens or max_tokens
        if several_ranks():
            for value in [*self.model.parameters(), *self.model.buffers()]:
                dist.broadcast(value.detach(), 0)
        name = self.settings["schedule"]
        what = f"critic: schedule {name!r} needs the number of optimiser steps (max_steps)"
        require(name == "constant" or max_steps is not None, RecipeError, what)
        self._scheduler = get_scheduler(
            "constant_with_warmup" if name == "constant" else name,
            self.optimizer,
            num_warmup_steps=self.settings["warmup_steps"],
            num_training_steps=max_steps,
            scheduler_specific_kwargs={"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else None,
        )
        prepare(self.model)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def values(self, batch: TokenBatch) -> Tensor:
        """V of the state before each token, `[N]` on the batch's device, without gradient."""
        with evaluating(self.model), self.autocast():
            found = in_parts(batch, self.max_tokens, lambda part: {"values": self._score(part)})
        return found["values"].to(batch.device)

    def update(self, batch: TokenBatch, *, real: bool = True) -> dict[str, float]:
        """One optimiser step on a minibatch, and its metrics. All ranks call this, each with its share.

        The batch has columns `returns` and, for clipping, `values`, the critic's own when it was collected; it gets no
        weight if it is not `real`. Raises NonFiniteLossError before anything is changed.
        """
        if self._scheduler is None:
            self.begin()
        device = next(self.model.parameters()).device
        counts = plan_step([HostBatch(batch, real)], self.max_tokens, device, same_passes=False).counts
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        for part in batch.split(self.max_tokens):
            self._backward(part, counts, totals, real)
        names = sorted(totals)
        sums = all_reduce(torch.tensor([totals[n] for n in names], dtype=torch.float64), device).tolist()
        metrics = dict(zip(names, sums, strict=True))
        loss = metrics["critic/loss"]
        require(math.isfinite(loss), NonFiniteLossError, f"the critic's loss is {loss}; rows {list(batch.rows)[:8]}")
        for parameter in self._trained.values() if several_ranks() else ():
            if parameter.grad is None:  # this rank had nothing in the minibatch
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self.max_grad_norm or math.inf)
        metrics |= {"critic/grad_norm": float(norm), "critic/lr": self.lr}
        self.optimizer.step()
        self._scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _backward(self, part: TokenBatch, counts: Counts, totals: dict[str, float], real: bool) -> None:
        with self.autocast():
            values = self._score(part)
        columns = {name: part.columns[name].to(values.device) for name in ("returns", "values") if name in part.columns}
        what = "the critic has nothing to learn: no `returns`; expected a rollout credit that gives them (gae)"
        require("returns" in columns, RecipeError, what)
        segments = Segments(part.segments.offsets.to(values.device))
        given: dict[str, Any] = {"returns": columns["returns"], "old_values": columns.get("values"), **self._loss}
        output = value_loss(values, segments, **given)
        share = self._normaliser(output, counts) * float(real)
        share.backward()
        totals["critic/loss"] = totals.get("critic/loss", 0.0) + float(share.detach())
        for name, each in output.metrics.items():
            key = f"critic/{name.removeprefix('values/')}"
            totals[key] = totals.get(key, 0.0) + float(wide(each).sum()) * real / max(counts.completions, 1)

    def _score(self, batch: TokenBatch) -> Tensor:
        values = score(self.model, batch, ("values",)).values
        assert values is not None  # it was asked for
        if self.statistics is None:
            return values
        return (values - self.statistics.mean) / self.statistics.std

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def describe(self) -> dict[str, Any]:
        """Settings that a checkpoint must agree on."""
        return {**self.settings, "statistics": self.statistics.as_dict() if self.statistics is not None else None}

    def save(self, folder: str | Path) -> None:
        """Write what is trained, and the optimiser's state, into a folder; the first rank does."""
        if several_ranks() and dist.get_rank():
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().cpu().contiguous() for n, p in self._trained.items()}, folder / WEIGHTS)
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else None
        torch.save({"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}, folder / OPTIMIZER)

    def load(self, folder: str | Path) -> None:
        """Resume exactly where `save` was called; after `begin`. Raises RunError if the folder is another critic's."""
        folder = Path(folder)
        there = (folder / WEIGHTS).is_file() and (folder / OPTIMIZER).is_file()
        require(there, RunError, f"{folder} holds no critic; expected {WEIGHTS} and {OPTIMIZER}")
        stored, own = load_file(folder / WEIGHTS), self._trained
        same = {n: v.shape for n, v in stored.items()} == {n: p.shape for n, p in own.items()}
        require(same, RunError, f"{folder} holds another critic: the names or shapes of its weights differ")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scheduler"] is not None:
            require(self._scheduler is not None, RunError, "the critic has no schedule yet; call begin() before load()")
            self._scheduler.load_state_dict(state["scheduler"])
