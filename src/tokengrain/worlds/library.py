"""The world `library`: documents in clusters, queries about them, clicks that are often wrong; what is best is known.

160 documents stand in 20 clusters of 8. A cluster has four keywords, a document two more of its own; words may be
keywords of several. A query has three words in any order: one of its document's own, one of its cluster's, and one at
random. A docid has three codes of 8: two for the cluster, one for the place in it. A click leads, with probability
`noise`, to another document of the cluster.

    P(d | q) ∝ Σ over the orders of q's words of P(own word | d) P(cluster's word | d)

ranks best, as all documents are equally likely. A token's credit is what it loses of the highest P(d | q) still ahead:
V(codes so far) = max P(d | q) over the documents whose docid begins with them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import RecipeError, fingerprint, require
from tokengrain.evaluation.credit import CreditTruth, recovered
from tokengrain.retrieval.corpus import prompt_ids
from tokengrain.retrieval.metrics import mean_metrics, ranking_metrics
from tokengrain.retrieval.search import Trie, search
from tokengrain.worlds.base_models import BOS, EOS, PAD, check_least, ensure_model, fast_tokenizer, model_folder

CLUSTERS, MEMBERS, WORDS = 20, 8, 120
SHARED, OWN, RADIX = 4, 2, 8
QUERIES = {"train": 12, "eval": 2}
WIDTH, LAYERS, HEADS = 64, 2, 4
UNK = "<unk>"
Split = Literal["train", "eval"]


@dataclass(frozen=True)
class LibraryOptions:
    """Options of the address `world://library?...`.

    Args:
        noise: probability that a click leads to another document of the cluster.
        seed: of the documents, queries and clicks, and of the base model's weights.
    """

    noise: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("library", self, {"seed": 0})
        message = f"world library: noise is {self.noise}; expected a probability, from 0 to 1"
        require(0 <= self.noise <= 1, RecipeError, message)


class LibraryWorld:
    """Documents, queries, clicks, and what is best. The base model knows nothing yet: its weights are random."""

    name = "library"
    encoder_decoder = True

    def __init__(self, options: LibraryOptions | None = None) -> None:
        self.options = options or LibraryOptions()
        draw = random.Random(f"library {self.options.seed}")
        self._shared, self._own = [], []  # keywords of each document's cluster, and its own
        for _ in range(CLUSTERS):
            keywords = draw.sample(range(WORDS), SHARED)
            for _ in range(MEMBERS):
                self._shared.append(keywords)
                self._own.append(draw.sample([w for w in range(WORDS) if w not in keywords], OWN))
        self._draw = draw.random()
        self.docids = [
            tuple(self.token(level, code) for level, code in enumerate((c // RADIX, c % RADIX, m)))
            for c in range(CLUSTERS)
            for m in range(MEMBERS)
        ]
        self.trie = Trie(self.docids)

    @property
    def fingerprint(self) -> str:
        return fingerprint(["library", 1, asdict(self.options)])

    @staticmethod
    def token(level: int, code: int) -> int:
        return 4 + WORDS + level * RADIX + code

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        codes = [f"<{level}:{code}>" for level in range(3) for code in range(RADIX)]
        vocabulary = [PAD, BOS, EOS, UNK, *(f"w{i}" for i in range(WORDS)), *codes]
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return fast_tokenizer(core, positions=64, unk_token=UNK)

    # ---- Rows ----

    def documents(self) -> list[dict[str, Any]]:
        """Rows with `key`, `text` (the keywords) and `docid` (token ids)."""
        texts = [" ".join(f"w{w}" for w in (*s, *o)) for s, o in zip(self._shared, self._own)]
        return [{"key": f"d{i}", "text": text, "docid": list(self.docids[i])} for i, text in enumerate(texts)]

    def prompts(self, split: Split = "train") -> list[dict[str, Any]]:
        """Rows with `query`, `positive` (the document that it is about) and, of training, `clicked`."""
        draw, rows = random.Random(f"library {split} {self._draw}"), []
        for d in [d for d in range(len(self.docids)) for _ in range(QUERIES[split])]:
            words = [draw.choice(self._own[d]), draw.choice(self._shared[d]), draw.randrange(WORDS)]
            draw.shuffle(words)
            row: dict[str, Any] = {"query": " ".join(f"w{w}" for w in words), "positive": f"d{d}"}
            if split == "train":
                others = [d - d % MEMBERS + m for m in range(MEMBERS) if m != d % MEMBERS]
                row["clicked"] = f"d{draw.choice(others) if draw.random() < self.options.noise else d}"
            rows.append(row)
        return rows

    def pairs(
        self, split: Split = "train", n: int | None = None, slope: float | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """Preference rows as text: the relevant document's codes, and those of another one of its cluster.

        `slope` must be None: the noise is that of clicks.
        """
        require(slope is None, RecipeError, f"world library: pairs are right; slope must be None, got {slope}")
        seed = self.options.seed if seed is None else seed
        rows, draw = self.prompts(split), random.Random(f"library pairs {split} {seed}")
        found = []
        for i, row in enumerate(rows[:n]):
            d = int(row["positive"][1:])
            other = d - d % MEMBERS + (d % MEMBERS + draw.randrange(1, MEMBERS)) % MEMBERS
            worth = self.posterior(row["query"])
            made: dict[str, Any] = {
                "prompt": row["query"],
                "chosen": self.text(d),
                "rejected": self.text(other),
                "id": f"{split}-{i}",
            }
            found.append(made | {"chosen_reward": float(worth[d]), "rejected_reward": float(worth[other])})
        return found

    def text(self, document: int) -> str:
        return " ".join(self.tokenizer.convert_ids_to_tokens(list(self.docids[document])))

    # ---- What is best ----

    def posterior(self, query: str) -> Tensor:
        """P(d | q), float64 `[documents]`."""
        words = [int(word[1:]) for word in query.split() if word.startswith("w")]
        worth = [
            sum((own.count(a) / OWN) * (shared.count(b) / SHARED) for a, b in itertools.permutations(words, 2))
            for own, shared in zip(self._own, self._shared)
        ]
        total = torch.tensor(worth, dtype=torch.float64)
        return total / total.sum() if float(total.sum()) else total.fill_(1 / len(worth))

    def best_ranking(self, query: str) -> list[list[str]]:
        """The documents' keys by P(d | q), those with equal ones together."""
        worth = [round(value, 12) for value in self.posterior(query).tolist()]
        return [[f"d{d}" for d, v in enumerate(worth) if v == value] for value in sorted(set(worth), reverse=True)]

    def advantages(self, batch: TokenBatch) -> Tensor:
        """What every counted token loses of the highest P(d | q) ahead of it, never above 0: `[N]`."""
        found = []
        for c, group in enumerate(batch.group.tolist()):
            query = str(self.tokenizer.decode(batch.prompt(group), skip_special_tokens=True))
            worth, prefix = self.posterior(query).tolist(), []
            values = [max(worth)]
            for token in batch.completion(c).tolist():
                prefix.append(token)
                values.append(
                    max((w for w, d in zip(worth, self.docids) if list(d[: len(prefix)]) == prefix), default=0.0)
                )
            found.append(torch.tensor(values, dtype=torch.float64).diff())
        return torch.cat(found)[batch.counted.cpu()].to(batch.device)

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Pairs of held-out queries with the exact credit; every token is a decision."""
        rows = self.pairs("eval", n=prompts, seed=seed)
        ids = prompt_ids(self.tokenizer, [row["prompt"] for row in rows], None)
        sides: list[Any] = [
            [self.tokenizer.convert_tokens_to_ids(r[s].split()) for s in ("chosen", "rejected")] for r in rows
        ]
        samples = [
            Sample(p, [Completion(d) for d in both], i, r) for i, (p, both, r) in enumerate(zip(ids, sides, rows))
        ]
        batch = TokenBatch.from_samples(samples, "encoder")
        return CreditTruth(batch, self.advantages(batch), torch.ones(batch.segments.total, dtype=torch.bool))

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        return recovered(credit, self.credit_truth())

    # ---- The base model, and what a model is worth ----

    def base_model(self) -> Path:
        """Folder of an untrained T5 with a vocabulary of words and codes."""
        config: dict[str, Any] = {
            "d_model": WIDTH,
            "d_kv": WIDTH // HEADS,
            "d_ff": 2 * WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
        }
        config |= {
            "vocab_size": self.token(3, 0),
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        }
        key = fingerprint(["library", 1, config, self.options.seed])

        def build(progress: Any) -> tuple[Any, dict[str, Any]]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.options.seed)
                return T5ForConditionalGeneration(T5Config(**config)), {"steps": 0}

        return ensure_model(model_folder("library", key), build, self.tokenizer, "world://library", 0)

    @cached_property
    def reference(self) -> Any:
        return AutoModelForSeq2SeqLM.from_pretrained(self.base_model()).requires_grad_(False).eval()

    def evaluate(
        self, model: Any, n: int | None = None, seed: int = 0, *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float | None]:
        """The exact ranking of all documents for the held-out queries, beside the best one; `n` must be None.

        Returns:
            `mrr` and `hit` (at 10) with those of the best ranking, and `mass`, the probability of docids.
        """
        require(n is None, RecipeError, f"world library: the ranking is exact, nothing is sampled; got {n} samples")
        rows = self.prompts("eval")
        ids = prompt_ids(self.tokenizer, [row["query"] for row in rows], None)
        found = search(model, ids, self.trie, beams=len(self.docids))
        key = {docid: f"d{i}" for i, docid in enumerate(self.docids)}
        rankings: list[Sequence[Any]] = [[key[one.docid] for one in each] for each in found]
        truth = [[row["positive"]] for row in rows]
        own = mean_metrics(ranking_metrics(rankings, truth, ("MRR@10", "Hit@10")))
        best = mean_metrics(ranking_metrics([self.best_ranking(r["query"]) for r in rows], truth, ("MRR@10", "Hit@10")))
        mass = sum(float(torch.tensor([one.score for one in each]).exp().sum()) for each in found) / len(found)
        values = {"mrr": own["MRR@10"], "hit": own["Hit@10"], "best_mrr": best["MRR@10"], "best_hit": best["Hit@10"]}
        return {**values, "mass": mass}
