"""What the credit sources of one seed share: the world, its data, and the models trained on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.bench.questions import (
    GENERATIONS,
    ON_PAIRS,
    OnlineCredit,
    Question,
    advantages,
    questions_of,
    train_critic,
)
from tokengrain.bench.training import PAIRS, STEPS, exchanged, train_on, world_samples
from tokengrain.errors import RecipeError
from tokengrain.method import RolloutStep
from tokengrain.methods._entropy_window import measured
from tokengrain.methods.baselines import FunctionCredit
from tokengrain.settings import nearest

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
        from tokengrain.method import make_objective

        bound, rows = make_objective(objective, **hyper), self.rows if rows is None else rows
        found = train_on(self.world, bound, rows, self.seed, model=model, steps=self.steps, pairs=self.pairs)
        return found.requires_grad_(False)


def _reward_model(bench: Bench, pooling: str) -> Any:
    """A reward model that starts from the world's base; its scale is set on the pairs it was trained on."""
    import torch
    from transformers import AutoModelForCausalLM

    from tokengrain.models import measure_scores, reward_model_from

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


# ----------------------------------------------------------------------------------------------------
# Credit of the online methods, as sources of `tokengrain bench credit`.

WINDOW = 4


def _steps(
    *steps: dict[str, Any], read: Callable[[RolloutStep, Sequence[Any]], Tensor] = advantages
) -> Callable[[Bench], Credit]:
    return lambda bench: OnlineCredit(bench.world, lambda: steps, read)


def _influence(rollout: RolloutStep, steps: Sequence[Any]) -> Tensor:
    """THR with the sign of wrong completions turned back: low where a token lowers the likelihood of correct ones."""
    assert rollout.correct is not None  # the world grades
    return rollout.quantity("thr") * rollout.broadcast(torch.where(rollout.correct, 1.0, -1.0))


def _window(rollout: RolloutStep, steps: Sequence[Any]) -> Tensor:
    """Minus the window's entropy; 0 where the completion ends before the window does."""
    found = measured(rollout.quantity("entropy"), rollout.segments, mode="paper", window=WINDOW)
    return -torch.nan_to_num(found, nan=0.0)


def _window_entropy(bench: Bench) -> Credit:
    return OnlineCredit(bench.world, lambda: (), _window, needs=frozenset({"entropy"}))


def _rto(bench: Bench) -> Credit:
    guide = bench.model("guide")
    return OnlineCredit(
        bench.world,
        lambda: [{"name": "rto", "model": guide}],
        lambda rollout, steps: _given(rollout.token_rewards),
    )


def _gae(bench: Bench) -> Credit:
    critic = bench.model("critic")
    return OnlineCredit(bench.world, lambda: [{"name": "gae"}], advantages, critic=critic)


def _r3(power: float) -> Callable[[Bench], Credit]:
    def build(bench: Bench) -> Credit:
        step = {"name": "r3", "tokenizer": bench.world.tokenizer, "marker": ">", "power": power}
        return OnlineCredit(bench.world, lambda: [step], lambda rollout, steps: steps[0].last.weights)

    return build


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # the step sets them
    return values


GROUP = {"name": "group"}
HWE = {"name": "aepo", "mode": "paper", "triggers": None, "kl": "none"}
ON_CHAINS, ON_REFERENCES = ("chain",), ("reference",)

ONLINE = (
    BenchSource(
        "outcome",
        "untrained",
        "the outcome's advantage in its group, the same for all tokens of a completion (GRPO)",
        _steps(GROUP),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "thr",
        "untrained",
        "hidden influence on the group's correct completions (THR), before signs and thresholds",
        _steps(GROUP, {"name": "thr"}, read=_influence),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "thr_advantage",
        "untrained",
        "the group's advantage as THR leaves it, mask and p = 0.1",
        _steps(GROUP, {"name": "thr"}),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "nthr_advantage",
        "untrained",
        "the group's advantage as NTHR leaves it",
        _steps(GROUP, {"name": "nthr"}),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "window_entropy",
        "untrained",
        f"minus the mean entropy of a token and the next {WINDOW - 1} (AEPO)",
        _window_entropy,
        questions=ON_CHAINS,
    ),
    BenchSource(
        "hwe",
        "untrained",
        "-1 on the tokens that AEPO's entropy reward counts, 0 elsewhere",
        _steps(HWE, read=lambda rollout, steps: -rollout.quantity("hwe")),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "rto",
        "trained",
        "token rewards of RTO: the guide's log-ratio, bounded",
        _rto,
        ("guide",),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "gae",
        "trained",
        "advantages of PPO, with a critic trained on outcomes of the base model",
        _gae,
        ("critic",),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "r3",
        "untrained",
        "weights of R3, by the deviation over the group's chains (DRO)",
        _r3(1.0),
        questions=ON_REFERENCES,
    ),
    BenchSource(
        "r3_variance",
        "untrained",
        "weights of R3 by the variance",
        _r3(2.0),
        questions=ON_REFERENCES,
    ),
)


