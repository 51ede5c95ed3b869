"""The world `stories` as one object: tokenizer, base model, data, exact credit, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.evaluation import CreditTruth, Frontier, recovery
from tokengrain.files import fingerprint
from tokengrain.worlds.stories import data, exact
from tokengrain.worlds.stories.base_model import ensure_base_model
from tokengrain.worlds.stories.credit import CreditKind, WorldCredit, decision_states, walk_batch
from tokengrain.worlds.stories.evaluation import completion_logps, policy_metrics, rollout
from tokengrain.worlds.stories.grammar import Grammar, Prompt
from tokengrain.worlds.stories.lexicon import SIZES
from tokengrain.worlds.stories.tabular import TabularModel
from tokengrain.worlds.stories.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REGIMES = {"clean": (4000, 1.0), "noisy": (1000, 0.3)}
"""Pairs and slope of the label noise: of pairs whose true rewards differ, 88 % and 69 % are labelled in their order."""
EVAL_PAIRS = 200
CREDIT_SAMPLES = 50
"""Base samples per prompt on which credit is compared with the truth."""


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
        for name, allowed in (("regime", REGIMES), ("size", SIZES)):
            if (value := getattr(self, name)) not in allowed:
                raise RecipeError(f"world stories: {name} is {value!r}; expected one of {', '.join(allowed)}")
        for name, least in (("pairs", 1), ("slope", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise RecipeError(f"world stories: {name} is {value}; expected at least {least}")


class StoriesWorld:
    """See the package's description; made by `load_world("world://stories")`."""

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
        """Identifies the grammar and the data's options."""
        return fingerprint([self.grammar.fingerprint, asdict(self.options)])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.grammar)

    def base_model(self) -> Path:
        """Folder of the pre-trained base model; trained on first use (about half a minute of one core)."""
        return ensure_base_model(self.grammar)

    @cached_property
    def reference(self) -> Any:
        """The base model, loaded once; frozen."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base_model(), dtype=torch.float32).requires_grad_(False).eval()

    @cached_property
    def frontier(self) -> Frontier:
        """The best mean true reward at every mean KL (nats per completion)."""
        return exact.frontier(self.grammar)

    def optimal_model(self, beta: float) -> TabularModel:
        """The policy that maximises E[R] − β·KL, exactly; `beta` infinite is the grammar's base."""
        edges = self.grammar.edge_logp if beta == float("inf") else exact.optimal_logp(self.grammar, beta)
        return TabularModel(self.grammar, edges)

    # -- prompts and data ----------------------------------------------------------------------------

    @property
    def prompts(self) -> list[str]:
        """The plain prompts, as text."""
        return [p.text for p in self.grammar.plain]

    contrastive_templates: ClassVar[dict[str, str]] = {
        "name": "stories",
        "better": "write kindly{prompt}",
        "worse": "write rudely{prompt}",
        "drop_prefix": "write",
    }
    """For contrastive prompting: the two instructions that the base model knows, put into the prompt."""

    def pairs(
        self,
        split: data.Split = "train",
        n: int | None = None,
        slope: float | None = None,
        seed: int | None = None,
    ) -> list[dict[str, Any]]:
        """Preference pairs labelled with the true reward; see `data.preference_pairs` for the rows.

        Args:
            split: `eval` pairs come from another random stream than `train` pairs of any seed.
            n, slope, seed: default to the world's options; `eval` has 200 pairs.
        """
        n = n if n is not None else (self.n_pairs if split == "train" else EVAL_PAIRS)
        slope, seed = self.slope if slope is None else slope, self.options.seed if seed is None else seed
        return data.preference_pairs(self.grammar, n, slope, data.random_stream("pairs", split, seed), split)

    def sft_rows(
        self, split: data.Split = "train", n: int | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows `prompt`, `completion`, `id`, `reward`: base samples."""
        n = n if n is not None else (self.n_pairs if split == "train" else EVAL_PAIRS)
        seed = self.options.seed if seed is None else seed
        prompts = [self.grammar.plain[i % len(self.grammar.plain)] for i in range(n)]
        drawn = data.sample(self.grammar, prompts, data.random_stream("sft", split, seed))
        return [
            {
                "prompt": prompt.text,
                "completion": self.grammar.decode(drawn.completion_ids(i)),
                "id": f"{split}-{i}",
                "reward": float(drawn.rewards[i]),
            }
            for i, prompt in enumerate(prompts)
        ]

    def annotated_pairs(
        self, split: data.Split = "train", credit: Callable[[TokenBatch], Tensor] | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """`pairs` with `chosen_token_rewards` and `rejected_token_rewards`, one per token, `<end>` included.

        Args:
            credit: a credit source; by default the exact advantage.
            options: of `pairs`.
        """
        rows = self.pairs(split, **options)
        values = self._credit_in_parts(credit or self.credit(), self.token_batch(rows))
        for i, row in enumerate(rows):
            row["chosen_token_rewards"] = values[2 * i].tolist()
            row["rejected_token_rewards"] = values[2 * i + 1].tolist()
        return rows

    def token_batch(self, rows: Sequence[dict[str, Any]]) -> TokenBatch:
        """Pairs as one batch of token ids, `<s>` before the prompts and `<end>` after the completions."""
        encode = self.grammar.encode
        samples = [
            Sample(
                prompt_ids=[self.grammar.bos, *encode(row["prompt"])],
                completions=[Completion([*encode(row[k]), self.grammar.eos]) for k in ("chosen", "rejected")],
                row=row["id"],
                raw=row,
            )
            for row in rows
        ]
        return TokenBatch.from_samples(samples)

    # -- credit --------------------------------------------------------------------------------------

    def credit(self, kind: CreditKind = "advantage", **options: Any) -> WorldCredit:
        """A credit source that reads the grammar; see `WorldCredit` for kinds and options."""
        return WorldCredit(self.grammar, kind, **options)

    def oracle_credit(self, beta: float = 1.0) -> WorldCredit:
        """The exact soft advantage of every token at temperature `beta`."""
        return self.credit("advantage", beta=beta)

    def advantages(self, batch: TokenBatch) -> Tensor:
        """The exact soft advantage (β = 1) of every counted token, `[N]`."""
        return self.oracle_credit()(batch)

    def true_rewards(self, batch: TokenBatch) -> Tensor:
        """True reward of every completion, `[C]`."""
        return batch.segments.sum(self.credit("reward")(batch).to(batch.device))

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Base samples as pairs, with the exact advantage and the decision mask of every token.

        Args:
            prompts: how many pairs (None: `CREDIT_SAMPLES` completions for each plain prompt).
            seed: of the samples, which are never those of the training pairs.
        """
        n = CREDIT_SAMPLES * len(self.grammar.plain) // 2 if prompts is None else prompts
        batch = self.token_batch(self.pairs("eval", n=n, seed=seed))
        advantage = exact.advantages(self.grammar, exact.soft_values(self.grammar, 1.0))
        decides = decision_states(self.grammar, advantage)
        walk, ids, counted = walk_batch(self.grammar, batch)
        tables = walk.tables[:, None]
        values, masked = advantage[tables, walk.states, ids], decides[tables, walk.states]
        return CreditTruth(batch, values[counted], masked[counted])

    @cached_property
    def _credit_truth(self) -> CreditTruth:
        return self.credit_truth()

    def _credit_in_parts(self, credit: Callable[[TokenBatch], Tensor], batch: TokenBatch) -> list[Tensor]:
        """Credit per completion, computed over parts of the batch."""
        out: list[Tensor] = []
        for start in range(0, batch.n_prompts, 64):
            part = batch.select(range(start, min(start + 64, batch.n_prompts)))
            out += part.segments.split(credit(part).detach().cpu())
        return out

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement of a credit source with the exact advantage on base samples; see `recovery`."""
        batch, truth, decides = self._credit_truth
        return recovery(torch.cat(self._credit_in_parts(credit, batch)), truth, decides)

    # -- evaluation ----------------------------------------------------------------------------------

    def _eval_prompts(self, n: int) -> list[Prompt]:
        return [prompt for prompt in self.grammar.plain for _ in range(n)]

    def _base_sample_rewards(self, reference: Any, n: int, seed: int) -> Tensor:
        own = reference is self.__dict__.get("reference")
        if own and (n, seed) in self._base_rewards:
            return self._base_rewards[n, seed]
        # Another stream than the policy's: with the same one both would draw alike.
        sampled = rollout(reference, self.grammar, self._eval_prompts(n), seed=seed + 1_000_003).true_rewards
        if own:
            self._base_rewards[n, seed] = sampled
        return sampled

    def evaluate(
        self,
        model: Any,
        n: int | None = None,
        seed: int = 0,
        *,
        reference: Any = None,
        credit: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float | None]:
        """Evaluate a policy on its own samples to the plain prompts.

        Args:
            model: a causal language model with this world's tokenizer (a PEFT model too).
            n: samples per prompt (None: 64).
            seed: of the samples; torch's global random state is not touched.
            reference: what KL, win rate and log-ratio are taken against; the base model by default.
            credit: also compare the policy's log-ratio with the exact advantage.
            progress: called with how many samples have ended, and how many there will be.

        Returns:
            Numbers, see `policy_metrics`; with `credit` also `credit_auc`, `credit_spearman` (None: undefined).
        """
        n = 64 if n is None else n
        if n < 1:
            raise RecipeError(f"world stories: n is {n}; expected at least 1 sample per prompt")
        reference = self.reference if reference is None else reference
        sampled = rollout(model, self.grammar, self._eval_prompts(n), seed, progress)
        ref_logps = completion_logps(reference, self.grammar, sampled.prompts, sampled.ids)
        base_rewards = self._base_sample_rewards(reference, n, seed)
        metrics: dict[str, float | None] = {}
        metrics |= policy_metrics(self.grammar, self.frontier, sampled, ref_logps, base_rewards)
        if credit:
            found = self.credit_recovery(lambda batch: self.log_ratio(model, reference, batch))
            metrics |= {f"credit_{k}": None if math.isnan(found[k]) else found[k] for k in ("spearman", "auc")}
        return metrics

    def log_ratio(self, model: Any, reference: Any, batch: TokenBatch) -> Tensor:
        """log π(token) − log π_ref(token) of every counted token of plain-prompt completions, `[N]`."""
        prompts = [self.grammar.parse_prompt(batch.prompt(int(g)).tolist()) for g in batch.group]
        _, ids, counted = walk_batch(self.grammar, batch)
        of = [
            completion_logps(m, self.grammar, prompts, ids).gather(-1, ids[..., None]).squeeze(-1)
            for m in (model, reference)
        ]
        return (of[0] - of[1])[counted]
