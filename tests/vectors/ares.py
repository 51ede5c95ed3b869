from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.vectors.adacs import adacs_select
from tests.vectors.rows import Rows, numbered
from tests.vectors.runner import Case, adapter
from tokengrain.batch import Segments
from tokengrain.methods._clipped import kl_estimate
from tokengrain.methods._entropy_window import (
    batch_threshold,
    completion_thresholds,
    high_entropy,
    measured,
    segment_quantiles,
    topk_entropy,
)
from tokengrain.methods._shaping import GroupStatistics, Moments
from tokengrain.methods.aepo import (
    AEPO,
    BUCKETS,
    LinearBucketKL,
    LogBucketKL,
    Observation,
    SmoothShape,
    bucket_sums,
    controlled_kl,
    difficulty,
    kl_token_weights,
    lagrange_score,
    lagrange_shaping,
    lagrange_strengths,
    per_bucket,
    running,
    smooth_score,
)
from tokengrain.methods.grpo import group_advantages, grpo_loss

SHAPE = {"margin_frac": "margin", "kappa": "kappa", "temp": "temperature", "cap_scale": "cap", "wrong_gain": "wrong"}
AVERAGES = {"token": ("sum", "token_mean"), "seq": ("mean", "mean")}


@adapter("ares", "token_entropy_topk")
def token_entropy(case: Case) -> dict[str, Any]:
    """The whole vocabulary's entropy is not in the inputs."""
    case.settings("vocab", "k", "tail_floor")
    entropy = topk_entropy(case.inputs["topk_logprobs"], floor=case.params["tail_floor"])
    return {
        "token_entropy": entropy,
        "sequence_mean_entropy": entropy.mean(),
        "token_entropy_without_tail": topk_entropy(case.inputs["topk_logprobs"], tail=False),
    }


@adapter("ares", "hwe_stats_code")
def windows_of_the_code(case: Case) -> dict[str, Any]:
    """The threshold that counts is the one given, else the tracked one, else the batch's own."""
    p = case.settings("window", "percentile", "threshold_used", "ema_prev", "ema_decay", threshold="threshold_used")
    entropy, segments = _ragged(case.inputs["entropies"])
    triggers, _ = _ragged(case.inputs["is_trigger"])
    means = measured(entropy, segments, window=p["window"])
    where = {"window": p["window"], "quantile": p["percentile"] / 100}
    tau = batch_threshold(entropy, segments, **where)
    before = p.get("ema_prev")
    used = p.get("threshold_used", tau if before is None else before)
    found = high_entropy(means, segments, threshold=used, triggers=triggers)
    tracked = {"ema_threshold": running(before, tau, p["ema_decay"])} if "ema_decay" in p else {}
    return {
        **tracked,
        "following_window_mean": segments.split(means),
        "seq_threshold": completion_thresholds(entropy, segments, **where),
        "batch_threshold_median": tau,
        "n_he": found.count,
        "n_trigger_below": found.below,
        "soft_cost": found.excess,
    }


@adapter("ares", "hwe_stats_paper")
def windows_of_the_paper(case: Case) -> dict[str, Any]:
    p = case.settings("window", "quantile", "threshold_used", threshold="threshold_used", tau_high="threshold_used")
    given = p.pop("threshold_used", None)
    entropy, segments = _ragged(case.inputs["entropies"])
    triggers, _ = _ragged(case.inputs["is_trigger"])
    means = measured(entropy, segments, mode="paper", window=p["window"])
    tau = batch_threshold(entropy, segments, mode="paper", **p)
    pooled = batch_threshold(entropy, segments, mode="token_semantic", **p)
    found = high_entropy(means, segments, threshold=tau if given is None else given)
    single = measured(entropy, segments, mode="token_semantic")
    return {
        "window_mean_forward": segments.split(means),
        "seq_quantile": segment_quantiles(entropy, segments, p["quantile"]),
        "tau_high": tau,
        "hwe_mask": segments.split(found.mask),
        "n_he": found.count,
        "pooled_token_threshold": pooled,
        "n_he_token_semantic": high_entropy(single, segments, threshold=pooled, triggers=triggers).count,
    }


