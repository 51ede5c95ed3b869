"""`score`: per-token quantities of a model on a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError, require
from tokengrain.scoring.head import Distribution, Head, Teacher
from tokengrain.scoring.layouts import Layout
from tokengrain.scoring.model import (
    CLASSIFIER_WANTS,
    ScoreRequest,
    device_of,
    evaluating,
    input_embeddings,
    is_token_classifier,
    live_head,
    quantities_from_logits,
    text_config,
    whole_head,
)
from tokengrain.scoring.prepare import language_model, plan_for, plan_to_see, prompt_learning, scored_model

Want = Literal["logps", "entropy", "hidden", "kl", "teacher_kl", "token_scores", "values", "aux_loss"]
WANTS: tuple[str, ...] = get_args(Want)


@dataclass
class Scores:
    """Per-token quantities over a batch's N counted tokens, in its flat order; None where not wanted."""

    logps: Tensor | None = None  # [N] log-probability of the token, nats
    entropy: Tensor | None = None  # [N] entropy of the distribution it was drawn from, nats
    hidden: Tensor | None = None  # [N, H] last hidden state (after the final norm) that predicts it
    kl: Tensor | None = None  # [N] KL(reference || model) over the whole vocabulary, nats
    teacher_kl: Tensor | None = None  # [N] KL(model || teacher) over the vocabulary they share, nats
    # With `teacher_kl`, [N] each and without gradient: the teacher's strength, the total variation of its two models in
    # [0, 1], and log target - log contrast of the token, nats.
    teacher_alpha: Tensor | None = None
    tvd: Tensor | None = None
    teacher_reward: Tensor | None = None
    token_scores: Tensor | None = None  # [N] score of the token by a token-classification model that has read it
    values: Tensor | None = None  # [N] a critic's: score by such a model of the state before the token
    aux_loss: Tensor | None = None  # [] load-balancing loss of a mixture of experts, without its coefficient


def score(
    model: nn.Module,
    batch: TokenBatch,
    want: Collection[str] = ("logps",),
    *,
    reference: Distribution | None = None,
    teacher: Teacher | None = None,
    layout: Layout | None = None,
    max_row_tokens: int | None = None,
    chunk_tokens: int | None = None,
    temperature: float = 1.0,
) -> Scores:
    """Score a batch. Differentiable unless gradients are off; runs through `model(...)`, so hooks fire.

    Args:
        model: a Hugging Face causal language model or encoder-decoder, plain or wrapped (PEFT, DDP, FSDP2,
            accelerate); for "token_scores" or "values" a token-classification model with one label, which gives one
            of the two.
        batch: prompts with completions, on any device.
        want: of "logps", "entropy", "hidden", "kl", "teacher_kl", "token_scores", "values", "aux_loss".
        reference: the reference's distribution at the same tokens, needed for "kl".
        teacher: two frozen distributions at the same tokens, needed for "teacher_kl".
        layout: "shared", "separate" or "auto"; None: what `prepare` set ("auto" if nothing).
        max_row_tokens: bound on rows * length of one forward pass through the decoder. Sharded models (FSDP)
            always run exactly one, since all ranks must run equally many.
        chunk_tokens: tokens projected onto the vocabulary at a time; None chooses by memory.
        temperature: divides the logits of log-probabilities and entropy.

    Returns:
        Scores on the model's device; all but hidden in float32 (float64 for a float64 model).

    Raises:
        ModelError: an unknown quantity, too few positions, another vocabulary, a model that cannot do it, a number
            of tokens below 1.
    """
    if isinstance(want, str):
        want = (want,)
    unknown = sorted(set(want) - set(WANTS))
    require(not unknown, ModelError, f"unknown quantity; got {unknown}, expected some of {list(WANTS)}")
    lm = scored_model(model)
    _check_kind(lm, want)
    plan, device = plan_for(model, lm, layout), device_of(lm)
    has_encoder = plan.kind == "encoder-decoder" or batch.prompt_role != "encoder"
    message = f'the batch has prompt_role="encoder", and {type(lm).__name__} has no encoder; expected "prefix"'
    require(has_encoder, ModelError, message)
    if batch.sees:
        plan = plan_to_see(model, lm, plan, batch, layout)
    request = ScoreRequest(
        batch,
        frozenset(want),
        plan,
        reference=None if reference is None else _moved(reference, device),
        teacher=None if teacher is None else teacher.map(lambda d: _moved(d, device)),
        layout=plan.layout,
        max_row_tokens=max_row_tokens,
        chunk_tokens=chunk_tokens,
        one_forward=_is_sharded(lm),
        temperature=temperature,
    )
    if prompt_learning(model) is not None:
        # Virtual tokens are put in by the PEFT model around ours, in its ordinary forward.
        return Scores(**quantities_from_logits(lm, request, model))
    return Scores(**model(token_batch=request))