# ----------------------------------------------------------------------------------------------------
# The credit sources that `tokengrain bench credit` compares.


def _random(bench: Bench) -> Credit:
    from tokengrain.methods.baselines import RandomCredit

    return RandomCredit(seed=bench.seed)


def _surprise(bench: Bench) -> Credit:
    from tokengrain.methods.baselines import Surprise

    return Surprise(model=bench.world.reference)


def _entropy(bench: Bench) -> Credit:
    from tokengrain.methods.baselines import Entropy

    return Entropy(model=bench.world.reference)


def _contrastive(bench: Bench) -> Credit:
    from tokengrain.methods.treg import ContrastivePrompting

    world = bench.world
    return ContrastivePrompting(model=world.reference, tokenizer=world.tokenizer, templates=world.contrastive_templates)


def _guide(bench: Bench) -> Credit:
    from tokengrain.methods.tgdpo import GuideLogRatio

    return GuideLogRatio(model=bench.model("guide"), reference=bench.world.reference, beta=bench.question.beta)


def _contrastive_dpo(bench: Bench) -> Credit:
    from tokengrain.methods.aligndistil import ContrastiveDPO

    return ContrastiveDPO(model=bench.model("guide"), reverse=bench.model("reverse"), beta=bench.question.beta)


def _tdpo(bench: Bench) -> Credit:
    from tokengrain.methods.tdpo import TDPOAdvantage

    return TDPOAdvantage(model=bench.model("tdpo"), reference=bench.world.reference, beta=bench.question.beta)


def _scores(name: str) -> Callable[[Bench], Credit]:
    def build(bench: Bench) -> Credit:
        from tokengrain.methods.qrm import RewardModelCredit

        return RewardModelCredit(model=bench.model(name))

    return build


def _needs(name: str) -> Callable[[Any], str]:
    return lambda world: "" if hasattr(world, name) else f"it reads the world's {name!r}, and {world.name!r} has none"


SOURCES: dict[str, BenchSource] = {
    s.name: s
    for s in (
        BenchSource(
            "exact",
            "truth",
            "the truth itself, as a check: agrees by definition",
            lambda b: b.question.exact(b.world),
            questions=EVERY,
        ),
        BenchSource("random", "control", "uniform numbers: what chance reaches", _random, questions=EVERY),
        BenchSource(
            "reward",
            "control",
            "each token's own true reward, without what follows from it",
            lambda b: b.world.credit("reward"),
            lacks=_needs("credit"),
        ),
        BenchSource(
            "worth",
            "control",
            "what a word looks worth without its context",
            lambda b: b.world.credit("worth"),
            lacks=_needs("credit"),
        ),
        BenchSource("surprise", "untrained", "log-probability under the base model", _surprise, questions=EVERY),
        BenchSource("entropy", "untrained", "entropy of the base model's distribution", _entropy, questions=EVERY),
        BenchSource(
            "contrastive",
            "untrained",
            "contrastive prompting of the base model (T-REG)",
            _contrastive,
            lacks=_needs("contrastive_templates"),
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
        *ONLINE,
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
    return BenchSource(name, "own", what, lambda bench: made, questions=EVERY, code=made.fingerprint())


def fit_sources(sources: Sequence[BenchSource], world: Any, question: Question) -> list[BenchSource]:
    """Those that can be asked this in this world."""
    return [s for s in sources if not s.unfit(world, question)]


def chosen_sources(names: Sequence[str] | None, world: Any) -> list[BenchSource]:
    """The sources of these names; None: all that have an answer to one of the world's questions.

    Raises:
        RecipeError: an unknown name, or a source that has an answer to none of the world's questions, with the reason.
    """
    questions = questions_of(world)
    if names is None:
        return [s for s in SOURCES.values() if not all(s.unfit(world, q) for q in questions)]
    chosen = []
    for name in names:
        if name not in SOURCES:
            raise RecipeError(f"unknown credit source {name!r}{nearest(name, SOURCES)}")
        reasons = [SOURCES[name].unfit(world, q) for q in questions]
        if all(reasons):
            raise RecipeError(f"credit source {name!r} cannot be judged in world {world.name!r}: {reasons[0]}")
        chosen.append(SOURCES[name])
    return chosen


def left_out(world: Any, listed: Sequence[BenchSource]) -> list[dict[str, str]]:
    """Entries `source`, `question`, `reason`: what is not asked, and why."""
    found = []
    for question in questions_of(world):
        for source in listed:
            if reason := source.unfit(world, question):
                found.append({"source": source.name, "question": question.name, "reason": reason})
    return found
