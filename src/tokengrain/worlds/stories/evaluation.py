"""Evaluation of a policy in the world `stories`: on its own samples, with sums over the whole vocabulary.

At every sampled position the expected reward Σ_a π(a|s)·r(s,a) and the divergence Σ_a π log(π/π_ref) replace
the
values of the token that happened to be drawn: the same expectation with much less variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.evaluation import Frontier, bootstrap, mean_interval, wilson, win_rate
from tokengrain.worlds.stories.grammar import Grammar, Prompt, Walk

ROWS = 512
"""Sequences per forward pass."""


@dataclass(frozen=True)
class Rollout:
    """Completions that a model sampled. Shapes: n completions, L tokens of the longest.

    Attributes:
        prompts: the prompt of each.
        ids: long `[n, L]`; alive: bool `[n, L]`, tokens up to `<end>` included.
        logps: `[n, L, V]`, the model's log-probabilities before each token.
        walk: where the completions lead in the grammar.
    """

    prompts: list[Prompt]
    ids: Tensor
    alive: Tensor
    logps: Tensor
    walk: Walk

    @property
    def true_rewards(self) -> Tensor:
        """Total true reward of each completion, `[n]`."""
        return (self.walk.rewards * self.alive).sum(1)

    def broken(self, grammar: Grammar) -> Tensor:
        """Completions with an ungrammatical token or without an end, bool `[n]`.

        `<end>` out of place is ungrammatical too, although it leads to `finished`.
        """
        legal = grammar.legal[self.walk.tables[:, None], self.walk.states, self.ids]
        return (~legal & self.alive).any(1) | (self.walk.last != grammar.finished)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; puts the model's mode back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _logps(logits: Tensor) -> Tensor:
    return logits.cpu().double().log_softmax(-1)


def prompt_tensor(grammar: Grammar, prompts: Sequence[Prompt]) -> Tensor:
    """Token ids `[n, L]` of prompts of one length, `<s>` in front."""
    return torch.tensor([[grammar.bos, *grammar.encode(p.text)] for p in prompts])


def rollout(
    model: Any,
    grammar: Grammar,
    prompts: Sequence[Prompt],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Sample one completion per prompt at temperature 1, with a random generator of its own.

    Args:
        model: a causal language model (Hugging Face, with or without a PEFT adapter).
        prompts: of one length in tokens.
        progress: called with how many completions have ended, and how many there are.

    A completion ends at `<end>` or at the longest length that the grammar allows (without `<end>` it is
    broken by then).
    """
    device = _device(model)
    generator = torch.Generator().manual_seed(seed)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    ids, logps, alive = [], [], []
    feed, cache = prompt_tensor(grammar, prompts).to(device), None
    with _inference(model):
        for _ in range(grammar.longest):
            out = model(input_ids=feed, past_key_values=cache, use_cache=True)
            logp, cache = _logps(out.logits[:, -1]), out.past_key_values
            cumulative = logp.exp().cumsum(-1)
            u = torch.rand(len(prompts), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
            token = (u >= cumulative).sum(-1).clamp(max=cumulative.shape[-1] - 1)
            ids.append(token.where(~done, grammar.pad))
            logps.append(logp)
            alive.append(~done)
            done = done | (token == grammar.eos)
            if progress is not None:
                progress(int(done.sum()), len(prompts))
            if done.all():
                break
            feed = ids[-1][:, None].to(device)
    tokens = torch.stack(ids, 1)
    return Rollout(list(prompts), tokens, torch.stack(alive, 1), torch.stack(logps, 1), grammar.walk(prompts, tokens))


def completion_logps(model: Any, grammar: Grammar, prompts: Sequence[Prompt], ids: Tensor) -> Tensor:
    """Log-probabilities `[n, L, V]` before every token of completions `[n, L]`."""
    heads = prompt_tensor(grammar, prompts)
    rows = torch.cat([heads, ids], 1)[:, :-1]
    with _inference(model):
        parts = [model(input_ids=part.to(_device(model))).logits for part in rows.split(ROWS)]
    return torch.cat([_logps(part[:, heads.shape[1] - 1 :]) for part in parts])


def policy_metrics(
    grammar: Grammar,
    frontier: Frontier,
    sampled: Rollout,
    ref_logps: Tensor,
    base_rewards: Tensor | None = None,
) -> dict[str, float]:
    """Reward, KL, frontier share and the rest, from a policy's own samples.

    Args:
        sampled: the policy's samples; every prompt equally often.
        ref_logps: `[n, L, V]`, the reference's log-probabilities at the same positions.
        base_rewards: `[n]`, true rewards of the reference's own samples to the same prompts, for the win
            rate.

    Returns:
        Flat numbers; intervals are 95 %. Rewards are true rewards per completion, `kl` nats per completion,
        `entropy` nats per token, `length` tokens.
    """
    p = sampled.logps.exp()
    tables, states = sampled.walk.tables[:, None], sampled.walk.states
    step_reward = (p * grammar.reward[tables, states]).sum(-1)
    step_kl = (p * (sampled.logps - ref_logps)).where(p > 0, 0.0).sum(-1)
    step_entropy = torch.special.entr(p).sum(-1)
    reward, kl, entropy, length = (
        (x * sampled.alive).sum(1) for x in (step_reward, step_kl, step_entropy, torch.ones_like(step_kl))
    )
    strata = torch.unique(torch.tensor([(q.table, q.start) for q in sampled.prompts]), dim=0, return_inverse=True)[1]
    r, k = mean_interval(reward, strata), mean_interval(kl, strata)
    share = bootstrap(lambda m: frontier.share(m[..., 0], m[..., 1]), torch.stack([reward, kl], 1), strata)
    broken = wilson(int(sampled.broken(grammar).sum()), len(reward))
    metrics = {
        "reward": r.value, "reward_low": r.low, "reward_high": r.high,
        "kl": k.value, "kl_low": k.low, "kl_high": k.high,
        "best_reward": float(frontier.best_reward(k.value)),
        "share": share.value, "share_low": share.low, "share_high": share.high,
        "broken": broken.value, "broken_low": broken.low, "broken_high": broken.high,
        "length": float(length.mean()),
        "entropy": float(entropy.sum() / length.sum()),
        "samples": len(reward),
    }  # fmt: skip
    if base_rewards is not None:
        wins = win_rate(sampled.true_rewards, base_rewards, strata)
        metrics |= {"win_rate": wins.value, "win_rate_low": wins.low, "win_rate_high": wins.high}
    return metrics