@adapter("ares", "bucket_stats_code")
def bucket_stats(case: Case) -> dict[str, Any]:
    p = case.settings("easy_min", "medium_min", "alpha_init", "alpha_lr", "alpha_min", "alpha_max")
    if p["alpha_min"] != 0:
        raise ValueError("the strength's lower bound is 0")
    group, names = numbered(case.inputs["prompt_id"])
    correct, counts = case.inputs["accuracy"], case.inputs["n_he"]
    buckets = difficulty(correct, group, easy=p["easy_min"], medium=p["medium_min"])
    state = AEPO(triggers=None, alpha_lr=p["alpha_lr"], alpha_max=p["alpha_max"])
    state.alpha = dict(p["alpha_init"])
    state.observe(Observation.of(counts, group, buckets))
    rates = GroupStatistics(correct, group).mean.tolist()
    return {
        "pass_rate": dict(zip(names, rates, strict=True)),
        "bucket": {name: BUCKETS[b] for name, b in zip(names, buckets.tolist(), strict=True)},
        "target_n_he": state.target,
        "alpha_after": state.alpha,
    }


@adapter("ares", "entropy_reward_code")
def smooth_reward(case: Case) -> dict[str, Any]:
    p = case.settings("min_margin", **SHAPE)
    shape = SmoothShape(**{k: tuple(v[b] for b in BUCKETS) if isinstance(v, dict) else v for k, v in p.items()})
    x = case.inputs
    state = {"target": x["target"], "alpha": x["alpha"]}
    score = smooth_score(x["accuracy"], x["n_he"], _buckets(x["difficulty"]), shape=shape, **state)
    return {"overall": x["accuracy"] + score, "entropy_score": score}


@adapter("ares", "entropy_reward_paper")
def lagrange_reward(case: Case) -> dict[str, Any]:
    p, x = case.settings("eps", "variance", "target"), case.inputs
    if p["variance"] != "population":
        raise ValueError("only the population's variance")
    buckets = _buckets(x["difficulty"])
    moments = {name: Moments.of(x["n_he"][buckets == i]) for i, name in enumerate(BUCKETS)}
    strengths = lagrange_strengths(moments, x["target"], eps=p["eps"])
    shaping = lagrange_shaping(x["n_he"], buckets, per_bucket(x["target"], buckets))
    score = lagrange_score(x["accuracy"], shaping, per_bucket(strengths, buckets))
    return {"lambda_d": strengths, "shaping": shaping, "reward": x["accuracy"] + score}


@adapter("ares", "kl_beta_controller_code")
def log_controller(case: Case) -> dict[str, Any]:
    settings = case.settings(
        "target", "interval", "ema", "lr", "clip", "deadzone", "beta_init", beta_min="low", beta_max="high"
    )
    start = dict.fromkeys(BUCKETS, settings.pop("beta_init"))
    controller = LogBucketKL(weights=start, **settings)
    trajectory = []
    for update in case.inputs["updates"]:
        kl = torch.tensor(update["seq_mean_kl"], dtype=torch.float64)
        controller.update(bucket_sums(kl, _buckets(update["difficulty"])))
        trajectory.append(dict(controller.weights))
    return {"beta_trajectory": trajectory, "kl_ema": controller.kl, "error_ema": controller.error}


