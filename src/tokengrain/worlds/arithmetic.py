"""The world `arithmetic` as one object: tokenizer, base model, prompts, reward, audit, exact credit, evaluation."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import count, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError, TokengrainError, fingerprint
from tokengrain.evaluation.credit import CreditTruth, auc, recovery
from tokengrain.evaluation.statistics import Estimate, by_group, mean_over_prompts, sample_metrics
from tokengrain.worlds.base_models import (
    BOS,
    EOS,
    PAD,
    Progress,
    Training,
    descend,
    ensure_model,
    fast_tokenizer,
    model_folder,
    muon_and_adamw,
    single_thread,
    small_llama,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tokengrain.rollout.sampler import PromptItem, Rollouts, SamplingConfig


# ----------------------------------------------------------------------------------------------------
# Problems of the world `arithmetic`: a start and labelled additions and subtractions, such as `47a+8b-3c+9:`.

Split = Literal["train", "eval"]
DIGITS, LABELS = "0123456789", "abcdefgh"
SPECIAL = (PAD, BOS, EOS)
SYMBOLS = (*SPECIAL, *DIGITS, *"+-;,?>:", *LABELS)
"""The 28 tokens, by id."""
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
EASY = 2
"""Easy steps of every problem; a problem of level L has L − 1 hard ones besides."""
MAX_LEVEL = len(LABELS) - EASY + 1
HELD_OUT = 5
"""One problem in so many is held out, whatever the seed; the base model has seen none of them either."""
TRIES = 1000
"""Draws after which a problem may come a second time."""
_PROMPT = re.compile(r"(\d\d)((?:[a-h][+-][1-9])+):")


def applied(operator: str, total: int, operand: int) -> int:
    """`total ± operand`, modulo 100, as two digits are written."""
    return (total + operand if operator == "+" else total - operand) % 100


def is_hard(operator: str, unit: int, operand: int) -> bool:
    """Whether a step carries or borrows. `unit` is the unit digit of the total before it."""
    return unit + operand > 9 if operator == "+" else unit < operand


@dataclass(frozen=True)
class Problem:
    """A problem. All its running totals lie within 0–99.

    Attributes:
        start: two digits.
        steps: operator and operand (1–9) of each step; the labels are a, b, c, ... in this order.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """The running total after each step."""
        totals = [self.start]
        for operator, operand in self.steps:
            totals.append(applied(operator, totals[-1], operand))
        return tuple(totals[1:])

    @property
    def answer(self) -> str:
        """The last total, as two digits."""
        return f"{self.totals[-1]:02d}"

    @property
    def level(self) -> int:
        """One more than the hard steps."""
        before = (self.start, *self.totals)
        return 1 + sum(is_hard(op, total % 10, d) for (op, d), total in zip(self.steps, before))

    @property
    def text(self) -> str:
        """The prompt."""
        return f"{self.start:02d}{''.join(f'{a}{op}{d}' for a, (op, d) in zip(LABELS, self.steps))}:"

    @property
    def held_out(self) -> bool:
        return int(fingerprint(self.text), 16) % HELD_OUT == 0


def make_problem(level: int, rng: random.Random, largest: int = 9) -> Problem:
    """A random problem of a level: its hard steps and the easy ones shuffled, each uniform among those that fit.

    Args:
        largest: the largest operand.
    """
    while True:
        start = total = rng.randint(10, 99)
        kinds = [True] * (level - 1) + [False] * EASY
        rng.shuffle(kinds)
        steps: list[tuple[str, int]] = []
        for hard in kinds:
            fitting = [
                (op, d)
                for op in "+-"
                for d in range(1, largest + 1)
                if is_hard(op, total % 10, d) == hard and 0 <= (total + d if op == "+" else total - d) <= 99
            ]
            if not fitting:
                break
            steps.append(rng.choice(fitting))
            total = applied(steps[-1][0], total, steps[-1][1])
        if len(steps) == len(kinds):
            return Problem(start, tuple(steps))


def problem_stream(
    levels: Sequence[int], rng: random.Random, largest: int = 9, *, held_out: bool, distinct: bool = True
) -> Iterator[Problem]:
    """Endless problems, the levels taking turns.

    Args:
        largest: the largest operand.
        held_out: only problems that are held out, or only others.
        distinct: no two alike while there are others.
    """
    seen: set[str] = set()
    for level in cycle(levels):
        for attempt in count():
            problem = make_problem(level, rng, largest)
            if problem.held_out == held_out and (problem.text not in seen or attempt > TRIES):
                break
        if distinct:
            seen.add(problem.text)
        yield problem


