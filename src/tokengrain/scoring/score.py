"""`score`: per-token quantities of a model on a batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring.forward import (
    ScoreRequest,
    device_of,
    evaluating,
    live_head,
    quantities_from_logits,
    text_config,
)
from tokengrain.scoring.head import Distribution, Head
from tokengrain.scoring.install import causal_lm, plan_for, prompt_learning
from tokengrain.scoring.layouts import Layout

Want = Literal["logps", "entropy", "hidden", "kl"]
WANTS = ("logps", "entropy", "hidden", "kl")


@dataclass
class Scores:
    """Per-token quantities over a batch's N counted tokens, in its flat order; None where not wanted.

    Attributes:
        logps: `[N]` log-probability of the token, nats.
        entropy: `[N]` entropy of the distribution it was drawn from, nats.
        hidden: `[N, H]` last hidden state (after the final norm) that predicts it.
        kl: `[N]` KL(reference || model) over the whole vocabulary, nats.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    hidden: Tensor | None = None
    kl: Tensor | None = None


def score(
    model: nn.Module,
    batch: TokenBatch,
    want: Collection[str] = ("logps",),
    *,
    reference: Distribution | None = None,
    layout: Layout | None = None,
    max_row_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> Scores:
    """Score a batch. Differentiable unless gradients are off; runs through `model(...)`, so hooks fire.

    Args:
        model: a Hugging Face causal language model, plain or wrapped (PEFT, DDP, FSDP2, accelerate).
        batch: prompts with completions, on any device.
        want: of "logps", "entropy", "hidden", "kl".
        reference: the reference's distribution at the same tokens, needed for "kl".
        layout: "shared", "separate" or "auto"; None: what `prepare` was told ("auto" if nothing).
        max_row_tokens: bound on rows * length of one forward pass through the decoder. Sharded models (FSDP)
            always run exactly one, since all ranks must run equally many.
        chunk_tokens: tokens projected onto the vocabulary at a time; None chooses by memory.

    Returns:
        Scores on the model's device; logps, entropy and kl in float32 (float64 for a float64 model).

    Raises:
        ModelError: an unknown quantity, too few positions, another vocabulary, a model that cannot do it.
    """
    if isinstance(want, str):
        want = (want,)
    unknown = sorted(set(want) - set(WANTS))
    if unknown:
        raise ModelError(f"unknown quantity; got {unknown}, expected some of {list(WANTS)}")
    lm = causal_lm(model)
    plan = plan_for(model, lm, layout)
    request = ScoreRequest(
        batch=batch,
        want=frozenset(want),
        plan=plan,
        reference=_moved(reference, device_of(lm)),
        layout=plan.layout,
        max_row_tokens=max_row_tokens,
        chunk_tokens=chunk_tokens,
        one_forward=_is_sharded(lm),
    )
    if prompt_learning(model) is not None:
        # Virtual tokens are put in by the PEFT model around ours, in its ordinary forward.
        whole = lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits  # noqa: E731
        return Scores(**quantities_from_logits(lm, request, whole))
    return Scores(**model(token_batch=request))


def _moved(reference: Distribution | None, device: torch.device) -> Distribution | None:
    if reference is None or reference.hidden.device == device == reference.head.weight.device:
        return reference
    head = reference.head
    bias = None if head.bias is None else head.bias.to(device)
    return Distribution(reference.hidden.to(device), Head(head.weight.to(device), bias, head.scale, head.softcap))


def _is_sharded(lm: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in lm.modules())


def head_of(model: nn.Module) -> Head:
    """The model's head with its live weight (gathered, if it is sharded): a parameter, not a copy.

    An adapter on the head is folded into a copy of the weight.

    Raises:
        ModelError: the model's logits are not a function of its last hidden states that we know.
    """
    lm = causal_lm(model)
    plan = plan_for(model, lm, None)
    if plan.head != "fused":
        raise ModelError(f"the head of {type(lm).__name__} cannot be taken apart: {plan.reason}")
    head = live_head(lm, plan)
    if head is not None:
        return head
    # An affine map of any making is known by what it does to the zero and unit vectors.
    module: Any = lm.get_output_embeddings()  # type: ignore[operator]
    like: Any = lm.get_input_embeddings().weight  # type: ignore[operator]
    size = text_config(lm).hidden_size
    with evaluating(module):
        units = torch.eye(size, dtype=like.dtype, device=like.device)
        bias = module(torch.zeros_like(units[:1]))[0]
        weight = (module(units) - bias).t().contiguous()
    return Head(weight, bias, plan.scale, plan.softcap)


def distribution_of(model: nn.Module, batch: TokenBatch) -> Distribution:
    """The model's next-token distribution at every counted token, without gradients.

    In the mode (training or evaluation) that the model is in; the weights are the model's own, so use it
    before they change. References should come from `tokengrain.scoring.reference`.
    """
    with torch.no_grad():
        hidden = score(model, batch, ("hidden",)).hidden
        assert hidden is not None
        return Distribution(hidden, head_of(model).detach())
