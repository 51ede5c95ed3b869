"""What the credit sources of one seed share: the world, its data, and the models trained on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.bench.questions import GENERATIONS, ON_PAIRS, Question
from tokengrain.bench.rollout_credit import train_critic
from tokengrain.bench.training import PAIRS, STEPS, exchanged, train_on, world_samples

Credit = Callable[[TokenBatch], Tensor]
Kind = Literal["truth", "control", "untrained", "trained", "own"]
EVERY = ("pairs", "chain", "reference")
COMPLETIONS = ("pairs", "chain")


@dataclass
class Bench:
    """What the sources of one seed share: the world's pairs and the models trained on them.

    Attributes:
        world: as `load_world` gives it; its seed decides the pairs.
        seed: of the trainings, and of sources that draw numbers.
        steps, pairs: length of each training, and rows per step.
        question: what is asked; generations: completions per prompt, where groups are sampled.
        seconds: how long each training took, by name.
    """

    world: Any
    seed: int = 0
    steps: int = STEPS
    pairs: int = PAIRS
    question: Question = ON_PAIRS
    generations: int = GENERATIONS
    seconds: dict[str, float] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Any:
        return world_samples(self.world)

    def model(self, name: str) -> Any:
        """A model of `TRAININGS`, trained when first asked for."""
        if name not in self._models:
            start = time.perf_counter()
            self._models[name] = TRAININGS[name](self)
            self.seconds[name] = time.perf_counter() - start
        return self._models[name]

    def train(self, objective: str, rows: Any = None, *, model: Any = None, **hyper: Any) -> Any:
        """A short training of the world's base model (or of `model`) on this seed's pairs (or on `rows`)."""
        from tokengrain.objectives import make_objective

        bound, rows = make_objective(objective, **hyper), self.rows if rows is None else rows
        found = train_on(self.world, bound, rows, self.seed, model=model, steps=self.steps, pairs=self.pairs)
        return found.requires_grad_(False)


def _reward_model(bench: Bench, pooling: str) -> Any:
    """A reward model that starts from the world's base; its scale is set on the pairs it was trained on."""
    import torch
    from transformers import AutoModelForCausalLM

    from tokengrain.training.reward_models import measure_scores, reward_model_from

    base = AutoModelForCausalLM.from_pretrained(bench.world.base_model())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)  # of the head's first weights
        model = reward_model_from(base)
    trained = bench.train("qrm", model=model, pooling=pooling)
    measure_scores(trained, bench.rows)  # its scores have neither zero nor scale before
    return trained


TRAININGS: dict[str, Callable[[Bench], Any]] = {
    "guide": lambda b: b.train("dpo", beta=b.question.beta),
    "reverse": lambda b: b.train("dpo", exchanged(b.rows), beta=b.question.beta),
    "tdpo": lambda b: b.train("tdpo2", beta=b.question.beta, alpha=0.25),
    "qrm": lambda b: _reward_model(b, "mean"),
    "last": lambda b: _reward_model(b, "last"),
    "critic": lambda b: train_critic(b.world, seed=b.seed, steps=b.steps, generations=b.generations),
}


@dataclass(frozen=True)
class BenchSource:
    """A credit source of the comparison.

    Attributes:
        name: how it is called in tables and on the command line.
        kind: "truth"; "control" (reads the world, or nothing); "untrained" and "trained" (what a user could
            have); "own".
        what: one line for listings.
        build: makes it for one seed.
        trains: the models of `TRAININGS` that it needs.
        questions: names of the questions that it has an answer to.
        lacks: what a world does not have that it reads; "" if nothing.
        code: identifies a function of the user's.
    """

    name: str
    kind: Kind
    what: str
    build: Callable[[Bench], Credit]
    trains: tuple[str, ...] = ()
    questions: tuple[str, ...] = COMPLETIONS
    lacks: Callable[[Any], str] = lambda world: ""
    code: str = ""

    def unfit(self, world: Any, question: Question) -> str:
        """Why it cannot be asked this; "" if it can."""
        if question.name not in self.questions:
            return f"it needs {' or '.join(NEEDED[name] for name in self.questions)}"
        return self.lacks(world)


NEEDED = {
    "pairs": "pairs",
    "chain": "groups of graded chains, as in arithmetic and revision",
    "reference": "a reference answer, as in revision",
}
"""What a source is missing that answers only this question."""
