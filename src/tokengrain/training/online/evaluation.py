"""Evaluation of a policy on prompts: sample, reward, average with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from tokengrain.evaluation.intervals import mean_interval
from tokengrain.evaluation.online import mean_over_prompts, pass_at_k
from tokengrain.rollout.base import PromptItem
from tokengrain.training.evaluate import evaluated, meant
from tokengrain.training.online.checks import check_prompts
from tokengrain.training.online.prompts import PromptDataset

if TYPE_CHECKING:
    from torch import nn

    from tokengrain.rewards import RewardSuite
    from tokengrain.rollout.base import Sampler
    from tokengrain.training.online.config import OnlineConfig
    from tokengrain.training.online.setting import Ranks


class EvalPrompts(Sequence[PromptItem]):
    """This rank's share of the prompts to evaluate on; `n_samples` is the size of the whole set."""

    def __init__(self, dataset: PromptDataset, rank: int, world: int) -> None:
        self.own, self.n_samples = dataset.items[rank::world], len(dataset)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: Any) -> Any:
        return self.own[index]


def completion_metrics(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
        entries: one per prompt, with `lengths` and `truncated` and, where there are rewards, `reward` and `by_name`
            (lists over its completions), and `correct`.

    Returns:
        `reward` with the ends of its 95 % interval (prompts are independent, completions of a prompt are not),
        `reward_<name>`, `length`, `truncated`, and with a reward that says what is correct `correct` with its interval.
    """
    lengths = [n for e in entries for n in e["lengths"]]
    metrics = {
        "length": sum(lengths) / len(lengths),
        "truncated": sum(t for e in entries for t in e["truncated"]) / len(lengths),
    }
    if not any("reward" in e for e in entries):
        return metrics
    metrics |= _with_interval("reward", [_mean(e["reward"]) for e in entries])
    for name in entries[0]["by_name"]:
        metrics |= _with_interval(f"reward_{name}", [_mean(e["by_name"][name]) for e in entries], interval=False)
    found = mean_over_prompts(torch.tensor([_mean(e["correct"]) for e in entries]))
    return metrics | {"correct": found.value, "correct_low": found.low, "correct_high": found.high}


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


def _with_interval(name: str, per_prompt: Sequence[float], *, interval: bool = True) -> dict[str, float]:
    known = [v for v in per_prompt if v == v]
    if not known:
        return {}
    if len(known) < 2 or not interval:
        return {name: sum(known) / len(known)}
    found = mean_interval(known)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


class OnlineEvaluationMixin(Trainer):
    """Overrides of `transformers.Trainer` that evaluate by sampling."""

    if TYPE_CHECKING:  # what OnlineTrainer adds
        args: OnlineConfig
        model: nn.Module
        sampler: Sampler
        rewards: RewardSuite | None
        ranks: Ranks

        def _prompts(self, data: Any, name: str) -> PromptDataset: ...

        def _refresh_sampler(self) -> None: ...

        def _release_sampler(self) -> None: ...

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's share of the evaluation prompts.

        Raises:
            DataError: there are none, or one does not fit the model.
        """
        prompts = self._prompts(meant(self, eval_dataset), "eval")
        check_prompts(prompts, self.model, self.args.max_new_tokens)
        return EvalPrompts(prompts, self.ranks.rank, self.ranks.world)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample completions of all evaluation prompts and average their rewards; see `completion_metrics`."""
        self.callback_handler.eval_dataloader = dataloader
        try:
            self._refresh_sampler()
            own = self.ranks.together(lambda: self._evaluated(list(dataloader)))
            entries = [entry for part in self.ranks.exchange(own) for entry in part]
        finally:
            if not self.is_in_train:  # else the next rollout refreshes
                self._release_sampler()
        metrics = completion_metrics(entries)
        if self.args.eval_generations > 1 and "correct" in entries[0]:
            metrics |= _pass_at_k([e["correct"] for e in entries])
        return evaluated(metrics, metric_key_prefix, dataloader.n_samples)

    def _evaluated(self, prompts: list[PromptItem]) -> list[dict[str, Any]]:
        """What became of each prompt; see `completion_metrics`."""
        if not prompts:
            return []
        n = self.args.eval_generations
        sampler = getattr(self.sampler, "sampler", self.sampler)  # without branches
        with self.accelerator.autocast():
            rollouts = sampler.sample(prompts, n=n, sampling=self.args.eval_sampling())
        entries: list[dict[str, Any]] = [
            {"lengths": [len(c.ids) for c in group], "truncated": [c.truncated for c in group]} for _, group in rollouts
        ]
        if self.rewards is None:
            return entries
        texts = None if self.rewards.tokenizer is not None else [""] * len(rollouts.completions)
        result = self.rewards.score(rollouts, texts)
        judge = result.by_name[self.args.correct_from or next(iter(result.by_name))]
        for index, entry in enumerate(entries):
            part = slice(index * n, (index + 1) * n)
            entry["reward"] = result.total[part].tolist()
            entry["by_name"] = {name: values[part].tolist() for name, values in result.by_name.items()}
            entry["correct"] = (judge[part] > 0.5).tolist()
        return entries


def _pass_at_k(correct: Sequence[Sequence[bool]]) -> dict[str, float]:
    """pass@k of 1, 2, 4, ... completions, as far as there are so many."""
    right = torch.tensor([sum(row) for row in correct])
    n = len(correct[0])
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return {f"pass@{k}": float(pass_at_k(n, right, k).mean()) for k in ks}