@lru_cache(maxsize=65536)
def parse_prompt(text: str) -> Problem:
    """The problem that a prompt states.

    Raises:
        DataError: not a prompt of this world.
    """
    match = _PROMPT.fullmatch(text)
    steps = match.group(2) if match else ""
    if not match or steps[::3] != LABELS[: len(steps) // 3]:
        raise DataError("not a prompt of world arithmetic", field="prompt", value=text, expected="47a+8b-3c+9:")
    return Problem(int(match.group(1)), tuple(zip(steps[1::3], map(int, steps[2::3]))))


def rng_of(*purpose: Any) -> random.Random:
    """A random generator of its own for each purpose."""
    return random.Random(seed_of(*purpose))


def seed_of(*purpose: Any) -> int:
    """A non-negative 62-bit seed of its own for each purpose."""
    return int(fingerprint(["arithmetic", *purpose]), 16) >> 2


# ----------------------------------------------------------------------------------------------------
# Where a chain goes wrong: the first wrong token of the statement that is in force.

Ending = Literal["answer", "marker"]
"""How a completion ends: `>`, two digits and the end; or (where something else follows) with `>`."""
Kind = Literal["sum", "copy", "format", "answer", "truncation"]
MARKER = ">"


@dataclass(frozen=True)
class Audit:
    """What became of a chain.

    Attributes:
        correct: whether the reward is 1.
        index: place of the culprit among the completion's tokens; None for a correct chain, or one without tokens.
        kind: `sum`, a digit of a total; `copy`, a label, operator or operand of a step whose total is wrong; `format`,
            a token that cannot stand where it stands; `answer`, a digit after `>` that is not the last total's;
            `truncation`, the last token of a chain that never ends. None for a correct chain.
    """

    correct: bool
    index: int | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Step:
    """A step as written: places of the first token, and of the total's two digits that are in force."""

    first: int
    total: int


def symbols(ids: Sequence[int]) -> list[str]:
    """Token ids as symbols; ids beyond this world's are shown as `<other>`."""
    return [SYMBOLS[i] if 0 <= i < len(SYMBOLS) else "<other>" for i in ids]


def upto(tokens: Sequence[str], ending: Ending) -> list[str]:
    """The tokens up to the first `<end>` (or `>`), which is included."""
    last = EOS if ending == "answer" else MARKER
    return list(tokens[: tokens.index(last) + 1]) if last in tokens else list(tokens)


def is_correct(problem: Problem, tokens: Sequence[str], ending: Ending = "answer") -> bool:
    """The reward: whether the completion ends with `>`, the right answer and `<end>`.

    With `ending="marker"`: whether it comes to `>`, and the total before the last separator is right.
    """
    tokens = upto(tokens, ending)
    if ending == "answer":
        return tokens[-4:] == [MARKER, *problem.answer, EOS]
    return len(tokens) > 3 and tokens[-4:-2] == [*problem.answer] and tokens[-2] in ";," and tokens[-1] == MARKER


def read(tokens: Sequence[str], n_steps: int, ending: Ending = "answer") -> tuple[list[Step], int | None]:
    """Read a chain step by step.

    Returns:
        The steps that state a total, and the place of the first token that cannot stand where it stands
        (`len(tokens)` if the chain stops too early; None if there is none).
    """
    tokens = [*upto(tokens, ending), ""]
    steps: list[Step] = []
    at = 0

    def misfit(kinds: Sequence[str]) -> int | None:
        return next((at + i for i, kind in enumerate(kinds) if not fits(tokens[at + i], kind)), None)

    for _ in range(n_steps):
        first = at
        if (wrong := misfit((LABELS, "+-", DIGITS, DIGITS, DIGITS))) is not None:
            return steps, wrong
        at += 5
        steps.append(Step(first, at - 2))
        while tokens[at] == "?":
            if (wrong := misfit(("?", DIGITS, DIGITS))) is not None:
                return steps, wrong
            at += 3
            steps[-1] = Step(first, at - 2)
        if (wrong := misfit((";,",))) is not None:
            return steps, wrong
        at += 1
    tail = (MARKER, DIGITS, DIGITS, EOS) if ending == "answer" else (MARKER,)
    return steps, misfit(tail)


def fits(token: str, kind: str) -> bool:
    """Whether a token is one of a kind: `<end>`, or one of these characters."""
    return token == kind if kind == EOS else len(token) == 1 and token in kind


def audit(problem: Problem, tokens: Sequence[str], ending: Ending = "answer") -> Audit:
    """Find the culprit of a completion whose reward is 0.

    Totals are compared with the true ones. A wrong total that a check corrects, or that a later step makes up for, is
    not to blame: the culprit lies in the first step of those that stay wrong to the end.
    """
    tokens = upto(tokens, ending)
    if is_correct(problem, tokens, ending):
        return Audit(True)
    steps, misfit = read(tokens, len(problem.steps), ending)
    culprit: Audit | None = None
    for i, step in enumerate(steps):
        stated, truth = tokens[step.total : step.total + 2], f"{problem.totals[i]:02d}"
        if stated == [*truth]:
            culprit = None
        elif culprit is None:
            copied = _miscopied(problem, tokens, i, step.first)
            place = step.total + (stated[0] == truth[0])
            culprit = Audit(False, place, "sum") if copied is None else Audit(False, copied, "copy")
    if culprit is not None:
        return culprit
    if ending == "answer" and MARKER in tokens and (misfit is None or misfit > tokens.index(MARKER) + 1):
        answer = tokens.index(MARKER) + 1
        written = tokens[answer : answer + 2 if misfit is None else misfit]
        wrong = next((answer + i for i, (a, b) in enumerate(zip(written, problem.answer)) if a != b), None)
        if wrong is not None:
            return Audit(False, wrong, "answer")
    assert misfit is not None  # every token fits and the last total is right, so the answer is
    if len(steps) < len(problem.steps):
        first = steps[-1].total + 3 if steps else 0
        if first < misfit and (copied := _miscopied(problem, tokens, len(steps), first)) is not None:
            return Audit(False, copied, "copy")
    if misfit >= len(tokens):
        return Audit(False, len(tokens) - 1 if tokens else None, "truncation")
    return Audit(False, misfit, "format")


def _miscopied(problem: Problem, tokens: Sequence[str], index: int, first: int) -> int | None:
    """Place of the first token of a step's label, operator and operand that is not the problem's."""
    operator, operand = problem.steps[index]
    expected = (LABELS[index], operator, str(operand))
    written = tokens[first : first + 3]
    return next((first + i for i, (a, b) in enumerate(zip(written, expected)) if a != b), None)


# ----------------------------------------------------------------------------------------------------
# Credit that is known exactly in the world `arithmetic`: which token is to blame, and where something is decided.


def _completions(world: ArithmeticWorld, batch: TokenBatch) -> list[tuple[Problem, list[str]]]:
    """Problem and symbols of every completion."""
    found = world.prompt_problems(batch)
    return [(found[g], symbols(batch.completion(c).tolist())) for c, g in enumerate(batch.group.tolist())]


def culprits(world: ArithmeticWorld, batch: TokenBatch) -> Tensor:
    """−1 at the culprit of every completion whose reward is 0, and 0 elsewhere, float `[N]`.

    Raises:
        DataError: a prompt that is not this world's.
    """
    values = torch.zeros(len(batch.completion_ids))
    starts = batch.completion_offsets.tolist()
    for c, (problem, tokens) in enumerate(_completions(world, batch)):
        found = audit(problem, tokens, world.ending)
        if found.index is not None:
            values[starts[c] + found.index] = -1.0
    return values[batch.counted.cpu()].to(batch.device)


def decisions(world: ArithmeticWorld, batch: TokenBatch) -> Tensor:
    """Digits of totals and what follows them (a check or a separator), bool `[N]`."""
    values = torch.zeros(len(batch.completion_ids), dtype=torch.bool)
    starts = batch.completion_offsets.tolist()
    for c, (problem, tokens) in enumerate(_completions(world, batch)):
        steps, _ = read(tokens, len(problem.steps), world.ending)
        end = len(upto(tokens, world.ending))
        for step in steps:
            # From the first total (after label, operator, operand) to the separator after the one in force.
            values[starts[c] + step.first + 3 : starts[c] + min(step.total + 3, end)] = True
    return values[batch.counted.cpu()].to(batch.device)


# ----------------------------------------------------------------------------------------------------
# Right and wrong completions of the same problem, sampled from the base model or written by the generator.

SAMPLES = 8
"""Chains sampled for a prompt to find right and wrong ones; at most `PER_PROMPT` pairs are made of them."""
PER_PROMPT = 4
"""Prompts sampled from at a time."""
ROUNDS = 50

Pair = tuple[Problem, list[int], list[int]]
"""A problem, and the token ids of a right and a wrong completion."""


def sampled_pairs(
    world: ArithmeticWorld, purpose: str, split: Split, n: int, seed: int, *, whole: bool = True
) -> list[Pair]:
    """Pairs of the base model's samples. Completions that never end, or have no text, are left out.

    Args:
        whole: completions to their end, not only up to where the reward looks.

    Raises:
        TokengrainError: the model is hardly ever both right and wrong on a prompt.
    """
    from tokengrain.rollout.local import HFGenerate

    sampler = HFGenerate(world.reference)
    sampling = world.sampling(seed_of(purpose, split, seed), whole=whole)
    drawn = world.stream(purpose, split, seed)
    found: list[Pair] = []
    for _ in range(ROUNDS + n // 8):
        part = list(islice(drawn, min(CHUNK, n)))
        with single_thread():
            rollouts = sampler.sample(world.items(part), n=SAMPLES, sampling=sampling)
        for problem, group in zip(part, rollouts.groups, strict=True):
            # A pair is text: a completion that is nothing but its end has none.
            whole_texts = (tuple(c.ids) for c in group if not c.truncated and world.decode(c.ids))
            ended = [list(ids) for ids in dict.fromkeys(whole_texts)]
            right = [ids for ids in ended if world.audit(problem.text, ids).correct]
            wrong = [ids for ids in ended if not world.audit(problem.text, ids).correct]
            found += [(problem, a, b) for a, b in zip(right[:PER_PROMPT], wrong)]
        if len(found) >= n:
            return found[:n]
    raise TokengrainError(f"world {world.name}: the base model's samples gave {len(found)} pairs, not {n}")


def written_pairs(world: ArithmeticWorld, purpose: str, split: Split, n: int, seed: int) -> list[Pair]:
    """Pairs of the generator's chains."""
    rng = rng_of(world.name, "written", purpose, split, seed)
    found = []
    for problem in islice(world.stream(purpose, split, seed), n):
        sides: dict[bool, list[int]] = {}
        while len(sides) < 2:
            ids = [*world.encode(world.completion(problem, rng)), world.eos]
            sides.setdefault(world.audit(problem.text, ids).correct, ids)
        found.append((problem, sides[True], sides[False]))
    return found


# ----------------------------------------------------------------------------------------------------
# The supervised warm start of the worlds `arithmetic` and `revision`: a small Llama on chains that go wrong.

Example = tuple[list[int], list[int]]
"""Token ids of a prompt (`<s>` in front) and of a completion (`<end>` at its end)."""


@dataclass(frozen=True)
class WarmStart(Training):
    """Settings of the base model and its training; see `warm_start`.

    Args:
        muon: Muon for the matrices; it needs fewer steps, which suits the small size, and AdamW is what the full
            size was measured with.
    """

    hidden_size: int = 96
    mlp_size: int = 256
    steps: int = 600
    learning_rate: float = 3e-3
    warmup: int = 30
    positions: int = 128
    muon: bool = False


def new_model(settings: WarmStart, vocabulary: int) -> LlamaForCausalLM:
    """The untrained model; see `small_llama`."""
    return small_llama(
        settings,
        vocabulary=vocabulary,
        positions=settings.positions,
        tied=False,
        bos=IDS[BOS],
        eos=IDS[EOS],
        pad=IDS[PAD],
    )


def _loss(model: LlamaForCausalLM, examples: Sequence[Example]) -> Tensor:
    """Mean cross-entropy over the tokens of the completions."""
    width = max(len(prompt) + len(completion) for prompt, completion in examples)
    ids = torch.full((len(examples), width), IDS[PAD])
    predicts = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        predicts[i, len(prompt) - 1 : end - 1] = True
    hidden = model.model(ids, use_cache=False).last_hidden_state
    labels = ids.roll(-1, 1)[predicts]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[predicts]), labels)


