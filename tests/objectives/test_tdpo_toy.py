"""TDPO's control of divergence on a task small enough to enumerate (TDPO spec, section 7). Minutes: slow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tokengrain.batch import Segments
from tokengrain.loss import Counts, make_normaliser
from tokengrain.method import make_objective

VOCAB, LENGTH, PAIRS, STEPS = 4, 6, 512, 400
ALL = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))


class Policy(nn.Module):
    """A GRU over words 0..3, started by word 4: sequences `[B, T]` to log-probabilities `[B, T, V]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + 1, 16)
        self.gru = nn.GRU(16, 48, batch_first=True)
        self.head = nn.Linear(48, VOCAB)

    def forward(self, sequences: Tensor) -> Tensor:
        start = torch.full_like(sequences[:, :1], VOCAB)
        states, _ = self.gru(self.embedding(torch.cat([start, sequences[:, :-1]], 1)))
        return torch.log_softmax(self.head(states), -1)


@dataclass
class World:
    """A reference policy and pairs sampled from it: chosen, rejected, chosen, ... `[2P, T]`."""

    reference: Policy
    sequences: Tensor

    @classmethod
    def make(cls, seed: int) -> World:
        torch.manual_seed(seed)
        chain = torch.softmax(torch.randn(VOCAB + 1, VOCAB), -1)
        reference = Policy()
        optimiser = torch.optim.Adam(reference.parameters(), 1e-2)
        previous = torch.cat([torch.full_like(ALL[:, :1], VOCAB), ALL[:, :-1]], 1)
        weight = torch.exp(torch.log(chain[previous, ALL]).sum(1))  # probability of each sequence
        for _ in range(150):
            loss = -(weight[:, None, None] * chain[previous] * reference(ALL)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        reference.requires_grad_(False)
        probability = sequence_logps(reference(ALL), ALL).exp()
        pairs = ALL[torch.multinomial(probability, 2 * PAIRS, replacement=True)].view(PAIRS, 2, LENGTH)
        bigrams = ((pairs[..., :-1] == 2) & (pairs[..., 1:] == 3)).sum(-1)
        reward = bigrams - 0.25 * (pairs == 0).sum(-1)
        first_wins = torch.rand(PAIRS) < torch.sigmoid(2.0 * (reward[:, 0] - reward[:, 1]))
        ordered = torch.where(first_wins[:, None, None], pairs, pairs.flip(1))
        return cls(reference, ordered.reshape(2 * PAIRS, LENGTH))

    def train(self, name: str, **hyper: float) -> dict[str, float]:
        """Mean sequential KL of either side and the policy's entropy after training."""
        policy = Policy()
        policy.load_state_dict(self.reference.state_dict())
        objective, normalise = make_objective(name, beta=0.1, **hyper), make_normaliser("mean")
        segments = Segments.from_lengths([LENGTH] * 2 * PAIRS)
        counts = Counts.of(segments, pairs=True)
        optimiser = torch.optim.Adam(policy.parameters(), 2e-3)
        logq = self.reference(self.sequences)
        for _ in range(STEPS):
            logp = policy(self.sequences)
            output = objective(
                segments=segments,
                logps=taken(logp, self.sequences).flatten(),
                ref_logps=taken(logq, self.sequences).flatten(),
                kl=(logq.exp() * (logq - logp)).sum(-1).flatten(),
            )
            optimiser.zero_grad()
            normalise(output, counts).backward()
            optimiser.step()
        with torch.no_grad():
            logps = sequence_logps(policy(ALL), ALL)
        means = {side: float(output.metrics[f"kl/{side}"].mean()) for side in ("chosen", "rejected")}
        return {**means, "entropy": float(-(logps.exp() * logps).sum())}


def taken(logps: Tensor, sequences: Tensor) -> Tensor:
    return logps.gather(-1, sequences[..., None])[..., 0]


def sequence_logps(logps: Tensor, sequences: Tensor) -> Tensor:
    return taken(logps, sequences).sum(1)


@pytest.mark.slow
def test_alpha_holds_the_policy_near_the_reference() -> None:
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(3):
        world = World.make(seed)
        for alpha in (0.0, 0.1, 0.5, 1.0):
            runs.setdefault(f"tdpo2 {alpha}", []).append(world.train("tdpo2", alpha=alpha))
        runs.setdefault("tdpo1", []).append(world.train("tdpo1"))

    def mean(run: str, key: str) -> float:
        return sum(r[key] for r in runs[run]) / len(runs[run])

    ordered = [f"tdpo2 {alpha}" for alpha in (0.0, 0.1, 0.5, 1.0)]  # alpha 0 is DPO
    for weaker, stronger in itertools.pairwise(ordered):
        assert mean(weaker, "chosen") > mean(stronger, "chosen")
        assert mean(weaker, "rejected") > mean(stronger, "rejected")
        assert mean(weaker, "entropy") < mean(stronger, "entropy")
    for run in ordered:
        assert mean(run, "rejected") > mean(run, "chosen")
    for run in ordered:  # a small effect against DPO: a margin of 12 % on means
        assert mean("tdpo1", "chosen") > 0.88 * mean(run, "chosen")
