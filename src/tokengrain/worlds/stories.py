"""The world `stories`: samples and pairs, the exact optimum and credit, evaluation of policies, the base model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.errors import RecipeError, fingerprint, require
from tokengrain.evaluation.credit import CreditTruth, recovered
from tokengrain.evaluation.statistics import Frontier, bootstrap, mean_interval, wilson, win_rate
from tokengrain.scoring.encdec import cache_of
from tokengrain.scoring.model import evaluating
from tokengrain.worlds import base_models
from tokengrain.worlds.base_models import Progress, Trained, Training, check_least, check_option
from tokengrain.worlds.stories_grammar import SIZES, UNK, Grammar, Prompt, Walk

Split = Literal["train", "eval"]


class Samples(NamedTuple):
    """Completions from the grammar: ids `[n, L]` with `<end>`, the state before each token, true reward `[n]`."""

    ids: Tensor
    states: Tensor
    lengths: Tensor
    rewards: Tensor

    def completion_ids(self, index: int) -> list[int]:
        return self.ids[index, : int(self.lengths[index])].tolist()


def sample(grammar: Grammar, prompts: Sequence[Prompt], generator: torch.Generator) -> Samples:
    """One completion per prompt from the base distribution."""
    table = torch.tensor([p.table for p in prompts])
    state = torch.tensor([p.start for p in prompts])
    done = torch.zeros(len(prompts), dtype=torch.bool)
    rewards = torch.zeros(len(prompts), dtype=torch.float64)
    cumulative = grammar.edge_logp.exp().cumsum(-1)
    ids, states = [], []
    while not done.all():
        u = torch.rand(len(prompts), 1, generator=generator, dtype=torch.float64)
        here = cumulative[table, state]
        edge = (u * here[:, -1:] >= here).sum(-1).clamp(max=here.shape[1] - 1)
        token = grammar.edge_token[table, state, edge]
        ids.append(token.where(~done, grammar.pad))
        states.append(state)
        rewards += grammar.edge_reward[table, state, edge].where(~done, 0.0)
        state = grammar.edge_next[table, state, edge]
        done = state == grammar.finished
    ids_, states_ = torch.stack(ids, 1), torch.stack(states, 1)
    return Samples(ids_, states_, (states_ != grammar.finished).sum(1), rewards)


def preference_pairs(
    grammar: Grammar, n: int, slope: float, generator: torch.Generator, prefix: str
) -> list[dict[str, Any]]:
    """Pairs of base samples; P(first is chosen) = σ(slope · (R1 − R2)). The plain prompts take turns."""
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        prompts = grammar.turns(n - len(rows), first=len(rows))
        both = sample(grammar, [p for p in prompts for _ in range(2)], generator)
        first, second = both.rewards[0::2], both.rewards[1::2]
        u = torch.rand(len(prompts), generator=generator, dtype=torch.float64)
        first_wins = (u < (slope * (first - second)).sigmoid()).tolist()
        for i, (prompt, wins) in enumerate(zip(prompts, first_wins)):
            chosen, rejected = (2 * i, 2 * i + 1) if wins else (2 * i + 1, 2 * i)
            texts = [grammar.decode(both.completion_ids(j)) for j in (chosen, rejected)]
            if texts[0] == texts[1]:  # says nothing about a preference
                continue
            row = {"prompt": prompt.text, "chosen": texts[0], "rejected": texts[1], "id": f"{prefix}-{len(rows)}"}
            rewards = {"chosen_reward": float(both.rewards[chosen]), "rejected_reward": float(both.rewards[rejected])}
            rows.append(row | rewards)
    return rows


# What is best, exactly: dynamic programming over the grammar's states.
#
# With base table P, deterministic next state s' and reward r(s, a), the policy that maximises E[R] − β·KL has
#
#     V(s) = β log Σ_a P(a|s) exp((r(s,a) + V(s'))/β)      A(s,a) = r(s,a) + V(s') − V(s)      π* = P exp(A/β)
#
# Expected reward, KL and entropy (nats) and length (tokens) of any policy on the grammar's support follow by policy
# evaluation. The states have no cycles, so one pass over their levels is exact.

BETAS = torch.logspace(2, -0.9208187539523751, 120, dtype=torch.float64)
"""The sweep of the frontier: 100 down to 0.12, geometrically."""


class PolicyValue(NamedTuple):
    """Expectations of a policy from a state on: reward, KL to the base, entropy, tokens; each `[T, S]`."""

    reward: Tensor
    kl: Tensor
    entropy: Tensor
    length: Tensor

    def at_prompts(self, grammar: Grammar) -> dict[str, float]:
        """Means over the plain prompts."""
        return {name: float(at_prompts(grammar, values).mean()) for name, values in self._asdict().items()}


def at_prompts(grammar: Grammar, values: Tensor) -> Tensor:
    """Values `[T, S]` at the first state of every plain prompt, `[P]`."""
    return torch.stack([values[p.table, p.start] for p in grammar.plain])


def soft_values(grammar: Grammar, beta: float | Tensor) -> Tensor:
    """V at temperature `beta`: `[T, S]`, or `[B, T', S]` for `B` temperatures, over the T' plain tables only.

    A float may be 0 (the highest reward that can be reached) or infinite (the base's expectation).
    """
    many = isinstance(beta, Tensor)
    tables = slice(0, grammar.n_places if many else None)
    temperature, batch = (beta[:, None, None, None], beta.shape) if isinstance(beta, Tensor) else (beta, ())
    values = torch.zeros((*batch, *grammar.edge_logp[tables].shape[:2]), dtype=torch.float64)
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
        divergence = here - grammar.edge_logp[:, level].clamp(min=-1e30)
        for values, step in zip(out, (grammar.edge_reward[:, level], divergence, -here, torch.ones_like(here))):
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


def walk_batch(grammar: Grammar, batch: TokenBatch) -> tuple[Walk, Tensor, Tensor]:
    """The walk along every completion of a batch, padded to `[C, L]`; their ids; and which tokens count."""
    prompts = [grammar.parse_prompt(batch.prompt(i).tolist()) for i in range(batch.n_prompts)]
    segments = Segments(batch.completion_offsets.cpu())
    ids, _ = segments.to_padded(batch.completion_ids.cpu(), fill=grammar.pad)
    counted, _ = segments.to_padded(batch.counted.cpu(), fill=False)
    return grammar.walk([prompts[g] for g in batch.group.tolist()], ids), ids, counted


CreditKind = Literal["advantage", "reward", "worth"]


class WorldCredit:
    """A credit source that reads the grammar: a batch to one number per counted token, `[N]`.

    `advantage`: exact and soft, at β = 1; `reward`: the token's own; `worth`: what a word looks worth without context.
    """

    def __init__(self, grammar: Grammar, kind: CreditKind) -> None:
        check_option("stories", "credit", kind, get_args(CreditKind))
        self.grammar, self.kind, self.name = grammar, kind, f"stories-{kind}"
        self._advantage = advantages(grammar, soft_values(grammar, 1.0))

    def fingerprint(self) -> str:
        return fingerprint([self.grammar.fingerprint, self.kind])

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Tensor:
        walk, ids, counted = walk_batch(self.grammar, batch)
        if self.kind == "reward":
            credit = walk.rewards
        elif self.kind == "worth":
            credit = self.grammar.worth[ids]
        else:
            credit = self._advantage[walk.tables[:, None], walk.states, ids]
        return credit[counted].float().to(batch.device)


# Evaluation of a policy on its own samples.
#
# At every sampled position the expected reward Σ_a π(a|s)·r(s,a) and the divergence Σ_a π log(π/π_ref) replace the
# values of the token that was drawn: the same expectation with much less variance.

ROWS = 512  # sequences per forward pass


class Rollout(NamedTuple):
    """Completions that a model sampled: alive up to `<end>` included; `logps` `[n, L, V]`, before each token."""

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
        """Completions with an ungrammatical token (`<end>` out of place too) or without an end, bool `[n]`."""
        legal = grammar.legal[self.walk.tables[:, None], self.walk.states, self.ids]
        return (~legal & self.alive).any(1) | (self.walk.last != grammar.finished)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _logps(logits: Tensor) -> Tensor:
    return logits.cpu().double().log_softmax(-1)


def prompt_tensor(grammar: Grammar, prompts: Sequence[Prompt]) -> Tensor:
    """Token ids `[n, L]` of prompts of one length, `<s>` in front."""
    return torch.tensor([grammar.prompt_ids(p.text) for p in prompts])


def rollout(
    model: Any, grammar: Grammar, prompts: Sequence[Prompt], seed: int, progress: Progress | None = None
) -> Rollout:
    """Sample one completion per prompt at temperature 1; the prompts have one length in tokens.

    It ends at `<end>` or at the longest length that the grammar allows (without `<end>` it is broken by then).
    """
    device = _device(model)
    generator = torch.Generator().manual_seed(seed)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    ids, logps, alive = [], [], []
    feed, cache = prompt_tensor(grammar, prompts).to(device), dict[str, Any]()
    with evaluating(model):
        for _ in range(grammar.longest):
            out = model(input_ids=feed, use_cache=True, **cache)
            logp, cache = _logps(out.logits[:, -1]), cache_of(out)
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
    with evaluating(model):
        parts = [model(input_ids=part.to(_device(model))).logits for part in rows.split(ROWS)]
    return torch.cat([_logps(part[:, heads.shape[1] - 1 :]) for part in parts])


def policy_metrics(
    grammar: Grammar, frontier: Frontier, sampled: Rollout, ref_logps: Tensor, base_rewards: Tensor
) -> dict[str, float | None]:
    """Reward, KL, frontier share and the rest, from a policy's own samples; every prompt equally often.

    Rewards are true rewards per completion, `kl` nats per completion, `entropy` nats per token, `length` tokens.
    """
    p = sampled.logps.exp()
    tables, states = sampled.walk.tables[:, None], sampled.walk.states
    step_reward = (p * grammar.reward[tables, states]).sum(-1)
    step_kl = (p * (sampled.logps - ref_logps)).where(p > 0, 0.0).sum(-1)
    step_entropy = torch.special.entr(p).sum(-1)
    reward, kl, entropy, length = (
        (x * sampled.alive).sum(1) for x in (step_reward, step_kl, step_entropy, torch.ones_like(step_kl))
    )
    places = torch.tensor([(q.table, q.start) for q in sampled.prompts])
    prompts, inverse = torch.unique(places, dim=0, return_inverse=True)
    strata = inverse if len(prompts) < len(places) else None  # nothing varies within a prompt that has one sample
    r, k = mean_interval(reward, strata), mean_interval(kl, strata)
    share = bootstrap(lambda m: frontier.share(m[..., 0], m[..., 1]), torch.stack([reward, kl], 1), strata)
    return {
        **r.named("reward"),
        **k.named("kl"),
        "best_reward": float(frontier.best_reward(k.value)),
        **share.named("share"),
        **wilson(int(sampled.broken(grammar).sum()), len(reward)).named("broken"),
        "length": float(length.mean()),
        "entropy": float(entropy.sum() / length.sum()),
        "samples": len(reward),
        **win_rate(sampled.true_rewards, base_rewards, strata).named("win_rate"),
    }


# The base model: a small Llama trained on the exact next-token distributions of the grammar.
#
# Soft targets converge several times faster than sampled tokens: a sequence teaches the whole distribution of every
# state that it passes.

MODEL_POSITIONS = 128  # positions of the base model; the longest prompt and completion together take 51


def build_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the grammar's; prompt and completion may be joined without a space."""
    core = Tokenizer(models.WordLevel(dict(grammar.token), unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return base_models.fast_tokenizer(core, positions=MODEL_POSITIONS, unk_token=UNK)


MIX = (0.6, 0.2, 0.2)  # shares of plain, kind and rude sequences in the pool


@dataclass(frozen=True)
class Pretraining(Training):
    """Settings of the base model and its training on a `pool` of sequences; see `pretrain`."""

    hidden_size: int = 64
    mlp_size: int = 128
    steps: int = 700
    learning_rate: float = 6e-3
    warmup: int = 40
    pool: int = 6000


class Pool(NamedTuple):
    """Training sequences `[n, L]`, positions whose next token is the completion's, and their rows of the base table."""

    ids: Tensor
    predicts: Tensor
    tables: Tensor
    states: Tensor
    lengths: Tensor


def make_pool(grammar: Grammar, prompts: list[Prompt], generator: torch.Generator) -> Pool:
    drawn = sample(grammar, prompts, generator)
    heads = [grammar.prompt_ids(p.text) for p in prompts]
    lengths = torch.tensor([len(h) for h in heads]) + drawn.lengths
    shape = (len(prompts), int(lengths.max()))
    ids = torch.full(shape, grammar.pad)
    states = torch.full(shape, grammar.finished)
    for i, head in enumerate(heads):
        n = int(drawn.lengths[i])
        ids[i, : len(head) + n] = torch.tensor(head + drawn.ids[i, :n].tolist())
        states[i, len(head) - 1 : len(head) - 1 + n] = drawn.states[i, :n]
    tables = torch.tensor([p.table for p in prompts])[:, None].expand(shape)
    return Pool(ids, states != grammar.finished, tables, states, lengths)


def _batches(pool: Pool, settings: Pretraining, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each step. Batches are of similar lengths (little padding) and come in random order."""
    size, made = settings.batch_size, 0
    while made < settings.steps:
        order = torch.randperm(len(pool.ids), generator=generator)
        groups = []
        for part in order.split(size * 16):
            groups += list(part[pool.lengths[part].argsort(stable=True)].split(size))
        for i in torch.randperm(len(groups), generator=generator).tolist():
            if made < settings.steps and len(groups[i]) == size:
                made += 1
                yield groups[i]


def _soft_cross_entropy(model: LlamaForCausalLM, pool: Pool, index: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the exact distributions of the positions of a batch, and those distributions."""
    width = int(pool.lengths[index].max())
    predicts = pool.predicts[index, :width]
    hidden = model.model(pool.ids[index, :width], use_cache=False).last_hidden_state
    target = table[pool.tables[index, :width][predicts], pool.states[index, :width][predicts]]
    logp = model.lm_head(hidden[predicts]).log_softmax(-1)
    return -(target * logp).sum(-1), target


def pretrain(grammar: Grammar, settings: Pretraining, progress: Progress | None = None) -> Trained:
    start = time.perf_counter()
    generator, per = torch.Generator().manual_seed(settings.seed), len(grammar.plain)
    counts = [round(share * settings.pool) for share in MIX]
    prompts = [grammar.prompts[i * per + j % per] for i, count in enumerate(counts) for j in range(count)]
    pool = make_pool(grammar, prompts, generator)
    table = grammar.dense(grammar.edge_logp.exp(), 0.0).float()
    vocabulary = len(grammar.vocabulary)
    model = base_models.small_llama(settings, vocabulary=vocabulary, positions=MODEL_POSITIONS, tied=True).train()
    # AdamW alone needs twice the steps (1,400) and ends at 0.004 nats per token, not 0.0015.
    optimizers = base_models.muon_and_adamw(model, settings.learning_rate)
    batches = _batches(pool, settings, generator)
    losses = (_soft_cross_entropy(model, pool, index, table)[0].mean() for index in batches)
    base_models.descend(model, optimizers, losses, settings, progress)
    seconds = round(time.perf_counter() - start, 1)
    return model, divergence(grammar, model.eval()) | {"seconds": seconds, "threads": torch.get_num_threads()}


@torch.no_grad()
def divergence(grammar: Grammar, model: LlamaForCausalLM, n: int = 1200, seed: int = 1) -> dict[str, float]:
    """KL(grammar || model) on fresh plain samples, in nats per token and per completion."""
    pool = make_pool(grammar, grammar.turns(n), torch.Generator().manual_seed(seed))
    table = grammar.dense(grammar.edge_logp.exp(), 0.0).float()
    cross, target = _soft_cross_entropy(model, pool, torch.arange(n), table)
    kl = cross - torch.special.entr(target).sum(-1)
    return {"kl_per_token": float(kl.mean()), "kl_per_completion": float(kl.sum()) / n}


FORMAT = 2  # raised when training changes in a way that its settings do not show: cached models are trained anew
SETTINGS = {
    "full": Pretraining(),
    "small": Pretraining(hidden_size=48, layers=2, mlp_size=96, steps=300, pool=2000),
    "one-sentence": Pretraining(hidden_size=32, layers=2, mlp_size=64, steps=250, pool=1000),
    "one-phrase": Pretraining(hidden_size=32, layers=2, mlp_size=64, steps=250, pool=1000),
}


def ensure_base_model(grammar: Grammar, settings: Pretraining) -> Path:
    key = fingerprint([FORMAT, grammar.fingerprint, asdict(settings)])
    folder = base_models.model_folder(f"stories-{grammar.size.name}", key)

    def train(progress: Progress) -> Trained:
        model, report = pretrain(grammar, settings, progress)
        return model, asdict(settings) | report

    return base_models.ensure_model(folder, train, build_tokenizer(grammar), "world://stories", settings.steps)


REGIMES = {"clean": (4000, 1.0), "noisy": (1000, 0.3)}
"""Pairs and slope of the label noise: of pairs whose true rewards differ, 88 % and 69 % are labelled in their order."""
EVAL_PAIRS = 200
CREDIT_SAMPLES = 50  # base samples per prompt on which credit is compared with the truth


@dataclass(frozen=True)
class StoriesOptions:
    """Options of the address `world://stories?...`.

    Args:
        regime: `noisy` (1,000 pairs, slope 0.3) or `clean` (4,000 pairs, slope 1).
        pairs, slope: override the regime's.
        seed: of the preference data.
        size: `full`, or a smaller grammar for tests (`small`, `one-sentence`, `one-phrase`).
    """

    regime: str = "noisy"
    pairs: int | None = None
    slope: float | None = None
    seed: int = 0
    size: str = "full"

    def __post_init__(self) -> None:
        check_option("stories", "regime", self.regime, REGIMES)
        check_option("stories", "size", self.size, SIZES)
        check_least("stories", self, {"pairs": 1, "slope": 0, "seed": 0})


class StoriesWorld:
    """Short stories whose true reward is known token by token, and so is the best policy at every KL."""

    name = "stories"

    def __init__(self, options: StoriesOptions | None = None) -> None:
        self.options = options or StoriesOptions()
        self.grammar = Grammar(SIZES[self.options.size])
        pairs, slope = REGIMES[self.options.regime]
        self.n_pairs = pairs if self.options.pairs is None else self.options.pairs
        self.slope = slope if self.options.slope is None else self.options.slope
        self._base_rewards: dict[tuple[int, int], Tensor] = {}

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self.grammar.fingerprint, asdict(self.options)])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.grammar)

    def base_model(self) -> Path:
        """Folder of the pre-trained base model; see `ensure_model`."""
        return ensure_base_model(self.grammar, SETTINGS[self.options.size])

    @cached_property
    def reference(self) -> Any:
        """The base model, loaded once; frozen."""
        return AutoModelForCausalLM.from_pretrained(self.base_model(), dtype=torch.float32).requires_grad_(False).eval()

    @cached_property
    def frontier(self) -> Frontier:
        """The best mean true reward at every mean KL (nats per completion)."""
        return frontier(self.grammar)

    @property
    def prompts(self) -> list[str]:
        return [p.text for p in self.grammar.plain]

    contrastive_templates: ClassVar[dict[str, str]] = {
        "name": "stories",
        "better": "write kindly{prompt}",
        "worse": "write rudely{prompt}",
        "drop_prefix": "write",
    }
    """For contrastive prompting: the two instructions that the base model knows, put into the prompt."""

    def pairs(
        self, split: Split = "train", n: int | None = None, slope: float | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """Preference pairs labelled with the true reward; `eval` has a random stream of its own."""
        check_option("stories", "split", split, get_args(Split))
        n = n if n is not None else self.n_pairs if split == "train" else EVAL_PAIRS
        slope, seed = self.slope if slope is None else slope, self.options.seed if seed is None else seed
        stream = torch.Generator().manual_seed(int(fingerprint(["stories", "pairs", split, seed]), 16) >> 1)
        return preference_pairs(self.grammar, n, slope, stream, split)

    def token_batch(self, rows: Sequence[dict[str, Any]]) -> TokenBatch:
        """Pairs as one batch of token ids, `<s>` before the prompts and `<end>` after the completions."""
        grammar, samples = self.grammar, []
        for row in rows:
            completions = [Completion([*grammar.encode(row[k]), grammar.eos]) for k in ("chosen", "rejected")]
            samples.append(Sample(grammar.prompt_ids(row["prompt"]), completions, row=row["id"], raw=row))
        return TokenBatch.from_samples(samples)

    def credit(self, kind: CreditKind = "advantage") -> WorldCredit:
        """A credit source that reads the grammar; see `WorldCredit`."""
        return WorldCredit(self.grammar, kind)

    def advantages(self, batch: TokenBatch) -> Tensor:
        """The exact soft advantage (β = 1) of every counted token, `[N]`."""
        return self.credit("advantage")(batch)

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Base samples, never the training pairs, with the exact advantage and the decision mask of every token."""
        grammar = self.grammar
        n = CREDIT_SAMPLES * len(grammar.plain) // 2 if prompts is None else prompts
        batch = self.token_batch(self.pairs("eval", n=n, seed=seed))
        advantage = advantages(grammar, soft_values(grammar, 1.0))
        # Something is decided where A deviates under the base.
        p = grammar.dense(grammar.edge_logp.exp(), 0.0)
        mean = (p * advantage).sum(-1, keepdim=True)
        decides = (p * (advantage - mean).square()).sum(-1).sqrt() > 1e-3
        walk, ids, counted = walk_batch(grammar, batch)
        at = walk.tables[:, None], walk.states
        return CreditTruth(batch, advantage[(*at, ids)][counted], decides[at][counted])

    @cached_property
    def _credit_truth(self) -> CreditTruth:
        return self.credit_truth()

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement of a credit source with the exact advantage on base samples; see `recovery`."""
        return recovered(credit, self._credit_truth)

    def _eval_prompts(self, n: int) -> list[Prompt]:
        return [prompt for prompt in self.grammar.plain for _ in range(n)]

    def _base_sample_rewards(self, reference: Any, n: int, seed: int) -> Tensor:
        kept = self._base_rewards if reference is self.__dict__.get("reference") else {}
        if (n, seed) not in kept:
            # Another stream than the policy's: with the same one both would draw alike.
            sampled = rollout(reference, self.grammar, self._eval_prompts(n), seed=seed + 1_000_003)
            kept[n, seed] = sampled.true_rewards
        return kept[n, seed]

    def evaluate(
        self,
        model: Any,
        n: int | None = None,
        seed: int = 0,
        *,
        reference: Any = None,
        credit: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, float | None]:
        """Evaluate a policy (a PEFT model too) on its own samples to the plain prompts; numbers, see `policy_metrics`.

        KL, win rate and log-ratio are taken against `reference`, the base model by default. With `credit` the policy's
        log-ratio is compared with the exact advantage: `credit_auc`, `credit_spearman` (None: undefined).
        """
        n = 64 if n is None else n
        require(n >= 1, RecipeError, f"world stories: n is {n}; expected at least 1 sample per prompt")
        reference = self.reference if reference is None else reference
        sampled = rollout(model, self.grammar, self._eval_prompts(n), seed, progress)
        ref_logps = completion_logps(reference, self.grammar, sampled.prompts, sampled.ids)
        base_rewards = self._base_sample_rewards(reference, n, seed)
        metrics = policy_metrics(self.grammar, self.frontier, sampled, ref_logps, base_rewards)
        if credit:
            found = self.credit_recovery(lambda batch: self.log_ratio(model, reference, batch))
            metrics |= {f"credit_{k}": None if math.isnan(found[k]) else found[k] for k in ("spearman", "auc")}
        return metrics

    def log_ratio(self, model: Any, reference: Any, batch: TokenBatch) -> Tensor:
        """log π(token) − log π_ref(token) of every counted token of plain-prompt completions, `[N]`."""
        prompts = [self.grammar.parse_prompt(batch.prompt(int(g)).tolist()) for g in batch.group]
        _, ids, counted = walk_batch(self.grammar, batch)
        logps = [completion_logps(m, self.grammar, prompts, ids).gather(-1, ids[..., None]) for m in (model, reference)]
        return (logps[0] - logps[1])[..., 0][counted]