@adapter("ares", "aepo_loss_code")
def aepo_loss(case: Case) -> dict[str, Any]:
    """Their averages add 1e-8 to the count of tokens: within the tolerance."""
    p = case.settings("clip_low", "clip_high", "clip_dual", "loss_avg", "kl_coef", "kl", "adv_eps", "avg_eps")
    if p["kl"] != "low_var_kl":
        raise ValueError(f"unknown KL estimator {p['kl']!r}")
    rows, (reduction, normaliser) = Rows.of(case), AVERAGES[p["loss_avg"]]
    group, _ = numbered(case.inputs["group_id"])
    advantage = group_advantages(case.inputs["reward"], group, eps=p["adv_eps"])
    logps, ref = (rows.flat(case.inputs[name]) for name in ("log_probs", "ref_log_probs"))
    old = rows.old(case, "old_log_probs", logps)
    weights = kl_token_weights(case.inputs["beta_per_seq"], rows.segments)

    def loss(advantages: Tensor, beta: float) -> Tensor:
        output = grpo_loss(
            logps,
            rows.segments,
            old_logps=old,
            ref_logps=ref,
            advantages=advantages,
            kl_weights=weights,
            epsilon=p["clip_low"],
            epsilon_high=p["clip_high"],
            ratio_cap=p["clip_dual"],
            beta=beta,
            clamp=True,
            reduction=reduction,
        )
        return rows.normalised(output, normaliser)

    tokenwise = rows.flat(advantage)
    return {
        "advantage": advantage,
        "advantages_tokenwise": rows.padded(tokenwise),
        "token_kl": _token_kl(case, rows),
        "policy_loss": loss(tokenwise, 0.0),
        "kl_loss": loss(torch.zeros_like(tokenwise), 1.0),
        "loss": loss(tokenwise, p["kl_coef"]),
    }


def _token_kl(case: Case, rows: Rows) -> Tensor:
    """In the files also of masked tokens."""
    logps, ref = case.inputs["log_probs"], case.inputs["ref_log_probs"]
    if isinstance(logps, list):
        return rows.padded(kl_estimate(rows.flat(logps), rows.flat(ref), clamp=True))
    return kl_estimate(logps, ref, clamp=True)


@adapter("ares", "kl_token_weights_paper")
def relaxed_kl(case: Case) -> dict[str, Any]:
    p = case.settings("rho", "kappa_step", "kappa_min", "kappa_max")
    rows, x = Rows.of(case), case.inputs
    logps, ref, relaxed = (rows.flat(x[name]) for name in ("log_probs", "ref_log_probs", "hwe_mask"))

    def kl_losses(weights: Tensor) -> Tensor:
        zeros = torch.zeros_like(logps)
        return grpo_loss(
            logps, rows.segments, old_logps=logps, ref_logps=ref, advantages=zeros, beta=1.0, kl_weights=weights
        ).losses

    weights = kl_token_weights(x["beta_d_per_seq"], rows.segments, relaxed, p["rho"])
    both = kl_token_weights(x["beta_d_per_seq"] * x["kappa_per_seq"], rows.segments, relaxed, p["rho"])
    control = controlled_kl(kl_estimate(logps, ref), rows.segments, relaxed)
    controllers = {}
    for name, c in x["controller"].items():
        sums = bucket_sums(control[c["seq_idx"]], _buckets([name] * len(c["seq_idx"])))
        state = LinearBucketKL(c["delta"], p["kappa_step"], p["kappa_min"], p["kappa_max"], weights={name: c["kappa"]})
        state.update(sums)
        mean = control[c["seq_idx"]].mean()
        controllers[name] = {"kl_ctrl": mean, "kappa_new": state.weights[name]}
    return {
        "token_weights": rows.padded(weights),
        "per_seq_kl": kl_losses(weights),
        "loss": kl_losses(both).mean(),
        "controller": controllers,
    }


@adapter("ares", "adacs_select")
def adaptive_lengths(case: Case) -> dict[str, Any]:
    settings = case.settings("per_bracket", "levels", "tie_break")
    if settings.pop("tie_break") != "lower index":
        raise ValueError("ties go to the lower index")
    rates, lengths = case.inputs["pass_rate"].tolist(), case.inputs["length"].tolist()
    found = adacs_select(case.inputs["source"], rates, lengths, **settings)
    return {
        "target_length": {f"{source}|{rate}": value for (source, rate), value in found.target.items()},
        "selected": found.selected,
    }


def _ragged(rows: Sequence[Tensor] | Tensor) -> tuple[Tensor, Segments]:
    return torch.cat(list(rows)), Segments.from_lengths([len(row) for row in rows])


def _buckets(names: Sequence[str]) -> Tensor:
    return torch.tensor([BUCKETS.index(name) for name in names])
