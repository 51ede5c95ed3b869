"""Q-RM: a discriminative reward model with one score per token (arXiv 2505.23363).

L = -log σ(β (Z_w - Z_l) - γ),    Z = mean of the token scores z_t of the completion
credit: (z_t - mean) / std,       mean and std measured on the training tokens after training
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.data.tokens import tokenizer_fingerprint
from tokengrain.errors import ModelError, fingerprint, require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, checked_credit, credit, objective
from tokengrain.methods._other_tokens import aligned_scores, retokenizer_for
from tokengrain.methods._pairs import both_sides_counted, margin_loss, pair_difference, reward_metrics
from tokengrain.methods._shaping import scale_scores
from tokengrain.scoring.reference import model_fingerprint
from tokengrain.scoring.token_scores import (
    Pooling,
    Scaling,
    ScoreStatistics,
    frozen_token_scores,
    pooled_scores,
    statistics_of,
)
from tokengrain.settings import NonNegative, Number

CARD = Card(
    "qrm",
    "Q-RM",
    "a reward model scoring every token",
    "Discriminative Policy Optimization for Token-Level Reward Models",
    "2505.23363",
    "ICML 2025",
    trains="token-level reward model, offline pairs",
    credit="none while training; the reward model then is a credit source",
)
REINFORCE = replace(
    CARD,
    name="qrm_reinforce",
    title="Q-RM (REINFORCE)",
    idea="token scores used as advantages",
    trains="reward model on pairs, then policy, online",
    credit="scores of a token-level reward model",
    objective="reinforce",
)


@objective(
    "qrm",
    main="token_scores",
    roles=(),
    no_credit="it trains a reward model, which is a credit source (reward_model) afterwards",
)
def qrm_loss(
    token_scores: Tensor, segments: Segments, *, beta: NonNegative = 0.2, gamma: Number = 2.0, pooling: Pooling = "mean"
) -> LossOutput:
    """Bradley-Terry on a score per completion, pooled from its tokens, with a margin.

    The loss pulls every token of a completion alike; which token earned what comes from the backbone that all
    pairs share.

    Args:
        token_scores: the reward model's score of each token, read at the token itself `[N]`.
        beta: scale of the scores. The gap of the pooled scores grows to about gamma / beta.
        gamma: target margin.
        pooling: "mean", or "last": the last token alone, the usual outcome reward model.

    Returns:
        `losses` [P]; a pair with an empty side has loss 0 and "valid" 0. Rewards in the metrics are the pooled
        scores, without beta.
    """
    pooled = pooled_scores(token_scores, segments, pooling)
    valid = both_sides_counted(segments)
    losses = torch.where(valid, margin_loss(beta * pair_difference(pooled, segments) - gamma), 0.0)
    metrics = reward_metrics(pooled, segments)
    metrics["valid"] = valid.to(pooled.dtype)
    return LossOutput(losses, metrics)


@credit(
    "reward_model", values=lambda settings: "order" if settings["scaling"] == "none" else "signed", reward_model=True
)
class RewardModelCredit:
    """Scores of a token-level reward model, scaled (Q-RM).

    The loss fixes neither the scale nor the zero of the scores, so by default they are standardised with the mean
    and standard deviation that were measured after training and are kept in the model's config.

    With a tokenizer of its own the reward model reads the text again, through its own chat template where the row
    holds messages. Its scores come back by the characters that tokens share; see `_other_tokens`.

    Args:
        model: a token classifier with one label, such as `load_trained_reward_model` gives.
        tokenizer: the policy's tokenizer.
        reward_tokenizer: the reward model's; None: the policy's, and its token ids are used as they are.
        scaling: "zscore" (z - mean) / std; "centre" z - mean; "none" z as it is, whose zero means nothing.
        broadcast: "last": every token gets the score of its completion's last token, for a reward model that was
            trained on that one alone (the outcome reward model that Q-RM is compared with). None: its own.

    Raises:
        ModelError: the scaling needs statistics that the model's config does not have.
        DataError: when called with another tokenizer, on completions of several turns; names the row.
    """

    name: str
    values: str
    own_vocabulary = True

    def __init__(
        self,
        *,
        model: nn.Module,
        tokenizer: Any = None,
        reward_tokenizer: Any = None,
        scaling: Scaling = "zscore",
        broadcast: Literal["last"] | None = None,
    ) -> None:
        self.model, self.scaling, self.broadcast = model, scaling, broadcast
        if scaling == "none":
            self.values = "order"
        statistics = statistics_of(model)
        what = f"scaling {scaling!r} needs token_score_mean and token_score_std in the reward model's config, which "
        what += "lacks them; measure them with measure_scores(model, dataset), or use scaling 'none'"
        require(statistics is not None or scaling == "none", ModelError, what)
        self.statistics = statistics or ScoreStatistics(0.0, 1.0)
        self.retokenizer = retokenizer_for(tokenizer, reward_tokenizer)

    def __call__(self, batch: TokenBatch) -> Tensor:
        scores = self._scores(batch)
        if self.broadcast == "last":
            last = batch.segments.offsets[1:].to(scores.device) - 1
            scores = batch.segments.broadcast(scores[last.clamp(min=0)])
        return checked_credit(scale_scores(scores.float(), self.scaling, self.statistics), batch, self.name)

    def fingerprint(self) -> str:
        both = (self.retokenizer.tokenizer, self.retokenizer.reward_tokenizer) if self.retokenizer else ()
        settings = [self.name, self.scaling, self.broadcast, self.statistics.as_dict()]
        return fingerprint([*settings, model_fingerprint(self.model), *map(tokenizer_fingerprint, both)])

    def _scores(self, batch: TokenBatch) -> Tensor:
        if self.retokenizer is None:
            return frozen_token_scores(self.model, batch)
        other, places = self.retokenizer(batch)
        scores = other.segments.split(frozen_token_scores(self.model, other.to(batch.device)))
        return torch.cat([aligned_scores(s.double(), p.reward, p.policy) for s, p in zip(scores, places, strict=True)])