def _optimizers(model: LlamaForCausalLM, settings: WarmStart) -> list[torch.optim.Optimizer]:
    if settings.muon:
        return muon_and_adamw(model, settings.learning_rate)
    betas = (0.9, 0.95)
    return [torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=betas, weight_decay=0.0)]


def warm_start(
    settings: WarmStart,
    vocabulary: int,
    draw: Callable[[int], list[Example]],
    progress: Progress | None = None,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a base model on fresh examples in every step, with linear decay after the warm-up.

    Args:
        vocabulary: how many tokens there are.
        draw: gives so many new examples.
        progress: called after every step with (steps done, cross-entropy in nats per token).

    Returns:
        The model in evaluation mode, and a report: cross-entropy over the last steps, seconds, threads.
    """
    start = time.perf_counter()
    model = new_model(settings, vocabulary).train()
    optimizers = _optimizers(model, settings)
    steps = (_loss(model, draw(settings.batch_size)) for _ in range(settings.steps))
    losses = descend(model, optimizers, steps, settings, progress)
    last = losses[-max(1, settings.steps // 20) :]
    return model.eval(), {
        "cross_entropy": sum(last) / len(last),
        "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(),
    }


# ----------------------------------------------------------------------------------------------------
# Sizes and options of the world `arithmetic`.


@dataclass(frozen=True)
class Size:
    """How large a world is.

    Attributes:
        levels: those of the prompts and of the base model's training.
        largest: the largest operand.
        prompts, held_out: training and held-out prompts per level.
        pairs: of `pairs("train")`; credit: of `credit_truth`.
    """

    levels: tuple[int, ...]
    largest: int
    prompts: int
    held_out: int
    pairs: int
    credit: int
    warm_start: WarmStart


SMALL = WarmStart(
    hidden_size=48, layers=2, mlp_size=192, steps=250, batch_size=32, learning_rate=2e-2, warmup=30, muon=True
)
SIZES = {
    "full": Size((1, 2, 3, 4, 5, 6), 9, 40, 30, 1000, 400, WarmStart()),
    "small": Size((1, 2), 3, 40, 15, 200, 60, SMALL),
}


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels as an address gives them: `1-6`, `3` or `1,4-6`.

    Raises:
        RecipeError: something else, or levels that there are not.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise RecipeError(f"levels is {text!r}; expected levels such as 1-6 or 1,3")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if not 1 <= first <= last <= MAX_LEVEL:
            raise RecipeError(f"levels is {text!r}; expected levels from 1 to {MAX_LEVEL}")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


@dataclass(frozen=True)
class ArithmeticOptions:
    """Options of the address `world://arithmetic?...`.

    Args:
        levels: of the prompts, such as `1-6` or `1,3`; the size's by default. The base model is trained on the
            size's levels, and on those above them up to the highest one asked for.
        seed: of the training prompts and pairs; held-out prompts and the base model are the same for all.
        size: `full`, or `small` (levels 1–2, operands 1–3, a smaller model) for tests and quick runs.
        prompts: how many training prompts (default 40 per level).
        pairs: how many training pairs.
    """

    levels: str = ""
    seed: int = 0
    size: str = "full"
    prompts: int | None = None
    pairs: int | None = None

    world: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise RecipeError(f"world {self.world}: size is {self.size!r}; expected one of {', '.join(SIZES)}")
        for name, least in (("seed", 0), ("prompts", 1), ("pairs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"world {self.world}: {name} is {value}; expected at least {least}")
        try:
            parse_levels(self.levels or "1")
        except RecipeError as error:
            raise RecipeError(f"world {self.world}: {error}") from None


# ----------------------------------------------------------------------------------------------------
# Rewards of the world `arithmetic`, as `RewardSuite` takes them.


def completion_symbols(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
) -> list[list[str]]:
    """Completions as symbols: from their ids, or from their texts (which end unless `truncated`)."""
    if completion_ids is not None:
        return [symbols(ids) for ids in completion_ids]
    cut = truncated if truncated is not None else [False] * len(completions)
    return [[*text.removesuffix(EOS), *([] if short else [EOS])] for text, short in zip(completions, cut, strict=True)]


def correct(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    ending: Ending = "answer",
) -> list[float]:
    """1 for completions that end with `>`, the right two digits and `<end>`, else 0.

    Args:
        prompts: texts of the prompts; the right answer follows from them.
        completions: texts without special tokens.
        completion_ids: token ids; without them a completion is taken to end unless it is `truncated`.
        ending: `marker` where something follows the chain: then the last total before `>` must be right.
    """
    tokens = completion_symbols(completions, completion_ids, truncated)
    return [float(is_correct(parse_prompt(p), chain, ending)) for p, chain in zip(prompts, tokens, strict=True)]


def well_formed(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    ending: Ending = "answer",
) -> list[float]:
    """1 for completions with as many steps as the prompt, each with a total, and an answer, right or wrong; else 0."""
    tokens = completion_symbols(completions, completion_ids, truncated)
    steps = [len(parse_prompt(prompt).steps) for prompt in prompts]
    return [float(read(chain, n, ending)[1] is None) for chain, n in zip(tokens, steps, strict=True)]


# ----------------------------------------------------------------------------------------------------
# Evaluation of a policy in the world `arithmetic`, from several samples per prompt.


def stated_answer(tokens: Sequence[str], ending: Ending = "answer") -> str | None:
    """The two digits that a completion ends with, or (with `marker`) the total before the last separator."""
    last = upto(tokens, ending)[-4:]
    kinds = (MARKER, DIGITS, DIGITS, EOS) if ending == "answer" else (DIGITS, DIGITS, ";,", MARKER)
    if len(last) < 4 or not all(fits(token, kind) for token, kind in zip(last, kinds)):
        return None
    return "".join(last[1:3] if ending == "answer" else last[:2])


def chain_metrics(
    problems: Sequence[Problem], rollouts: Rollouts, ending: Ending = "answer", k: int | None = None
) -> dict[str, float | None]:
    """Measures of a policy's samples.

    Args:
        problems: P, those of the rollouts' prompts.
        rollouts: n samples of each prompt.
        k: the largest k (None: n).

    Returns:
        Those of `sample_metrics` (accuracy, pass@j, avg@k, maj@k, utilisation), each with `_low` and `_high` of a
        95 % interval over prompts; `accuracy_level_L` and `pass@k_level_L` likewise; `length`, `length_correct`,
        `length_wrong` (tokens; None without such samples); `truncated`, `well_formed` (shares); and
        `culprit_KIND`, the share of wrong samples whose culprit is of this kind (None without wrong samples).
    """
    tokens = [[symbols(c.ids) for c in group] for group in rollouts.groups]
    audits = [[audit(p, t, ending) for t in group] for p, group in zip(problems, tokens, strict=True)]
    correct = torch.tensor([[a.correct for a in group] for group in audits])
    answers = [[stated_answer(t, ending) for t in group] for group in tokens]
    per_prompt = sample_metrics(correct, answers, k)
    k = correct.shape[1] if k is None else k
    found: dict[str, float | None] = {}
    for name, values in per_prompt.items():
        found |= _flat(name, mean_over_prompts(values))
    levels = [p.level for p in problems]
    for name in ("accuracy", f"pass@{k}"):
        groups = by_group(per_prompt[name], levels)
        for level in sorted(set(levels)):
            found |= _flat(f"{name}_level_{level}", groups[level])
    lengths = torch.tensor([[float(len(c.ids)) for c in group] for group in rollouts.groups])
    for suffix, kept in (("", torch.ones_like(correct)), ("_correct", correct), ("_wrong", ~correct)):
        found[f"length{suffix}"] = _mean(lengths[kept])
    formed = [[read(t, len(p.steps), ending)[1] is None for t in group] for p, group in zip(problems, tokens)]
    found["truncated"] = _mean(rollouts.truncated.float())
    found["well_formed"] = _mean(torch.tensor(formed).float())
    kinds = [a.kind for group in audits for a in group if not a.correct]
    for kind in get_args(Kind):
        found[f"culprit_{kind}"] = kinds.count(kind) / len(kinds) if kinds else None
    return found


def _flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _mean(values: Tensor) -> float | None:
    mean = float(values.mean()) if values.numel() else math.nan
    return None if math.isnan(mean) else mean


# ----------------------------------------------------------------------------------------------------
# Chains of thought that go wrong as people do: persistent misconceptions about hard facts, slips, re-checks.

RATES = (0.15, 0.60)
"""Range of the rate at which a misconception shows."""
SLIP = 0.02
CHECK = 0.15
"""Chance that a statement is checked again."""
CHECK_FACTOR = 0.3
"""A check is wrong at this share of the rate at which the statement is."""
SEPARATORS = ";,"
"""A step ends with one or the other, by a coin that means nothing."""


def shifted(total: int, digit: int, offset: int) -> int:
    """The total with one of its digits (0: tens, 1: units) moved on by `offset`, modulo 10."""
    digits = [total // 10, total % 10]
    digits[digit] = (digits[digit] + offset) % 10
    return 10 * digits[0] + digits[1]


@dataclass(frozen=True)
class Misconception:
    """What somebody believes about a fact: at this `rate` this `digit` comes out wrong, always by `offset`."""

    rate: float
    digit: int
    offset: int


@lru_cache(maxsize=8)
def misconceptions(seed: int = 0) -> dict[tuple[str, int, int], Misconception]:
    """One for each hard fact, by (operator, unit digit, operand): 90 of them."""
    rng = rng_of("misconceptions", seed)
    facts = [(op, unit, d) for op in "+-" for unit in range(10) for d in range(1, 10) if is_hard(op, unit, d)]
    return {fact: Misconception(rng.uniform(*RATES), rng.randrange(2), rng.randint(1, 9)) for fact in facts}


@dataclass(frozen=True)
class Chain:
    """A chain of thought.

    Attributes:
        text: its steps, such as `a+855;b-352?54,`.
        totals: the totals that stand at the end, one for each step.
        separators: the style of each step.
    """

    text: str
    totals: tuple[int, ...]
    separators: str


def write_chain(
    problem: Problem, rng: random.Random, beliefs: dict[tuple[str, int, int], Misconception] | None = None
) -> Chain:
    """A chain for a problem; it goes on from its own totals, right or wrong.

    Args:
        beliefs: misconceptions by fact (None: those of the base model; empty: only slips).
    """
    beliefs = misconceptions() if beliefs is None else beliefs
    total, text = problem.start, ""
    totals, separators = [], ""
    for label, (operator, operand) in zip(LABELS, problem.steps):
        truth = applied(operator, total, operand)
        belief = beliefs.get((operator, total % 10, operand))
        rate = belief.rate if belief else 0.0
        total = _stated(truth, belief, rate, SLIP, rng)
        text += f"{label}{operator}{operand}{total:02d}"
        if rng.random() < CHECK:
            total = _stated(truth, belief, CHECK_FACTOR * rate, CHECK_FACTOR * SLIP, rng)
            text += f"?{total:02d}"
        separators += rng.choice(SEPARATORS)
        text += separators[-1]
        totals.append(total)
    return Chain(text, tuple(totals), separators)


def _stated(truth: int, belief: Misconception | None, rate: float, slip: float, rng: random.Random) -> int:
    total = shifted(truth, belief.digit, belief.offset) if belief and rng.random() < rate else truth
    return shifted(total, rng.randrange(2), rng.randint(1, 9)) if rng.random() < slip else total


# ----------------------------------------------------------------------------------------------------
# The tokenizer of the worlds `arithmetic` and `revision`: a token for each character, or for a word of filler.

TOKEN = r" [a-z]{2,}|."
"""What a token looks like."""


def build_tokenizer(vocabulary: Sequence[str], positions: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids are places in `vocabulary`. It puts `<s>` in front and never appends `<end>`.

    A token is a character, or a space with at least two letters. What is unknown becomes `<pad>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {symbol: i for i, symbol in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    core.decoder = decoders.Fuse()
    return fast_tokenizer(core, positions=positions)


# ----------------------------------------------------------------------------------------------------
# Tokens and the base model of the worlds `arithmetic` and `revision`.

FORMAT = 1
"""Raised when problems, chains or training change in a way that the settings do not show."""


CHECKED_STEP = 9
"""Tokens of a step that is checked once: label, operator, operand, two digits, `?`, two digits, separator."""


def longest_problem(levels: Sequence[int]) -> int:
    """Steps of the longest problem of these levels."""
    return max(levels) + EASY - 1


class ChainModel:
    """What a world of chains is before there are prompts: options, tokens, and the warm-started model."""

    name: str = "arithmetic"
    ending: Ending = "answer"
    vocabulary: tuple[str, ...] = SYMBOLS

    def __init__(self, options: ArithmeticOptions | None = None) -> None:
        self.options = options or ArithmeticOptions()
        self.size = self._size()
        self.levels = parse_levels(self.options.levels) if self.options.levels else self.size.levels
        top = max(*self.size.levels, *self.levels)
        self.trained_levels = tuple(range(1, top + 1))

    def _size(self) -> Size:
        return SIZES[self.options.size]

    # -- identity, model -----------------------------------------------------------------------------

    def _model_settings(self) -> dict[str, Any]:
        """What the base model depends on."""
        return {
            "format": FORMAT,
            "world": self.name,
            "levels": self.trained_levels,
            "largest": self.size.largest,
            **asdict(self.warm_start),
        }

    @cached_property
    def warm_start(self) -> WarmStart:
        """The size's settings, with positions enough for the longest problem that the base model is trained on."""
        settings = self.size.warm_start
        return replace(
            settings, positions=max(settings.positions, self._positions(longest_problem(self.trained_levels)))
        )

    def _positions(self, steps: int) -> int:
        """What a prompt of so many steps and its longest sensible completion take."""
        return 4 + 3 * steps + self._longest(steps)

    def _longest(self, steps: int) -> int:
        """Tokens of a completion in which every step is checked once."""
        return CHECKED_STEP * steps + 4

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the base model and the data's options."""
        return fingerprint([self._model_settings(), self.levels, asdict(self.options)])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.vocabulary, self.warm_start.positions)

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest sensible completion: every step checked once."""
        return self._longest(longest_problem(self.levels))

    def base_model(self) -> Path:
        """Folder of the warm-started base model; trained on first use: 80 s of one core, 10 s for the small size."""
        settings = self._model_settings()
        folder = model_folder(f"{self.name}-{self.options.size}", fingerprint(settings))
        warm = self.warm_start
        rng = rng_of(self.name, "warm start", warm.seed)

        def train(progress: Progress) -> tuple[Any, dict[str, Any]]:
            model, report = warm_start(warm, len(self.vocabulary), lambda n: self._examples(n, rng), progress)
            return model, settings | report

        return ensure_model(folder, train, self.tokenizer, f"world://{self.name}", warm.steps)

    @cached_property
    def reference(self) -> Any:
        """The base model, loaded once; frozen."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base_model(), dtype=torch.float32).requires_grad_(False).eval()

    def _examples(self, n: int, rng: random.Random) -> list[Example]:
        stream = problem_stream(self.trained_levels, rng, self.size.largest, held_out=False, distinct=False)
        return [(self.prompt_ids(p.text), [*self.encode(self.completion(p, rng)), self.eos]) for p in islice(stream, n)]

    def completion(self, problem: Problem, rng: random.Random) -> str:
        """A completion that goes wrong as the base model is to do."""
        chain = write_chain(problem, rng)
        return f"{chain.text}>{chain.totals[-1]:02d}"

    # -- tokens --------------------------------------------------------------------------------------

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.vocabulary)}

    @property
    def eos(self) -> int:
        """Id of `<end>`."""
        return self._ids[EOS]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens; faster than the tokenizer, which gives the same.

        Raises:
            DataError: the world has no such token.
        """
        try:
            return [self._ids[symbol] for symbol in re.findall(TOKEN, text)]
        except KeyError as error:
            raise DataError(f"not a token of world {self.name}", value=error.args[0], expected="its symbols") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return "".join(self.vocabulary[i] for i in ids if self.vocabulary[i] not in SPECIAL)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, `<s>` in front."""
        return [self._ids[BOS], *self.encode(text)]

    def prompt_problems(self, batch: TokenBatch) -> list[Problem]:
        """The problem of every prompt of a batch.

        Raises:
            DataError: a prompt that is not this world's.
        """
        return [parse_prompt(self.decode(batch.prompt(g).tolist())) for g in range(batch.n_prompts)]


