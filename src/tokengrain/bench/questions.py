"""What `tokengrain bench credit` asks of credit: which completions, which tokens to point at, and how it is judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from tokengrain.batch import TokenBatch
from tokengrain.errors import TokengrainError
from tokengrain.evaluation.credit import AUC_MARGIN, CreditTruth, calibration, credit_scores, parts_of, pointing_scores
from tokengrain.method import Rollout, resolve_rollout_credit
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, Rollouts, SampledCompletion
from tokengrain.scoring.score import head_of
from tokengrain.training.critic import Critic
from tokengrain.training.rollout import RolloutScorer
from tokengrain.training.step import OLD_LOGPS
from tokengrain.worlds.arithmetic import CHUNK, ROUNDS, ArithmeticWorld
from tokengrain.worlds.chains import parse_prompt, rng_of, seed_of
from tokengrain.worlds.revision import RevisionWorld

Credit = Callable[[TokenBatch], Tensor]
STEPS = 120  # of each training, in the world `stories`
GENERATIONS = 8  # completions per prompt, where groups are sampled
GROUPS = {"full": 96, "small": 24}  # groups per seed, by the world's size
MAX_TOKENS = 8192  # tokens of one forward pass


class Draw(NamedTuple):
    """What is judged in one seed: `prompts` prompts (None: the world's number) with `generations` completions each."""

    prompts: int | None = None
    generations: int = GENERATIONS
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """One way to ask whether credit is right.

    Credit should point at the tokens of lowest truth that `draw` gives (of highest, if not `low`); `exact` does;
    `steps` and `beta` are of trainings; tables are sorted by `ranked_by`; `sides` names the two completions shown of a
    prompt.
    """

    name: str
    draw: Callable[[Any, Draw], CreditTruth]
    exact: Callable[[Any], Credit]
    low: bool = True
    steps: int = STEPS
    beta: float = 0.3
    ranked_by: str = "spearman"
    sides: tuple[str, str] = ("chosen", "rejected")


def questions_of(world: Any) -> list[Question]:
    if isinstance(world, RevisionWorld):
        return [ON_CHAINS, ON_REFERENCES]
    return [ON_CHAINS] if isinstance(world, ArithmeticWorld) else [ON_PAIRS]


def _references(world: RevisionWorld, draw: Draw) -> CreditTruth:
    """The reference behind each chain of these groups: 1 at tokens that depend on the reasoning, −1 elsewhere."""
    batch, _ = world.with_references(mixed_groups(world, draw))
    batch = batch.with_columns(truncated=torch.zeros(batch.segments.total))
    return CreditTruth(batch, reasoning(world)(batch), torch.ones(batch.segments.total, dtype=torch.bool))


def reasoning(world: RevisionWorld) -> Credit:
    """Credit `[N]` that knows the reference tokens which depend on the reasoning: 1, and −1 at others."""
    return lambda batch: 2.0 * world.reasoning_tokens(batch) - 1


def mixed_groups(world: ArithmeticWorld, draw: Draw) -> TokenBatch:
    """Groups of the base model's samples on held-out problems, one right and one wrong completion in front of others.

    As in group methods, prompts whose completions are all right or all wrong are left out; so are those without an end.
    """
    wanted = draw.prompts or GROUPS[world.options.size]
    sampler, sampling = HFGenerate(world.reference), world.sampling(seed_of("bench", draw.seed))
    problems = world.stream("bench", "eval", draw.seed)
    last = getattr(world, "marker", world.eos)  # in `revision` a chain ends with the marker
    prompts: list[PromptItem] = []
    groups: list[tuple[SampledCompletion, ...]] = []
    for _ in range(ROUNDS * math.ceil(wanted / CHUNK)):
        items = world.items(list(islice(problems, min(CHUNK, wanted))))
        for item, group in sampler.sample(items, n=draw.generations, sampling=sampling):
            ended = [c for c in group if c.ids[-1] == last]
            right = [world.audit(str(item.row), c.ids).correct for c in ended]
            if len(set(right)) == 2 and len(groups) < wanted:
                first = [right.index(True), right.index(False)]
                others = [i for i in range(len(ended)) if i not in first]
                prompts.append(item)
                groups.append(tuple(ended[i] for i in first + others))
        if len(groups) == wanted:
            return Rollouts(tuple(prompts), tuple(groups), sampling).to_batch()
    what = f"{wanted} prompts with right and wrong among {draw.generations} completions"
    raise TokengrainError(f"world {world.name}: {what} were not found, only {len(groups)}")


ON_PAIRS = Question(
    "pairs", lambda world, draw: world.credit_truth(draw.prompts, seed=draw.seed), lambda world: world.advantages
)
ON_CHAINS = Question(
    "chain",
    lambda world, draw: world.truth_of(mixed_groups(world, draw)),
    lambda world: world.advantages,
    steps=60,
    beta=0.1,
    ranked_by="auc_inside",
    sides=("right", "wrong"),
)
AFTER = ("after a right chain", "after a wrong chain")
ON_REFERENCES = Question("reference", _references, reasoning, low=False, ranked_by="auc", sides=AFTER)
QUESTIONS = {q.name: q for q in (ON_PAIRS, ON_CHAINS, ON_REFERENCES)}


@dataclass
class Passes:
    calls: int = 0
    tokens: int = 0


@contextmanager
def counted_passes() -> Iterator[Passes]:
    """Count forward passes through the decoders of transformers models, and their tokens, whoever calls them."""
    found = Passes()

    def count(module: Any, args: tuple[Any, ...], output: Any) -> None:
        # A model with a head calls its base model, and only a base model is its own `base_model`.
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            found.calls += 1
            last = getattr(output, "last_hidden_state", None)
            found.tokens += last.shape[0] * last.shape[1] if last is not None else 0

    handle = register_module_forward_hook(count)
    try:
        yield found
    finally:
        handle.remove()


def credit_and_cost(source: Credit, batch: TokenBatch, part: int = 64) -> tuple[Tensor, dict[str, float]]:
    """Credit `[N]` on the CPU, asked for `part` prompts at a time, and its cost: seconds per 1,000 tokens, passes per
    call, tokens read per token."""
    parts = parts_of(batch, part)
    source(parts[0].select([0]))  # what happens once, such as finding out how to score a model, is not its price
    with counted_passes() as passes:
        source(parts[0])
    start = time.perf_counter()
    credit = torch.cat([source(p).detach().float().cpu() for p in parts])
    seconds = time.perf_counter() - start
    return credit, {
        "seconds": 1000 * seconds / batch.segments.total,
        "passes": passes.calls,
        "reads": passes.tokens / parts[0].segments.total,
    }


def measure(source: Credit, truth: CreditTruth, question: Question = ON_PAIRS) -> tuple[dict[str, Any], Tensor]:
    """One source on one world's completions: its scores, bins of `calibration` and cost; and the credit `[N]`."""
    batch, decided = truth.batch, truth.decisions
    credit, cost = credit_and_cost(source, batch)
    found: dict[str, Any] = credit_scores(credit, truth.advantages, decided, batch.segments)
    marked = truth.advantages < -AUC_MARGIN if question.low else truth.advantages > AUC_MARGIN
    found |= pointing_scores(credit, marked, decided, batch.segments, low=question.low)
    bins = calibration(credit[decided], truth.advantages[decided], batch.segments.ids[decided]).bins
    return found | cost | {"bins": bins}, credit


@dataclass
class OnlineCredit:
    """Credit of sampled completions as `steps` of online training give it in their first rollout, which every call is.

    The policy is the base model and its own reference; the world grades. `read` takes the credit `[N]` from the
    rollout, `needs` are further quantities for it, `critic` gives `values`.
    """

    world: Any
    steps: Callable[[], Sequence[Any]]
    read: Callable[[Rollout, Sequence[Any]], Tensor]
    needs: frozenset[str] = frozenset()
    critic: Any = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        steps = resolve_rollout_credit(self.steps())
        needs = {OLD_LOGPS, *self.needs, *(name for step in steps for name in step.needs)}
        rollout = self._rollout(batch, needs)
        for step in steps:
            step(rollout)
        return self.read(rollout, steps)

    def _rollout(self, batch: TokenBatch, needs: set[str]) -> Rollout:
        world = self.world
        texts = [world.decode(batch.prompt(g).tolist()) for g in batch.group.tolist()]
        ids = [batch.completion(c).tolist() for c in range(batch.n_completions)]
        rewards = torch.tensor(world.reward(texts, [""] * len(ids), ids))
        rollout = Rollout(
            batch=batch.with_columns(),  # steps add columns of their own
            rewards=rewards,
            by_name={"world": rewards},
            prompt_ids=batch.rows,
            index=0,
            correct=rewards > 0.5,
            max_new_tokens=world.max_new_tokens,
            max_tokens=MAX_TOKENS,
            model=world.reference,
            head_of=lambda: head_of(world.reference).detach(),
        )
        scorer = RolloutScorer(
            world.reference, None, self.critic, max_tokens=MAX_TOKENS, mixed_precision=nullcontext, options={}
        )
        scorer.add(rollout, needs - {"ref_logps"})
        rollout.quantities["ref_logps"] = rollout.quantity(OLD_LOGPS)  # nothing has been trained yet
        return rollout


def advantages(rollout: Rollout, steps: Sequence[Any]) -> Tensor:
    """Reads what the policy's loss would get."""
    assert rollout.advantages is not None  # one of the steps sets them
    return rollout.advantages


def train_critic(world: Any, *, seed: int, steps: int, generations: int) -> Any:
    """A critic that starts from the base model and learns the outcomes of its samples on the training prompts."""
    items = world.items([parse_prompt(row["prompt"]) for row in world.prompts()])
    sampling = world.sampling(seed_of("critic", seed))
    batch = HFGenerate(world.reference).sample(items, n=generations, sampling=sampling).to_batch()
    outcomes = {"name": "gae", "lam": 1.0, "use_values": False, "whiten": False}
    returns = OnlineCredit(world, lambda: [outcomes], lambda rollout, steps: rollout.quantity("returns"))(batch)
    batch = batch.with_columns(returns=returns)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(world.reference, lr=1e-3, clip_range=None, max_tokens_per_microbatch=MAX_TOKENS)
    critic.begin(max_steps=steps)
    rng = rng_of("critic", seed)
    for _ in range(steps):
        critic.update(batch.select(sorted(rng.sample(range(batch.n_prompts), min(8, batch.n_prompts)))))
    return critic