def _check_kind(lm: nn.Module, want: Collection[str]) -> None:
    name, wrong, classifier = type(lm).__name__, "", is_token_classifier(lm)
    asked, others = [w for w in CLASSIFIER_WANTS if w in want], sorted(set(want) - set(CLASSIFIER_WANTS))
    if asked and not classifier:
        wrong = (
            f"{name} predicts tokens and does not score them; {asked[0]!r} needs a token-classification model, such "
        )
        wrong += "as AutoModelForTokenClassification.from_pretrained(..., num_labels=1) loads"
    elif others and classifier:
        wrong = f"{name} scores tokens and does not predict them, so it has no {others}; expected "
        wrong += "want=('token_scores',), or a causal language model"
    elif len(asked) > 1:
        wrong = "'token_scores' are read at the token and 'values' before it; ask for one at a time"
    require(not wrong, ModelError, wrong)


def _moved(distribution: Distribution, device: torch.device) -> Distribution:
    head = distribution.head
    if distribution.hidden.device == device == head.weight.device:
        return distribution
    bias = None if head.bias is None else head.bias.to(device)
    return Distribution(distribution.hidden.to(device), Head(head.weight.to(device), bias, head.scale, head.softcap))


def _is_sharded(lm: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in lm.modules())


def head_of(model: nn.Module) -> Head:
    """The model's head with its live weight (gathered, if it is sharded): a parameter, not a copy.

    An adapter on the head is folded into a copy of the weight. ModelError if the head cannot be taken apart.
    """
    lm = language_model(model)
    plan = plan_for(model, lm, None)
    message = f"the head of {type(lm).__name__} cannot be taken apart: {plan.reason}"
    require(plan.head == "fused", ModelError, message)
    if (head := live_head(lm, plan.scale, plan.softcap)) is not None:
        return head
    # An affine map of any making is known by what it does to the zero and unit vectors.
    module, like = whole_head(lm), input_embeddings(lm).weight
    with evaluating(lm):
        units = torch.eye(text_config(lm).hidden_size, dtype=like.dtype, device=like.device)
        bias = module(torch.zeros_like(units[:1]))[0]
        weight = (module(units) - bias).t().contiguous()
    return Head(weight, bias, plan.scale, plan.softcap)


def distribution_of(model: nn.Module, batch: TokenBatch) -> Distribution:
    """The model's next-token distribution at every counted token, without gradients, in the mode it is in.

    The weights are the model's own: use it before they change. See `tokengrain.scoring.reference` for references.
    """
    with torch.no_grad():
        hidden = score(model, batch, ("hidden",)).hidden
        assert hidden is not None
        return Distribution(hidden, head_of(model).detach())


_PLACE = "place"


def in_parts(
    batch: TokenBatch,
    max_tokens: int | None,
    measure: Callable[[TokenBatch], dict[str, Tensor]],
    passes: Callable[[int], int] | None = None,
) -> dict[str, Tensor]:
    """Measure a batch micro-batch by micro-batch; the values `[N, ...]` in the batch's own order.

    `passes`: how many passes all ranks make, by how many this one needs: of a sharded model, equally many.
    """
    indexed = batch.with_columns(**{_PLACE: torch.arange(batch.segments.total, device=batch.device)})
    parts = indexed.split(max_tokens)
    found = [measure(part) for part in parts]
    for _ in range(passes(len(parts)) - len(parts) if passes is not None else 0):
        measure(min(parts, key=lambda part: part.n_tokens))
    place = torch.cat([part.columns[_PLACE] for part in parts])
    ordered = {}
    for name in found[0]:
        values = torch.cat([f[name] for f in found])
        ordered[name] = torch.empty_like(values)
        ordered[name][place.to(values.device)] = values
    return ordered
