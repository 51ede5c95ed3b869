"""The world `arithmetic` as one object: tokenizer, base model, prompts, reward, audit, exact credit, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.evaluation import CreditTruth, auc, recovery
from tokengrain.worlds.arithmetic import rewards
from tokengrain.worlds.arithmetic.audit import Audit, audit, symbols
from tokengrain.worlds.arithmetic.credit import culprits, decisions
from tokengrain.worlds.arithmetic.evaluation import chain_metrics
from tokengrain.worlds.arithmetic.model import ChainModel
from tokengrain.worlds.arithmetic.options import ArithmeticOptions
from tokengrain.worlds.arithmetic.pairs import sampled_pairs, written_pairs
from tokengrain.worlds.arithmetic.problems import Problem, Split, parse_prompt, problem_stream, rng_of, seed_of
from tokengrain.worlds.threads import single_thread

if TYPE_CHECKING:
    from tokengrain.rollout import PromptItem, SamplingConfig

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
        return rewards.correct(prompts, completions, completion_ids, truncated, ending=self.ending)

    def format_reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """1 for a completion with all steps and an ending, right or wrong; see `rewards.well_formed`."""
        return rewards.well_formed(prompts, completions, completion_ids, truncated, ending=self.ending)

    def audit(self, prompt: str, completion_ids: Sequence[int]) -> Audit:
        """Whether a completion's reward is 1, and if not, which token is to blame.

        Raises:
            DataError: not a prompt of this world.
        """
        return audit(parse_prompt(prompt), symbols(completion_ids), self.ending)

    # -- chains, right and wrong ---------------------------------------------------------------------

    def sampling(self, seed: int, *, whole: bool = False) -> SamplingConfig:
        """How completions are sampled: up to the point that the reward looks at, or `whole`."""
        from tokengrain.rollout import SamplingConfig

        return SamplingConfig(max_new_tokens=self.max_new_tokens, stop_ids=(self.eos,), seed=seed)

    def items(self, drawn: Sequence[Problem]) -> list[PromptItem]:
        """Problems as a sampler takes them, each with its row."""
        from tokengrain.rollout import PromptItem

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
        from tokengrain.rollout import HFGenerate

        n = n if n is not None else 16 if k is None else k
        rows = self.prompts(split, prompts)
        drawn = [parse_prompt(row["prompt"]) for row in rows]
        with single_thread():
            sampling = self.sampling(seed_of("evaluate", seed))
            sampler = HFGenerate(model)
            sampler.progress = progress
            rollouts = sampler.sample(self.items(drawn), n=n, sampling=sampling)
        return chain_metrics(drawn, rollouts, self.ending, k)
