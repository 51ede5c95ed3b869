"""What is best in the world `stories`, exactly: dynamic programming over the grammar's states.

With base table P, deterministic next state s' and reward r(s, a), the policy that maximises E[R] − β·KL has

    V(s) = β log Σ_a P(a|s) exp((r(s,a) + V(s'))/β)      A(s,a) = r(s,a) + V(s') − V(s)      π* = P exp(A/β)

Expected reward, KL (nats), entropy (nats) and length (tokens) of any policy on the grammar's support follow
by policy evaluation. The states have no cycles, so that one pass over their levels is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrain.evaluation.frontier import Frontier
from tokengrain.worlds.stories.grammar import Grammar

BETAS = torch.logspace(2, -0.9208187539523751, 120, dtype=torch.float64)
"""The sweep of the frontier: 100 down to 0.12, geometrically."""


@dataclass(frozen=True)
class PolicyValue:
    """Expectations of a policy from a state on: reward, KL to the base, entropy, tokens; each `[T, S]`."""

    reward: Tensor
    kl: Tensor
    entropy: Tensor
    length: Tensor

    def at_prompts(self, grammar: Grammar) -> dict[str, float]:
        """Means over the plain prompts."""
        names = ("reward", "kl", "entropy", "length")
        return {name: float(at_prompts(grammar, getattr(self, name)).mean()) for name in names}


def at_prompts(grammar: Grammar, values: Tensor) -> Tensor:
    """Values `[T, S]` at the first state of every plain prompt, `[P]`."""
    return torch.stack([values[p.table, p.start] for p in grammar.plain])


def soft_values(grammar: Grammar, beta: float | Tensor) -> Tensor:
    """V at temperature `beta`: `[T, S]`, or `[B, T', S]` for `B` temperatures, over the T' plain tables only.

    A float may be 0 (V is then the highest reward that can be reached) or infinite (the base's expectation).
    The result is differentiable in a tensor of temperatures.
    """
    many = isinstance(beta, Tensor)
    tables = slice(0, grammar.n_places if many else None)
    temperature = beta[:, None, None, None] if isinstance(beta, Tensor) else beta
    shape = grammar.edge_logp[tables].shape[:2]
    values = torch.zeros((*beta.shape, *shape) if isinstance(beta, Tensor) else shape, dtype=torch.float64)
    for level in grammar.levels[1:]:
        logp = grammar.edge_logp[tables, level]
        ahead = grammar.edge_reward[tables, level] + _next(values, grammar.edge_next[tables, level])
        if many or 0 < temperature < float("inf"):
            here = temperature * (logp + ahead / temperature).logsumexp(-1, keepdim=True)
        elif temperature == 0:
            here = ahead.where(logp.isfinite(), -torch.inf).amax(-1, keepdim=True)
        else:
            here = (logp.exp() * ahead).sum(-1, keepdim=True)
        values = values.index_copy(-1, level, here.squeeze(-1))
    return values


def _next(values: Tensor, next_state: Tensor) -> Tensor:
    """`values[..., t, next_state[t, ...]]`: `[..., T, S]` at `[T, n, K]` states gives `[..., T, n, K]`."""
    tables = torch.arange(next_state.shape[0])[:, None, None]
    return values[..., tables, next_state]


def edge_advantages(grammar: Grammar, values: Tensor) -> Tensor:
    """A on edges, `[T, S, K]`."""
    return grammar.edge_reward + _next(values, grammar.edge_next) - values[..., None]


def advantages(grammar: Grammar, values: Tensor) -> Tensor:
    """A for every token, `[T, S, V]`; ungrammatical ones lead to `broken`, whose value is 0."""
    return grammar.reward + _next(values, grammar.next_state) - values[..., None]


def optimal_logp(grammar: Grammar, beta: float) -> Tensor:
    """log π* on edges `[T, S, K]` at temperature `beta`; 0 gives the best policy nearest to the base."""
    edge_a = edge_advantages(grammar, soft_values(grammar, beta))
    if beta > 0:
        return grammar.edge_logp + edge_a / beta
    best = grammar.edge_logp.where(edge_a > -1e-9, -torch.inf)
    # Among the best actions follow the base, weighted by how much of it stays optimal afterwards.
    mass = torch.zeros(grammar.edge_logp.shape[:2], dtype=torch.float64)
    for level in grammar.levels[1:]:
        mass[:, level] = (best[:, level] + _next(mass, grammar.edge_next[:, level])).logsumexp(-1)
    return best + _next(mass, grammar.edge_next) - mass[..., None]


def evaluate_logp(grammar: Grammar, logp: Tensor) -> PolicyValue:
    """Expectations of the policy with these log-probabilities on edges, `[T, S, K]`."""
    out = [torch.zeros(grammar.edge_logp.shape[:2], dtype=torch.float64) for _ in range(4)]
    for level in grammar.levels[1:]:
        p, here = logp[:, level].exp(), logp[:, level].clamp(min=-1e30)
        per_step = (
            grammar.edge_reward[:, level],
            here - grammar.edge_logp[:, level].clamp(min=-1e30),
            -here,
            torch.ones_like(here),
        )
        for values, step in zip(out, per_step):
            ahead = step + _next(values, grammar.edge_next[:, level])
            values[:, level] = (p * ahead).where(p > 0, 0.0).sum(-1)
    return PolicyValue(*out)


def frontier(grammar: Grammar) -> Frontier:
    """The best mean reward over the plain prompts at every mean KL to the grammar's base distribution.

    One β for all prompts is optimal for the means. V is max E[R] − β·KL, so that KL = −dV/dβ (envelope
    theorem) and E[R] = V + β·KL. The last point is the limit β → 0, beyond which more KL buys nothing.
    """
    betas = BETAS.clone().requires_grad_()
    values = soft_values(grammar, betas)
    mean = torch.stack([values[:, p.table, p.start] for p in grammar.plain]).mean(0)
    (slope,) = torch.autograd.grad(mean.sum(), betas)
    kl, reward = -slope, (mean - BETAS * slope).detach()
    base = at_prompts(grammar, soft_values(grammar, float("inf"))).mean()
    limit = evaluate_logp(grammar, optimal_logp(grammar, 0.0)).at_prompts(grammar)
    return Frontier([0.0, *kl.tolist(), limit["kl"]], [float(base), *reward.tolist(), limit["reward"]])
