"""The world `arithmetic`: tokenizer, base model, prompts, rewards, pairs, exact credit and evaluation."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError, TokengrainError, fingerprint, require
from tokengrain.evaluation.credit import CreditTruth, recovered
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.worlds import base_models, chains
from tokengrain.worlds.base_models import BOS, EOS, PAD, Progress, Training, check_least, check_option, single_thread
from tokengrain.worlds.chains import IDS, Audit, Cut, Ending, Ids, Problem, Texts, parse_prompt, rng_of, seed_of

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class WarmStart(Training):
    """Settings of the base model and its training; Muon needs fewer steps; the full size was measured with AdamW."""

    hidden_size: int = 96
    mlp_size: int = 256
    steps: int = 600
    learning_rate: float = 3e-3
    warmup: int = 30
    positions: int = 128
    muon: bool = False


@dataclass(frozen=True)
class Size:
    """Size of a world: operands up to `largest`, prompts per level, pairs of `pairs("train")` and of `credit_truth`."""

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


def parse_levels(text: str, world: str = "arithmetic") -> tuple[int, ...]:
    """Levels as an address gives them: `1-6`, `3` or `1,4-6`."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (1, 1)
        expected = f"levels from 1 to {chains.MAX_LEVEL}" if match else "levels such as 1-6 or 1,3"
        good = match and 1 <= first <= last <= chains.MAX_LEVEL
        require(good, RecipeError, f"world {world}: levels is {text!r}; expected {expected}")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


