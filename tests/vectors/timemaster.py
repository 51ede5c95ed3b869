from __future__ import annotations

from typing import Any

import torch

from tests.vectors.layout import from_logits
from tests.vectors.rows import Rows, _padded, numbered
from tests.vectors.runner import Case, adapter
from tokengrain.evaluation.statistics import classification
from tokengrain.methods.grpo import group_advantages, grpo_loss
from tokengrain.rewards.timemaster import TimeMaster, strict_form


def _graded(reward: TimeMaster, text: str, truth: str) -> dict[str, float]:
    """One completion. The authors count a class that they do not know as wrong; the library refuses the row."""
    labels = [label.strip().casefold() for label in reward.labels]
    wanted = truth.strip().casefold()
    if wanted not in labels:
        return {"reward": 0.0, "fmt": 0.0, "pred_id": -1, "label_id": -1}
    label, answer = labels.index(wanted), reward.read(text)
    missing = -1 if reward.parser == "first_block" else next((i for i in range(len(labels)) if i != label), -1)
    (value,) = reward([text], label=[truth])
    predicted = missing if answer.label is None else labels.index(answer.label)
    return {"reward": value, "fmt": float(answer.form), "pred_id": predicted, "label_id": label}


def _columns(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@adapter("timemaster", "composite_reward_rule")
def rule(case: Case) -> dict[str, Any]:
    p, x = case.settings("labels", w_acc="accuracy", w_fmt="format"), case.inputs
    by_task = p.pop("labels")
    rewards = {t: TimeMaster(labels=labels, parser="first_valid_label", **p) for t, labels in by_task.items()}
    rows = zip(x["task"], x["text"], x["ground_truth"], strict=True)
    return _columns([_graded(rewards[task], text, truth) for task, text, truth in rows])


@adapter("timemaster", "composite_reward_soft")
def soft(case: Case) -> dict[str, Any]:
    p = case.settings("task", "labels", w_acc="accuracy", w_fmt="format", w_ext="soft", generic_cap="cap")
    p.pop("task", None)
    scores, x = case.inputs.get("judge_score"), case.inputs
    graded = []
    for i, (text, truth) in enumerate(zip(x["text"], x["ground_truth"], strict=True)):
        score = None if scores is None or scores[i] is None else float(scores[i])
        reward = TimeMaster(parser="first_block", judge=lambda *lists, s=score: [s] * len(lists[0]), **p)
        graded.append(_graded(reward, text, truth))
    return _columns(graded)


@adapter("timemaster", "format_reward_strict")
def strict(case: Case) -> dict[str, Any]:
    required = case.settings("require_extension").get("require_extension", False)
    texts = case.inputs["text"]
    return {"fmt": [float(strict_form(t, "required" if required else "optional") is not None) for t in texts]}


@adapter("timemaster", "grpo_loss")
def grpo(case: Case) -> dict[str, Any]:
    """GRPO's loss has no entropy bonus: what the library measures is put beside it with their weight."""
    p, x = case.settings("clip", "entropy_coef", "kl_coef", "temperature", "adv_eps"), case.inputs
    rows = Rows.of(case) if "mask" in x else Rows(torch.ones_like(_padded(x["token_ids"]), dtype=torch.bool))
    if "logits" in x:
        labels = rows.flat(_padded(x["token_ids"]))
        logits = rows.flat(_padded(x["logits"])) / p.get("temperature", 1.0)
        scores = from_logits(logits, labels, ("logps", "entropy"))
    else:
        logps = rows.flat(x["log_probs"])
        scores = {"logps": logps, "entropy": torch.zeros_like(logps)}
    group, names = numbered(x["group_id"])
    reward = x["reward"]
    advantages = group_advantages(reward, group, eps=p["adv_eps"])
    alone = torch.bincount(group, minlength=len(names))[group] == 1
    # Theirs: a group of one has mean 0 and deviation 1; the library's advantage is 0 there.
    tokenwise = rows.flat(torch.where(alone, reward / (1 + p["adv_eps"]), advantages))
    given: dict[str, Any] = {"old_logps": rows.old(case, "old_log_probs", scores["logps"])}
    given |= {"segments": rows.segments, "reduction": "sum", "epsilon": p["clip"]}
    ref = rows.flat(x["ref_log_probs"]) if "ref_log_probs" in x else None
    policy = grpo_loss(scores["logps"], advantages=tokenwise, **given)
    zeros = torch.zeros_like(tokenwise)
    kl = grpo_loss(scores["logps"], advantages=zeros, ref_logps=ref, beta=float(ref is not None), clamp=True, **given)
    policy_loss, kl_loss = (rows.normalised(output, "token_mean") for output in (policy, kl))
    entropy = scores["entropy"].sum() / max(rows.counts.tokens, 1)
    return {
        "advantages": rows.padded(tokenwise),
        "policy_loss": policy_loss,
        "clip_fraction": rows.share(policy, "clip/low", "clip/high"),
        "entropy": entropy,
        "kl_loss": kl_loss,
        "loss": policy_loss - p.get("entropy_coef", 0.0) * entropy + p.get("kl_coef", 0.0) * kl_loss,
    }


@adapter("timemaster", "classification_metrics")
def classes(case: Case) -> dict[str, Any]:
    case.settings("f1")
    truth, predicted = (case.inputs[name].long().tolist() for name in ("label_id", "pred_id"))
    found = classification(truth, predicted, classes="seen")
    return {
        "accuracy": found.accuracy,
        "macro_f1": found.macro_f1,
        "per_class_accuracy": list(found.by_class.values()),
    }
