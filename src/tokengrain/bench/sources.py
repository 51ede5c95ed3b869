"""The credit sources that `tokengrain bench credit` compares, and the small models that some of them need."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Sample
from tokengrain.bench import questions
from tokengrain.bench.questions import GENERATIONS, ON_PAIRS, STEPS, Credit, OnlineCredit, Question, advantages
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows
from tokengrain.errors import RecipeError, require
from tokengrain.method import Rollout, make_credit, make_objective
from tokengrain.methods._entropy_window import measured
from tokengrain.models import measure_scores, reward_model_from
from tokengrain.settings import nearest
from tokengrain.training.config import PreferenceConfig
from tokengrain.training.trainer import PreferenceTrainer

PAIRS = 32  # rows per step of a training


def reader_of(world: Any) -> Any:
    """What reads a world's rows: its processor if they have pictures, else its tokenizer."""
    return getattr(world, "processor", world.tokenizer)


def fresh_base(world: Any) -> Any:
    """A copy of a world's base model that can be trained."""
    return deepcopy(world.reference).requires_grad_(True)


def world_samples(world: Any) -> list[Sample]:
    made = prepare_pairs(load_rows(list(world.pairs())), reader_of(world), TokenizeConfig())
    return [made[i] for i in range(len(made))]


def exchanged(samples: Sequence[Sample]) -> list[Sample]:
    """The pairs with chosen and rejected exchanged: what a reverse DPO model learns from."""
    return [replace(s, completions=[s.completions[1], s.completions[0]]) for s in samples]