CHUNK = 64
"""Prompts that a credit source is given at a time."""


class ArithmeticWorld(ChainModel):
    """Multi-step sums with a chain of thought, an exact checker, and the first wrong token known.

    Made by `load_world("world://arithmetic")`. A prompt such as `47a+8b-3:` is answered step by step,
    `a+855;b-352,>52`, and the reward is 1 if the last two digits are right. The base model has persistent
    misconceptions about carrying and borrowing.
    """

    def __init__(self, options: ArithmeticOptions | None = None) -> None:
        super().__init__(options)
        self.n_pairs = self.options.pairs or self.size.pairs
        self._pairs: dict[Any, list[dict[str, Any]]] = {}

    # -- prompts, rewards, audit ---------------------------------------------------------------------

    def stream(self, purpose: str, split: Split, seed: int) -> Iterator[Problem]:
        """Endless problems, the levels taking turns; those of the two splits are never the same."""
        if split not in get_args(Split):
            raise RecipeError(f"world {self.name}: split is {split!r}; expected train or eval")
        rng = rng_of(purpose, split, seed, self.size.largest, self.levels)
        return problem_stream(self.levels, rng, self.size.largest, held_out=split == "eval")

    def prompts(self, split: Split = "train", n: int | None = None) -> list[dict[str, Any]]:
        """Rows `prompt`, `answer` (two digits), `level`, `id`; the levels take turns.

        Args:
            split: no prompt is in both, whatever the seeds; `eval` prompts do not depend on the seed.
            n: how many (None: the world's number; fewer are the first of these).
        """
        eval_ = split == "eval"
        if n is None:
            n = len(self.levels) * (self.size.held_out if eval_ else self.size.prompts)
            n = n if eval_ else self.options.prompts or n
        drawn = self.stream("prompts", split, 0 if eval_ else self.options.seed)
        return [self._row(p, f"{split}-{i}") for i, p in enumerate(islice(drawn, n))]

    def _row(self, problem: Problem, identity: str) -> dict[str, Any]:
        return {"prompt": problem.text, "answer": problem.answer, "level": problem.level, "id": identity}

    def reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """1 for a completion that ends with the right answer, else 0; see `rewards.correct`."""
        return correct(prompts, completions, completion_ids, truncated, ending=self.ending)

    def format_reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """1 for a completion with all steps and an ending, right or wrong; see `rewards.well_formed`."""
        return well_formed(prompts, completions, completion_ids, truncated, ending=self.ending)

    def audit(self, prompt: str, completion_ids: Sequence[int]) -> Audit:
        """Whether a completion's reward is 1, and if not, which token is to blame.

        Raises:
            DataError: not a prompt of this world.
        """
        return audit(parse_prompt(prompt), symbols(completion_ids), self.ending)

    # -- chains, right and wrong ---------------------------------------------------------------------

    def sampling(self, seed: int, *, whole: bool = False) -> SamplingConfig:
        """How completions are sampled: up to the point that the reward looks at, or `whole`."""
        from tokengrain.rollout.sampler import SamplingConfig

        return SamplingConfig(max_new_tokens=self.max_new_tokens, stop_ids=(self.eos,), seed=seed)

    def items(self, drawn: Sequence[Problem]) -> list[PromptItem]:
        """Problems as a sampler takes them, each with its row."""
        from tokengrain.rollout.sampler import PromptItem

        return [PromptItem(self.prompt_ids(p.text), row=p.text, raw=self._row(p, p.text)) for p in drawn]

    def sft_rows(self, split: Split = "train", n: int | None = None, seed: int | None = None) -> list[dict[str, Any]]:
        """Rows `prompt`, `completion`, `id`, `reward`: chains as the base model was trained on."""
        seed, n = self.options.seed if seed is None else seed, n or self.n_pairs
        rng = rng_of(self.name, "sft", split, seed)
        rows = []
        for i, problem in enumerate(islice(self.stream("sft", split, seed), n)):
            text = self.completion(problem, rng)
            reward = self.reward([problem.text], [text])[0]
            rows.append({"prompt": problem.text, "completion": text, "id": f"{split}-{i}", "reward": reward})
        return rows

    def pairs(
        self,
        split: Split = "train",
        n: int | None = None,
        slope: float | None = None,
        seed: int | None = None,
        *,
        source: Literal["model", "chains"] = "model",
    ) -> list[dict[str, Any]]:
        """Pairs of a right and a wrong completion of one prompt, for guides and reward models.

        Completions that never end are left out, so that nothing is trained to stop there.

        Args:
            split: `eval` pairs are about held-out problems.
            n: how many (None: the world's number; 200 held-out ones at most).
            slope: there is no label noise here; must be None.
            source: the base model's samples, or chains of the generator that it was trained on.

        Returns:
            Rows `prompt`, `chosen`, `rejected`, `id`, `chosen_reward` (1), `rejected_reward` (0).

        Raises:
            RecipeError: a slope, another split or another source.
        """
        if source not in ("model", "chains"):
            raise RecipeError(f"world {self.name}: source is {source!r}; expected model or chains")
        if slope is not None:
            raise RecipeError(f"world {self.name}: pairs are right against wrong; slope must be None, got {slope}")
        seed = self.options.seed if seed is None else seed
        n = n or (self.n_pairs if split == "train" else min(200, self.n_pairs))
        key = (split, n, seed, source)
        if key not in self._pairs:
            find = sampled_pairs if source == "model" else written_pairs
            self._pairs[key] = [
                {
                    "prompt": problem.text,
                    "chosen": self.decode(chosen),
                    "rejected": self.decode(rejected),
                    "id": f"{split}-{i}",
                    "chosen_reward": 1.0,
                    "rejected_reward": 0.0,
                }
                for i, (problem, chosen, rejected) in enumerate(find(self, "pairs", split, n, seed))
            ]
        return [dict(row) for row in self._pairs[key]]

    # -- credit --------------------------------------------------------------------------------------

    def advantages(self, batch: TokenBatch) -> Tensor:
        """−1 at the culprit of every completion whose reward is 0, and 0 elsewhere, `[N]`."""
        return culprits(self, batch)

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Samples of the base model on held-out problems, a right and a wrong one each, with the culprits.

        Args:
            prompts: how many pairs (None: 400, 60 of the small size).
            seed: of the samples.

        Returns:
            Credit as `advantages` gives it. Something is decided at the digits of totals, where a check or a
            separator may follow, and at the culprit; what only copies is not compared.
        """
        found = sampled_pairs(self, "credit", "eval", prompts or self.size.credit, seed, whole=False)
        batch = TokenBatch.from_samples(
            [
                Sample(self.prompt_ids(p.text), [Completion(right), Completion(wrong)], row=f"credit-{i}")
                for i, (p, right, wrong) in enumerate(found)
            ]
        )
        truth = self.advantages(batch)
        return CreditTruth(batch, truth, decisions(self, batch) | (truth < 0))

    @cached_property
    def _credit_truth(self) -> CreditTruth:
        return self.credit_truth()

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement of a credit source with the culprits of base samples: `spearman`, `auc`, `tokens`.

        `auc` is the chance that a culprit has lower credit than another token that decides something.
        """
        batch, truth, decided = self._credit_truth
        parts = [batch.select(range(i, min(i + CHUNK, batch.n_prompts))) for i in range(0, batch.n_prompts, CHUNK)]
        values = torch.cat([credit(part).detach().float().cpu() for part in parts])
        return recovery(values, truth, decided) | {"auc": auc(-values[decided], truth[decided] < 0)}

    # -- evaluation ----------------------------------------------------------------------------------

    def evaluate(
        self,
        model: Any,
        n: int | None = None,
        seed: int = 0,
        *,
        k: int | None = None,
        prompts: int | None = None,
        split: Split = "eval",
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float | None]:
        """Evaluate a policy on its own samples at temperature 1.

        Args:
            model: a causal language model with this world's tokenizer (a PEFT model too).
            n: samples per prompt (None: k, or 16).
            seed: of the samples; torch's global random state is not touched.
            k: the largest k of pass@k, avg@k and maj@k (None: n).
            prompts: how many prompts of the split (None: all of them).
            progress: called with how many samples are drawn, and how many there will be.

        Returns:
            Flat numbers, see `chain_metrics`.
        """
        from tokengrain.rollout.local import HFGenerate

        n = n if n is not None else 16 if k is None else k
        rows = self.prompts(split, prompts)
        drawn = [parse_prompt(row["prompt"]) for row in rows]
        with single_thread():
            sampling = self.sampling(seed_of("evaluate", seed))
            sampler = HFGenerate(model)
            sampler.progress = progress
            rollouts = sampler.sample(self.items(drawn), n=n, sampling=sampling)
        return chain_metrics(drawn, rollouts, self.ending, k)
