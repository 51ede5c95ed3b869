"""TI-DPO: token-importance guided DPO (arXiv 2505.19653), without its triplet loss.

    L   = -log σ(β (Σ_t w_t d_t of chosen - Σ_t w_t d_t of rejected)),    d_t = log π_t - log ref_t
    w_t = T W_t / Σ W,    W_t = λ I_t / Σ I + (1 - λ) P_t / Σ P           weights of a completion of T tokens average 1
    I_t = || d max_v z_v / d e_t ||_1       z: logits behind the last token, e_t: input embedding of token t
    P_t = exp(-((t - (T - 1) / 2) / (s T))² / 2),    t = 0 .. T - 1,    s = 1/4

The paper adds a triplet loss on a third completion that the policy samples at every step. Offline rows have none, so
this is its ablation "no triplet loss". The paper measures I with the moving policy; here a frozen model does, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import DataError
from tokengrain.loss import LossOutput
from tokengrain.method import Card, credit, objective
from tokengrain.methods._pairs import log_ratios, margin_loss, pair_difference, pair_metrics, weight_metrics
from tokengrain.scoring.encdec import start_id
from tokengrain.scoring.model import evaluating, is_encoder_decoder
from tokengrain.scoring.prepare import unwrapped
from tokengrain.scoring.vision import arguments
from tokengrain.settings import Positive, Share

CARD = Card(
    "ti_dpo",
    "TI-DPO",
    "weights tokens by gradient attribution",
    "Token-Importance Guided Direct Preference Optimization",
    "2505.19653",
    "ICLR 2026",
    credit="gradient of the final prediction with respect to each token",
)


@credit("gradient_attribution", values="importance", judges_itself=True, patches="gradient")
def gradient_attribution(batch: TokenBatch, *, model: Any) -> Tensor:
    """How much each token's input embedding moves the model's prediction behind the completion.

    The prediction is the largest logit after the last token; a token's number is the L1 norm of its gradient, so it is
    never negative. Each completion is computed on its own, without padding, behind its prompt with the pictures.
    """
    network: Any = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    encoder = is_encoder_decoder(network)
    embed = (network.get_decoder() if encoder else network).get_input_embeddings()
    device = next(network.parameters()).device
    parts = []
    with evaluating(network):
        for index, group in enumerate(batch.group.tolist()):
            prompt, completion = batch.prompt(group).to(device), batch.completion(index).to(device)
            before = completion.new_tensor([start_id(network)]) if encoder else prompt
            ids = torch.cat([before, completion])[None]
            embeddings = embed(ids).detach().requires_grad_()
            given = {"inputs_embeds": embeddings, "logits_to_keep": 1}
            if encoder:
                given = {"input_ids": prompt[None], "decoder_inputs_embeds": embeddings}
            vision = batch.vision[group] if batch.vision else None
            if vision is not None:  # the model looks for placeholders among the ids
                seen = arguments(unwrapped(network), prompt, vision, len(completion))
                given = {"input_ids": ids, "logits_to_keep": 1, **seen}
            with torch.enable_grad(), _embedded(embed, embeddings if vision is not None else None):
                largest = network(**given, use_cache=False).logits[0, -1].max()
            (gradient,) = torch.autograd.grad(largest, embeddings)
            parts.append(gradient[0, len(before) :].abs().sum(-1).float())
    every = torch.cat(parts) if parts else torch.zeros(0, device=device)
    return every[batch.counted.to(device)].to(batch.device)


@contextmanager
def _embedded(embed: nn.Module, embeddings: Tensor | None) -> Iterator[None]:
    """The layer gives these embeddings for whatever tokens."""
    if embeddings is None:
        yield
        return
    hook = embed.register_forward_hook(lambda module, args, output: embeddings)
    try:
        yield
    finally:
        hook.remove()


def importance_weights(scores: Tensor, segments: Segments, importance: float, width: float) -> Tensor:
    """w `[N]` from scores I `[N]`; a completion whose scores are all 0 has the weights of its places alone."""
    lengths = segments.broadcast(segments.lengths).to(scores.dtype)
    offset = segments.positions.to(scores.dtype) - (lengths - 1) / 2
    prior = torch.exp(-((offset / (width * lengths)) ** 2) / 2)
    totals = segments.broadcast(segments.sum(scores))
    attributed = torch.where(totals > 0, scores / totals.clamp(min=torch.finfo(scores.dtype).tiny), 0.0)
    mixed = importance * attributed + (1 - importance) * prior / segments.broadcast(segments.sum(prior))
    sums = segments.broadcast(segments.sum(mixed))
    return torch.where(sums > 0, lengths * mixed / sums.clamp(min=torch.finfo(scores.dtype).tiny), 1.0)


@objective("ti_dpo", roles=("importance",))
def ti_dpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    token_rewards: Tensor,
    beta: Positive = 0.1,
    importance: Share = 0.7,
    width: Positive = 0.25,
) -> LossOutput:
    """DPO whose tokens weigh w inside the margin.

    Args:
        token_rewards: I `[N]`, at least 0. Their scale within a completion does not matter.
        beta: strength of the tie to the reference.
        importance: λ, the share of attribution in the weights; the rest goes to the middle of a completion.
        width: s, the standard deviation of the prior over places, in lengths of the completion.

    Returns:
        `losses` [P]; rewards in the metrics are unweighted.
    """
    scores = token_rewards.detach().to(logps.dtype)
    if bool((scores < 0).any()):
        what = "ti_dpo weighs tokens by how much they matter: a token reward is below 0"
        expected = "numbers of at least 0, such as those of gradient_attribution"
        raise DataError(what, value=float(scores.min()), expected=expected)
    w = importance_weights(scores, segments, importance, width)
    d = log_ratios(logps, ref_logps)
    margin = beta * pair_difference(segments.sum(w * d), segments)
    metrics = pair_metrics(beta * segments.sum(d.detach()), logps, segments) | weight_metrics(w, segments)
    metrics["weighted/margins"] = margin.detach()
    return LossOutput(margin_loss(margin), metrics)
