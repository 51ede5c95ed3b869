"""The credit sources that `tokengrain bench credit` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokengrain.bench.online_sources import ONLINE
from tokengrain.bench.questions import Question, questions_of
from tokengrain.bench.setting import EVERY, Bench, BenchSource, Credit
from tokengrain.callables import nearest
from tokengrain.credit import FunctionCredit
from tokengrain.errors import RecipeError


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

    return GuideLogRatio(model=bench.model("guide"), reference=bench.world.reference, beta=bench.question.beta)


def _contrastive_dpo(bench: Bench) -> Credit:
    from tokengrain.credit.contrastive_dpo import ContrastiveDPO

    return ContrastiveDPO(model=bench.model("guide"), reverse=bench.model("reverse"), beta=bench.question.beta)


def _tdpo(bench: Bench) -> Credit:
    from tokengrain.credit.tdpo import TDPOAdvantage

    return TDPOAdvantage(model=bench.model("tdpo"), reference=bench.world.reference, beta=bench.question.beta)


def _scores(name: str) -> Callable[[Bench], Credit]:
    def build(bench: Bench) -> Credit:
        from tokengrain.credit.reward_model import RewardModelCredit

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