def train_on(
    world: Any,
    objective: Any,
    rows: Any,
    seed: int,
    *,
    model: Any = None,
    learning_rate: float = 2e-4,
    steps: int = STEPS,
    pairs: int = PAIRS,
    **given: Any,
) -> Any:
    """A model (None: the world's base) after a short training on `pairs` rows a step, in evaluation mode.

    Adam with β₂ 0.98, linear decay after 10 steps of warm-up; `given`: further arguments of `PreferenceTrainer`.
    """
    if model is None:
        model = fresh_base(world)
    with tempfile.TemporaryDirectory() as folder:
        config = PreferenceConfig(
            output_dir=folder,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(10, steps // 10),
            adam_beta2=0.98,
            max_grad_norm=1.0,
            max_steps=steps,
            per_device_train_batch_size=pairs,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = PreferenceTrainer(
            model, config, objective=objective, train_dataset=rows, processing_class=reader_of(world), **given
        )
        trainer.train()
    return trainer.model.eval()


@dataclass
class Bench:
    """What the sources of one seed share: the world's pairs, the models trained on them, and how long that took."""

    world: Any
    seed: int = 0
    steps: int = STEPS
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
        bound, rows = make_objective(objective, **hyper), self.rows if rows is None else rows
        return train_on(self.world, bound, rows, self.seed, model=model, steps=self.steps).requires_grad_(False)


def _reward_model(bench: Bench, pooling: str) -> Any:
    """A reward model that starts from the world's base; its scale is set on the pairs it was trained on."""
    base = fresh_base(bench.world)
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
    "critic": lambda b: questions.train_critic(b.world, seed=b.seed, steps=b.steps, generations=b.generations),
}
EVERY, COMPLETIONS = ("pairs", "chain", "reference"), ("pairs", "chain")
NEEDED = {  # what a source is missing that answers only this question
    "pairs": "pairs",
    "chain": "groups of graded chains, as in arithmetic and revision",
    "reference": "a reference answer, as in revision",
}


@dataclass(frozen=True)
class BenchSource:
    """A credit source of the comparison: controls read the world, or nothing; the others are what a user could have.

    `build` makes it for one seed, with the models of `TRAININGS` in `trains`; it answers `questions`, `reads` an
    attribute that a world may lack, and `code` identifies a function of the user's.
    """

    name: str
    kind: Literal["truth", "control", "untrained", "trained", "own"]
    what: str
    build: Callable[[Any], Credit]  # of a `Bench`; a user's own needs none
    trains: tuple[str, ...] = ()
    questions: tuple[str, ...] = COMPLETIONS
    reads: str = ""
    code: str = ""

    def unfit(self, world: Any, question: Question) -> str:
        """Why it cannot be asked this; "" if it can."""
        if question.name not in self.questions:
            return f"it needs {' or '.join(NEEDED[name] for name in self.questions)}"
        if self.trains and getattr(world, "encoder_decoder", False):
            return f"it trains a causal language model, and the one of {world.name!r} is an encoder-decoder"
        if self.reads and not hasattr(world, self.reads):
            return f"it reads the world's {self.reads!r}, and {world.name!r} has none"
        return ""


Build = Callable[[Bench], Credit]
WINDOW = 4


def _exact(bench: Bench) -> Credit:
    return bench.question.exact(bench.world)


def _random(bench: Bench) -> Credit:
    return make_credit("random", seed=bench.seed)


def _of_world(kind: str, what: str) -> BenchSource:
    return BenchSource(kind, "control", what, lambda b: b.world.credit(kind), reads="credit")


def _of_base(name: str) -> Build:
    return lambda b: make_credit(name, model=b.world.reference)


def _contrastive(bench: Bench) -> Credit:
    world, templates = bench.world, bench.world.contrastive_templates
    return make_credit("contrastive", model=world.reference, tokenizer=world.tokenizer, templates=templates)


def _against_base(name: str) -> Build:
    return lambda b: make_credit(name, model=b.model(name), reference=b.world.reference, beta=b.question.beta)


def _trained(name: str, what: str, build: Build, *trains: str) -> BenchSource:
    return BenchSource(name, "trained", what, build, trains)


def _contrastive_dpo(bench: Bench) -> Credit:
    guide, reverse = bench.model("guide"), bench.model("reverse")
    return make_credit("contrastive_dpo", model=guide, reverse=reverse, beta=bench.question.beta)


def _scores(name: str) -> Build:
    return lambda b: make_credit("reward_model", model=b.model(name))


def _online(name: str, what: str, build: Build, *trains: str) -> BenchSource:
    return BenchSource(name, "trained" if trains else "untrained", what, build, trains, ("chain",))


def _steps(*steps: Mapping[str, Any], read: Callable[[Rollout, Sequence[Any]], Tensor] = advantages) -> Build:
    """What these steps of online training make of a rollout."""
    return lambda bench: OnlineCredit(bench.world, lambda: steps, read)


def _influence(rollout: Rollout, steps: Sequence[Any]) -> Tensor:
    """THR with the sign of wrong completions turned back: low where a token lowers the likelihood of correct ones."""
    assert rollout.correct is not None  # the world grades
    return rollout.quantity("thr") * rollout.broadcast(torch.where(rollout.correct == 0, -1.0, 1.0))


def _window(bench: Bench) -> Credit:
    def read(rollout: Rollout, steps: Sequence[Any]) -> Tensor:
        found = measured(rollout.quantity("entropy"), rollout.segments, mode="paper", window=WINDOW)
        return -torch.nan_to_num(found, nan=0.0)  # 0 where the completion ends before the window does

    return OnlineCredit(bench.world, lambda: (), read, needs=frozenset({"entropy"}))


def _rto(bench: Bench) -> Credit:
    def read(rollout: Rollout, steps: Sequence[Any]) -> Tensor:
        assert rollout.token_rewards is not None  # the step sets them
        return rollout.token_rewards

    return _steps({"name": "rto", "model": bench.model("guide")}, read=read)(bench)


def _gae(bench: Bench) -> Credit:
    return OnlineCredit(bench.world, lambda: [{"name": "gae"}], advantages, critic=bench.model("critic"))


def _r3(name: str, what: str, power: float) -> BenchSource:
    def build(bench: Bench) -> Credit:
        step = {"name": "r3", "tokenizer": bench.world.tokenizer, "marker": ">", "power": power}
        return OnlineCredit(bench.world, lambda: [step], lambda rollout, steps: steps[0].last.weights)

    return BenchSource(name, "untrained", what, build, (), ("reference",))


GROUP, THR = {"name": "group"}, {"name": "thr"}
AEPO = {"name": "aepo", "mode": "paper", "triggers": None, "kl": "none"}
HWE = _steps(AEPO, read=lambda rollout, steps: -rollout.quantity("hwe"))
ONLINE = (
    _online("outcome", "the outcome's advantage in its group (GRPO), the same for all tokens", _steps(GROUP)),
    _online("thr", "hidden influence on correct completions (THR), without mask", _steps(GROUP, THR, read=_influence)),
    _online("thr_advantage", "the group's advantage as THR leaves it, mask and p = 0.1", _steps(GROUP, THR)),
    _online("nthr_advantage", "the group's advantage as NTHR leaves it", _steps(GROUP, {"name": "nthr"})),
    _online("window_entropy", f"minus the mean entropy of a token and the next {WINDOW - 1} (AEPO)", _window),
    _online("hwe", "-1 on the tokens that AEPO's entropy reward counts, 0 elsewhere", HWE),
    _online("rto", "token rewards of RTO: the guide's log-ratio, bounded", _rto, "guide"),
    _online("gae", "advantages of PPO, with a critic trained on outcomes of the base model", _gae, "critic"),
    _r3("r3", "weights of R3, by the deviation over the group's chains (DRO)", 1.0),
    _r3("r3_variance", "weights of R3 by the variance", 2.0),
)
SOURCES = {
    source.name: source
    for source in (
        BenchSource("exact", "truth", "the truth itself, as a check: agrees by definition", _exact, (), EVERY),
        BenchSource("random", "control", "uniform numbers: what chance reaches", _random, (), EVERY),
        _of_world("reward", "each token's own true reward, without what follows from it"),
        _of_world("worth", "what a word looks worth without its context"),
        BenchSource("surprise", "untrained", "log-probability under the base model", _of_base("surprise"), (), EVERY),
        BenchSource("lookahead", "untrained", "surprise, one token ahead", _of_base("lookahead"), (), EVERY),
        BenchSource("entropy", "untrained", "entropy of the base model's distribution", _of_base("entropy"), (), EVERY),
        BenchSource(
            "sight", "untrained", "the base model with and without pictures", _of_base("sight"), reads="processor"
        ),
        BenchSource(
            "contrastive", "untrained", "contrastive prompting (T-REG)", _contrastive, reads="contrastive_templates"
        ),
        _trained("guide", "log-ratio of a DPO model to the base (TGDPO)", _against_base("guide"), "guide"),
        _trained(
            "contrastive_dpo", "DPO against DPO on exchanged pairs (AlignDistil)", _contrastive_dpo, "guide", "reverse"
        ),
        _trained("tdpo", "advantage in a TDPO2 model", _against_base("tdpo"), "tdpo"),
        _trained("qrm", "token scores of a reward model trained on pairs (Q-RM)", _scores("qrm"), "qrm"),
        _trained("last_token_rm", "the same model trained on its last token's score", _scores("last"), "last"),
        *ONLINE,
    )
}


def own_source(reference: str | Callable[..., Any]) -> BenchSource:
    """A user's function `(batch) -> [N]`, or "module:function" or "path.py:function", as a source of the comparison."""
    made = make_credit("function", function=reference)
    name = reference.rpartition(":")[2] if isinstance(reference, str) else made.name.removeprefix("function ")
    what = f"yours: {reference if isinstance(reference, str) else name}"
    return BenchSource(name, "own", what, lambda bench: made, (), EVERY, code=made.fingerprint())


def chosen_sources(names: Sequence[str] | None, world: Any) -> list[BenchSource]:
    """The sources of these names; None: all that have an answer to one of the world's questions."""
    asked = questions.questions_of(world)
    if names is None:
        return [s for s in SOURCES.values() if not all(s.unfit(world, q) for q in asked)]
    for name in names:
        require(name in SOURCES, RecipeError, f"unknown credit source {name!r}{nearest(name, SOURCES)}")
        reasons = [SOURCES[name].unfit(world, q) for q in asked]
        message = f"credit source {name!r} cannot be judged in world {world.name!r}: {reasons[0]}"
        require(not all(reasons), RecipeError, message)
    return [SOURCES[name] for name in names]


def left_out(world: Any, listed: Sequence[BenchSource]) -> list[dict[str, str]]:
    """Entries `source`, `question`, `reason`: what is not asked, and why."""
    return [
        {"source": source.name, "question": question.name, "reason": reason}
        for question in questions.questions_of(world)
        for source in listed
        if (reason := source.unfit(world, question))
    ]
