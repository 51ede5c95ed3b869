"""A task for group methods: answer a prompt with four digits whose sum has a given remainder.

40 prompts, of a target and a modulus out of 2, 5, 10 and 20: some are right by chance half of the time, some seldom.
Specification: dcpo.md, section 7; thr.md has the same task.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.claims.tiny_gru import GRUPolicy, equal_segments
from tokengrain.batch import Segments
from tokengrain.loss import Counts, NormaliserName, make_normaliser
from tokengrain.method import BoundObjective

DIGITS, LENGTH, HIDDEN = 10, 4, 48
MODULI = (2, 5, 10, 20)
GROUP_SIZE = 8


@dataclass(frozen=True)
class Task:
    """The prompts: targets and moduli, long `[P]` each."""

    targets: Tensor
    moduli: Tensor

    @classmethod
    def draw(cls, each: int, generator: torch.Generator) -> Task:
        """`each` prompts of every modulus, with random targets."""
        moduli = torch.tensor(MODULI).repeat_interleave(each)
        targets = (torch.rand(len(moduli), generator=generator) * moduli).long()
        return cls(targets, moduli)

    def __len__(self) -> int:
        return len(self.targets)

    def correct(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Whether completions `[n, 4]` are right, bool `[n]`."""
        return tokens.sum(1) % self.moduli[prompts] == self.targets[prompts]


@dataclass
class Groups:
    """G groups of 8 completions, those of a prompt next to each other.

    Attributes:
        prompts: long `[G * 8]`; tokens: long `[G * 8, 4]`; correct: bool `[G * 8]`.
        drawn: completions that were sampled for it, those that were thrown away included.
    """

    prompts: Tensor
    tokens: Tensor
    correct: Tensor
    drawn: int

    @property
    def group(self) -> Tensor:
        """The group of each completion, long `[G * 8]`."""
        return torch.arange(len(self.prompts) // GROUP_SIZE).repeat_interleave(GROUP_SIZE)

    @property
    def segments(self) -> Segments:
        return equal_segments(len(self.prompts), LENGTH)

    def kept(self, groups: Tensor) -> Groups:
        """Only the groups that are marked, bool `[G]`."""
        keep = groups[self.group]
        return Groups(self.prompts[keep], self.tokens[keep], self.correct[keep], self.drawn)


def sample_groups(policy: GRUPolicy, task: Task, generator: torch.Generator) -> Groups:
    """One group for every prompt."""
    prompts = torch.arange(len(task)).repeat_interleave(GROUP_SIZE)
    tokens = policy.sample(prompts, LENGTH, generator)
    return Groups(prompts, tokens, task.correct(prompts, tokens), len(prompts))


def accuracy(policy: GRUPolicy, task: Task, samples: int, generator: torch.Generator) -> float:
    """Share of right samples, `samples` of every prompt."""
    prompts = torch.arange(len(task)).repeat_interleave(samples)
    return float(task.correct(prompts, policy.sample(prompts, LENGTH, generator)).float().mean())


def warm_start(policy: GRUPolicy, task: Task, steps: int, right: float, generator: torch.Generator) -> None:
    """Fit to random completions of which a share `right` is right, Adam 3e-3, 64 per step."""
    optimiser = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(steps):
        prompts = torch.randint(len(task), (64,), generator=generator)
        loss = -policy.logps(prompts, mixed_completions(task, prompts, right, generator)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def mixed_completions(task: Task, prompts: Tensor, right: float, generator: torch.Generator) -> Tensor:
    """Random completions `[n, 4]` of prompts `[n]`, each right with this probability or more."""
    tries = torch.randint(DIGITS, (len(prompts), 200, LENGTH), generator=generator)
    fits = task.correct(prompts.repeat_interleave(200), tries.flatten(0, 1)).view(len(prompts), 200)
    first = fits.int().argmax(1)
    wanted = torch.rand(len(prompts), generator=generator) < right
    return tries[torch.arange(len(prompts)), torch.where(wanted, first, 0)]


class Trainer:
    """Adam on the clipped losses of groups, gradients clipped at 1.

    Args:
        policy: changed in place.
        objective: as `make_objective` gives it; it is called with old log-probs and advantages.
        normaliser: of a minibatch, a step of its own.
        rate: learning rate.
    """

    def __init__(self, policy: GRUPolicy, objective: BoundObjective, normaliser: NormaliserName, rate: float) -> None:
        self.policy, self.objective = policy, objective
        self.normalise = make_normaliser(normaliser)
        self.optimiser = torch.optim.Adam(policy.parameters(), rate)

    def update(self, groups: Groups, advantages: Tensor, minibatches: int, generator: torch.Generator) -> list[float]:
        """One pass over all groups in random order; the share of clipped tokens of every step.

        Args:
            advantages: `[N]`.
        """
        with torch.no_grad():
            old = self.policy.logps(groups.prompts, groups.tokens)
        count = len(groups.prompts) // GROUP_SIZE
        order = torch.randperm(count, generator=generator)
        return [self._step(groups, old, advantages, part) for part in order.chunk(minibatches)]

    def _step(self, groups: Groups, old: Tensor, advantages: Tensor, part: Tensor) -> float:
        rows = (part[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE)).flatten()
        segments = equal_segments(len(rows), LENGTH)
        output = self.objective(
            segments=segments,
            logps=self.policy.logps(groups.prompts[rows], groups.tokens[rows]),
            old_logps=old.view(-1, LENGTH)[rows].flatten(),
            advantages=advantages.view(-1, LENGTH)[rows].flatten(),
        )
        self.optimiser.zero_grad()
        self.normalise(output, Counts.of(segments, pairs=False, prompts=len(part))).backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimiser.step()
        return float(output.metrics["clip/tokens"].mean())