@dataclass(frozen=True)
class ArithmeticOptions:
    """Options of the address `world://arithmetic?...`.

    Args:
        levels: of the prompts, such as `1-6` or `1,3`; by default the size's. The base model is trained on the size's
            levels, and on all levels up to the highest one asked for.
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
        check_option(self.world, "size", self.size, SIZES)
        check_least(self.world, self, {"seed": 0, "prompts": 1, "pairs": 1})
        parse_levels(self.levels or "1", self.world)


Example = tuple[list[int], list[int]]  # token ids of a prompt (`<s>` in front) and of a completion (`<end>` at its end)


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


def warm_start(
    settings: WarmStart, vocabulary: int, draw: Callable[[int], list[Example]], progress: Progress | None = None
) -> base_models.Trained:
    """Train a base model, on fresh examples in every step."""
    start = time.perf_counter()
    model = base_models.small_llama(settings, vocabulary=vocabulary, positions=settings.positions, tied=False).train()
    if settings.muon:
        optimizers = base_models.muon_and_adamw(model, settings.learning_rate)
    else:
        betas = (0.9, 0.95)
        optimizers = [torch.optim.AdamW(model.parameters(), settings.learning_rate, betas, weight_decay=0.0)]
    steps = (_loss(model, draw(settings.batch_size)) for _ in range(settings.steps))
    losses = base_models.descend(model, optimizers, steps, settings, progress)
    last, seconds = losses[-max(1, settings.steps // 20) :], round(time.perf_counter() - start, 1)
    report = {"cross_entropy": sum(last) / len(last), "seconds": seconds, "threads": torch.get_num_threads()}
    return model.eval(), report


TOKEN = r" [a-z]{2,}|."  # what a token looks like


def build_tokenizer(vocabulary: Sequence[str], positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are places in `vocabulary`; a token is a character, or a space with two letters or more."""
    ids = {symbol: i for i, symbol in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    core.decoder = decoders.Fuse()
    return base_models.fast_tokenizer(core, positions=positions)


FORMAT = 1  # raised when problems, chains or training change in a way that the settings do not show
CHECKED_STEP = 9
"""Tokens of a step that is checked once: label, operator, operand, two digits, `?`, two digits, separator."""


def most_steps(levels: Sequence[int]) -> int:
    return max(levels) + chains.EASY - 1


SAMPLES, PER_PROMPT = 8, 4  # chains sampled for a prompt, to find right and wrong ones; pairs made of them at most
ROUNDS, CHUNK = 50, 64  # how often as many prompts as are wanted are tried; prompts sampled from at a time
Pair = tuple[Problem, list[int], list[int]]  # a problem, and the token ids of a right and a wrong completion


class ArithmeticWorld:
    """Multi-step sums with a chain of thought, an exact checker, and the first wrong token known.

    A prompt such as `47a+8b-3:` is answered step by step, `a+855;b-352,>52`, and the reward is 1 if the last two digits
    are right. The base model has persistent misconceptions about carrying and borrowing.
    """

    name: str = "arithmetic"
    ending: Ending = "answer"
    vocabulary: tuple[str, ...] = chains.SYMBOLS

    def __init__(self, options: ArithmeticOptions | None = None) -> None:
        self.options = options or ArithmeticOptions()
        self.levels = parse_levels(self.options.levels) if self.options.levels else self.size.levels
        self.trained_levels = tuple(range(1, max(*self.size.levels, *self.levels) + 1))
        self.n_pairs = self.options.pairs or self.size.pairs
        self._pairs: dict[Any, list[dict[str, Any]]] = {}

    @property
    def size(self) -> Size:
        return SIZES[self.options.size]

    def _model_settings(self) -> dict[str, Any]:
        found = {"format": FORMAT, "world": self.name, "levels": self.trained_levels, "largest": self.size.largest}
        return found | asdict(self.warm_start)

    @cached_property
    def warm_start(self) -> WarmStart:
        """The size's settings, with positions enough for the longest problem that the base model is trained on."""
        settings, needed = self.size.warm_start, self._positions(most_steps(self.trained_levels))
        return replace(settings, positions=max(settings.positions, needed))

    def _positions(self, steps: int) -> int:
        """What a prompt of so many steps and its longest sensible completion take."""
        return 4 + 3 * steps + self._longest(steps)

    def _longest(self, steps: int) -> int:
        """Tokens of a completion in which every step is checked once."""
        return CHECKED_STEP * steps + 4

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self._model_settings(), self.levels, asdict(self.options)])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.vocabulary, self.warm_start.positions)

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest sensible completion: every step checked once."""
        return self._longest(most_steps(self.levels))

    def base_model(self) -> Path:
        """Folder of the warm-started base model; see `ensure_model`."""
        settings = self._model_settings()
        folder = base_models.model_folder(f"{self.name}-{self.options.size}", fingerprint(settings))
        warm = self.warm_start
        rng = rng_of(self.name, "warm start", warm.seed)

        def train(progress: Progress) -> base_models.Trained:
            model, report = warm_start(warm, len(self.vocabulary), lambda n: self._examples(n, rng), progress)
            return model, settings | report

        return base_models.ensure_model(folder, train, self.tokenizer, f"world://{self.name}", warm.steps)

    @cached_property
    def reference(self) -> Any:
        """The base model, loaded once; frozen."""
        return AutoModelForCausalLM.from_pretrained(self.base_model(), dtype=torch.float32).requires_grad_(False).eval()

    def _examples(self, n: int, rng: random.Random) -> list[Example]:
        stream = chains.problem_stream(self.trained_levels, rng, self.size.largest, held_out=False, distinct=False)
        return [(self.prompt_ids(p.text), [*self.encode(self.completion(p, rng)), self.eos]) for p in islice(stream, n)]

    def completion(self, problem: Problem, rng: random.Random) -> str:
        """A completion that goes wrong as the base model is to do."""
        chain = chains.write_chain(problem, rng)
        return f"{chain.text}>{chain.totals[-1]:02d}"

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.vocabulary)}

    @property
    def eos(self) -> int:
        return self._ids[EOS]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens; faster than the tokenizer, which gives the same."""
        try:
            return [self._ids[symbol] for symbol in re.findall(TOKEN, text)]
        except KeyError as error:
            raise DataError(f"not a token of world {self.name}", value=error.args[0], expected="its symbols") from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids if self.vocabulary[i] not in chains.SPECIAL)

    def prompt_ids(self, text: str) -> list[int]:
        return [self._ids[BOS], *self.encode(text)]

    def prompt_problems(self, batch: TokenBatch) -> list[Problem]:
        return [parse_prompt(self.decode(batch.prompt(g).tolist())) for g in range(batch.n_prompts)]

    def stream(self, purpose: str, split: Split, seed: int) -> Iterator[Problem]:
        """Endless problems, the levels taking turns; those of the two splits are never the same."""
        check_option(self.name, "split", split, get_args(Split))
        rng = rng_of(purpose, split, seed, self.size.largest, self.levels)
        return chains.problem_stream(self.levels, rng, self.size.largest, held_out=split == "eval")

    def prompts(self, split: Split = "train", n: int | None = None) -> list[dict[str, Any]]:
        """Rows `prompt`, `answer` (two digits), `level`, `id`; levels take turns, and no prompt is in both splits."""
        eval_ = split == "eval"
        if n is None:
            n = len(self.levels) * (self.size.held_out if eval_ else self.size.prompts)
            n = n if eval_ else self.options.prompts or n
        drawn = self.stream("prompts", split, 0 if eval_ else self.options.seed)
        return [self._row(p, f"{split}-{i}") for i, p in enumerate(islice(drawn, n))]

    def _row(self, problem: Problem, identity: str) -> dict[str, Any]:
        return {"prompt": problem.text, "answer": problem.answer, "level": problem.level, "id": identity}

    def reward(
        self, prompts: Texts, completions: Texts, completion_ids: Ids = None, truncated: Cut = None, **columns: Any
    ) -> list[float]:
        """1 for a completion that ends with the right answer, else 0; see `chains.correct`."""
        return chains.correct(prompts, completions, completion_ids, truncated, ending=self.ending)

    def audit(self, prompt: str, completion_ids: Sequence[int]) -> Audit:
        """Whether a completion's reward is 1, and if not, which token is to blame."""
        return chains.audit(parse_prompt(prompt), chains.symbols(completion_ids), self.ending)

    def sampling(self, seed: int, *, whole: bool = False) -> SamplingConfig:
        """How completions are sampled: up to the point that the reward looks at, or `whole`."""
        return SamplingConfig(max_new_tokens=self.max_new_tokens, stop_ids=(self.eos,), seed=seed)

    def items(self, drawn: Sequence[Problem]) -> list[PromptItem]:
        return [PromptItem(self.prompt_ids(p.text), row=p.text, raw=self._row(p, p.text)) for p in drawn]

    def pairs(
        self, split: Split = "train", n: int | None = None, slope: float | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """Right against wrong samples of the base model (rewards 1 and 0); completions that never end are left out.

        `slope` must be None: there is no label noise here. `eval` pairs, 200 at most, are about held-out problems.
        """
        message = f"world {self.name}: pairs are right against wrong; slope must be None, got {slope}"
        require(slope is None, RecipeError, message)
        seed = self.options.seed if seed is None else seed
        n = n or (self.n_pairs if split == "train" else min(200, self.n_pairs))
        key = (split, n, seed)
        if key not in self._pairs:
            about = {"chosen_reward": 1.0, "rejected_reward": 0.0}
            self._pairs[key] = [
                {"prompt": p.text, "chosen": self.decode(a), "rejected": self.decode(b), "id": f"{split}-{i}"} | about
                for i, (p, a, b) in enumerate(self.sampled_pairs("pairs", split, n, seed))
            ]
        return [dict(row) for row in self._pairs[key]]

    def sampled_pairs(self, purpose: str, split: Split, n: int, seed: int, *, whole: bool = True) -> list[Pair]:
        """Pairs of the base model's samples that end and have a text, `whole` or up to where the reward looks."""
        sampler = HFGenerate(self.reference)
        sampling = self.sampling(seed_of(purpose, split, seed), whole=whole)
        drawn = self.stream(purpose, split, seed)
        found: list[Pair] = []
        for _ in range(ROUNDS + n // 8):
            part = list(islice(drawn, min(CHUNK, n)))
            with single_thread():
                rollouts = sampler.sample(self.items(part), n=SAMPLES, sampling=sampling)
            for problem, group in zip(part, rollouts.groups, strict=True):
                # A pair is text: a completion that is nothing but its end has none.
                whole_texts = (tuple(c.ids) for c in group if not c.truncated and self.decode(c.ids))
                ended = [list(ids) for ids in dict.fromkeys(whole_texts)]
                right = [ids for ids in ended if self.audit(problem.text, ids).correct]
                wrong = [ids for ids in ended if not self.audit(problem.text, ids).correct]
                found += [(problem, a, b) for a, b in zip(right[:PER_PROMPT], wrong)]
            if len(found) >= n:
                return found[:n]
        raise TokengrainError(f"world {self.name}: the base model's samples gave {len(found)} pairs, not {n}")

    def advantages(self, batch: TokenBatch) -> Tensor:
        """−1 at the culprit of every completion whose reward is 0, and 0 elsewhere, `[N]`."""
        values = torch.zeros(len(batch.completion_ids))
        for start, problem, tokens in self._completions(batch):
            found = chains.audit(problem, tokens, self.ending)
            if found.index is not None:
                values[start + found.index] = -1.0
        return values[batch.counted.cpu()].to(batch.device)

    def decisions(self, batch: TokenBatch) -> Tensor:
        """Digits of totals and what follows them (a check or a separator), bool `[N]`."""
        values = torch.zeros(len(batch.completion_ids), dtype=torch.bool)
        for start, problem, tokens in self._completions(batch):
            steps, _ = chains.read(tokens, len(problem.steps), self.ending)
            end = len(chains.upto(tokens, self.ending))
            for step in steps:
                # From the first total (after label, operator, operand) to the separator after the one in force.
                values[start + step.first + 3 : start + min(step.total + 3, end)] = True
        return values[batch.counted.cpu()].to(batch.device)

    def _completions(self, batch: TokenBatch) -> Iterator[tuple[int, Problem, list[str]]]:
        """Place of the first token, problem and symbols of every completion."""
        found, starts = self.prompt_problems(batch), batch.completion_offsets.tolist()
        for c, group in enumerate(batch.group.tolist()):
            yield starts[c], found[group], chains.symbols(batch.completion(c).tolist())

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Samples of the base model on held-out problems, a right and a wrong one each, with the culprits."""
        samples = [
            Sample(self.prompt_ids(p.text), [Completion(right), Completion(wrong)], row=f"credit-{i}")
            for i, (p, right, wrong) in enumerate(
                self.sampled_pairs("credit", "eval", prompts or self.size.credit, seed, whole=False)
            )
        ]
        return self.truth_of(TokenBatch.from_samples(samples))

    def truth_of(self, batch: TokenBatch) -> CreditTruth:
        """Sampled completions with their culprits, and what was decided in them."""
        truth = self.advantages(batch)
        return CreditTruth(batch, truth, self.decisions(batch) | (truth < 0))

    @cached_property
    def _credit_truth(self) -> CreditTruth:
        return self.credit_truth()

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement with the culprits; `auc`: that a culprit has less credit than another decision token."""
        return recovered(credit, self._credit_truth, culprits=True)

    def evaluate(
        self,
        model: Any,
        n: int | None = None,
        seed: int = 0,
        *,
        k: int | None = None,
        prompts: int | None = None,
        split: Split = "eval",
        progress: Progress | None = None,
    ) -> dict[str, float | None]:
        """A policy (a PEFT model too) on n samples (None: k, or 16) of so many prompts (None: all) at temperature 1.

        k is the largest of pass@k, avg@k and maj@k; the numbers are those of `chain_metrics`.
        """
        n = n if n is not None else 16 if k is None else k
        drawn = [parse_prompt(row["prompt"]) for row in self.prompts(split, prompts)]
        sampler = HFGenerate(model)
        sampler.progress = progress
        with single_thread():
            rollouts = sampler.sample(self.items(drawn), n=n, sampling=self.sampling(seed_of("evaluate", seed)))
        return chains.chain_metrics(drawn, rollouts, self.ending, k)
