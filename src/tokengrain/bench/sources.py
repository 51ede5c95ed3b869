"""The credit sources that `tokengrain bench credit` compares, and the models that they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.bench.training import PAIRS, STEPS, exchanged, train_on, world_samples
from tokengrain.callables import nearest
from tokengrain.credit import FunctionCredit
from tokengrain.errors import RecipeError

Credit = Callable[[TokenBatch], Tensor]
Kind = Literal["truth", "control", "untrained", "trained", "own"]
BETA = 0.3
"""Of DPO and of the rewards read from its models: what suits `stories`."""


@dataclass
class Bench:
    """What the sources of one seed share: the world's pairs and the models trained on them.

    Attributes:
        world: as `load_world` gives it; its seed decides the pairs.
        seed: of the trainings.
        steps, pairs: length of each training, and rows per step.
        seconds: how long each training took, by name.
    """

    world: Any
    seed: int = 0
    steps: int = STEPS
    pairs: int = PAIRS
    seconds: dict[str, float] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Any:
        return world_samples(self.world)

    def model(self, name: str) -> Any:
        """A model of `TRAININGS`, trained when first asked for."""
        if name not in self._models:
            start = time.perf_counter()
            self._models[name] = TRAININGS[name](self).requires_grad_(False)
            self.seconds[name] = time.perf_counter() - start
        return self._models[name]

    def train(self, objective: str, rows: Any = None, *, model: Any = None, **hyper: Any) -> Any:
        """A short training of the world's base model (or of `model`) on this seed's pairs (or on `rows`)."""
        from tokengrain.objectives import make_objective

        bound, rows = make_objective(objective, **hyper), self.rows if rows is None else rows
        return train_on(self.world, bound, rows, self.seed, model=model, steps=self.steps, pairs=self.pairs)


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
    "guide": lambda b: b.train("dpo", beta=BETA),
    "reverse": lambda b: b.train("dpo", exchanged(b.rows), beta=BETA),
    "tdpo": lambda b: b.train("tdpo2", beta=BETA, alpha=0.25),
    "qrm": lambda b: _reward_model(b, "mean"),
    "last": lambda b: _reward_model(b, "last"),
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
        offered: whether a world has what it reads.
        code: identifies a function of the user's.
    """

    name: str
    kind: Kind
    what: str
    build: Callable[[Bench], Credit]
    trains: tuple[str, ...] = ()
    offered: Callable[[Any], bool] = lambda world: True
    code: str = ""


def _random(bench: Bench) -> Credit:
    from tokengrain.credit import RandomCredit

    return RandomCredit(seed=bench.seed)


def _surprise(bench: Bench) -> Credit:
    from tokengrain.credit.surprise import Surprise

    return Surprise(model=bench.world.reference)


def _entropy(bench: Bench) -> Credit:
    from tokengrain.credit.surprise import Entropy

    return Entropy(model=bench.world.reference)


def _contrastive(bench: Bench) -> Credit:
    from tokengrain.credit import ContrastivePrompting

    world = bench.world
    return ContrastivePrompting(model=world.reference, tokenizer=world.tokenizer, templates=world.contrastive_templates)


def _guide(bench: Bench) -> Credit:
    from tokengrain.credit import GuideLogRatio

    return GuideLogRatio(model=bench.model("guide"), reference=bench.world.reference, beta=BETA)


def _contrastive_dpo(bench: Bench) -> Credit:
    from tokengrain.credit.contrastive_dpo import ContrastiveDPO

    return ContrastiveDPO(model=bench.model("guide"), reverse=bench.model("reverse"), beta=BETA)


def _tdpo(bench: Bench) -> Credit:
    from tokengrain.credit.tdpo import TDPOAdvantage

    return TDPOAdvantage(model=bench.model("tdpo"), reference=bench.world.reference, beta=BETA)


def _scores(name: str) -> Callable[[Bench], Credit]:
    def build(bench: Bench) -> Credit:
        from tokengrain.credit.reward_model import RewardModelCredit

        return RewardModelCredit(model=bench.model(name))

    return build


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda world: all(hasattr(world, name) for name in names)


SOURCES: dict[str, BenchSource] = {
    s.name: s
    for s in (
        BenchSource(
            "exact", "truth", "the exact soft advantage, as a check: agrees by definition", lambda b: b.world.advantages
        ),
        BenchSource("random", "control", "uniform numbers: what chance reaches", _random),
        BenchSource(
            "reward",
            "control",
            "each token's own true reward, without what follows from it",
            lambda b: b.world.credit("reward"),
            offered=_has("credit"),
        ),
        BenchSource(
            "worth",
            "control",
            "what a word looks worth without its context",
            lambda b: b.world.credit("worth"),
            offered=_has("credit"),
        ),
        BenchSource("surprise", "untrained", "log-probability under the base model", _surprise),
        BenchSource("entropy", "untrained", "entropy of the base model's distribution", _entropy),
        BenchSource(
            "contrastive",
            "untrained",
            "contrastive prompting of the base model (T-REG)",
            _contrastive,
            offered=_has("contrastive_templates"),
        ),
        BenchSource("guide", "trained", "log-ratio of a DPO model to the base (TGDPO)", _guide, ("guide",)),
        BenchSource(
            "contrastive_dpo",
            "trained",
            "DPO against DPO on exchanged pairs (AlignDistil)",
            _contrastive_dpo,
            ("guide", "reverse"),
        ),
        BenchSource("tdpo", "trained", "advantage in a TDPO2 model", _tdpo, ("tdpo",)),
        BenchSource(
            "qrm", "trained", "token scores of a reward model trained on pairs (Q-RM)", _scores("qrm"), ("qrm",)
        ),
        BenchSource(
            "last_token_rm", "trained", "the same model trained on its last token's score", _scores("last"), ("last",)
        ),
    )
}


def own_source(reference: str | Callable[..., Any]) -> BenchSource:
    """A user's function `(batch) -> [N]` as a source of the comparison.

    Args:
        reference: the function, or "module:function" or "path.py:function".

    Raises:
        RecipeError: there is no such function.
    """
    made = FunctionCredit(function=reference)
    name = reference.rpartition(":")[2] if isinstance(reference, str) else made.name.removeprefix("function ")
    what = f"yours: {reference if isinstance(reference, str) else name}"
    return BenchSource(name, "own", what, lambda bench: made, code=made.fingerprint())


def chosen_sources(names: Sequence[str] | None, world: Any) -> list[BenchSource]:
    """The sources of these names; None: all that the world offers.

    Raises:
        RecipeError: an unknown name, or a source that needs what this world does not have.
    """
    if names is None:
        return [s for s in SOURCES.values() if s.offered(world)]
    chosen = []
    for name in names:
        if name not in SOURCES:
            raise RecipeError(f"unknown credit source {name!r}{nearest(name, SOURCES)}")
        if not SOURCES[name].offered(world):
            raise RecipeError(f"credit source {name!r} needs what world {world.name!r} does not have")
        chosen.append(SOURCES[name])
    return chosen
