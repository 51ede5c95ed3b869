"""DDRO on the world `library`: does it rank better than the SFT model, than as long an SFT, and at what price.

Clicks lead to another document of the cluster in 40 % of the training queries; DDRO's pairs have the right document and
one that the SFT model ranks high. Rankings are exact. Specification: ddro.md, section 7.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.tiny_lm import copy_of
from tokengrain.batch import Segments
from tokengrain.loss import Counts, make_normaliser
from tokengrain.methods.ddro import ddro_loss
from tokengrain.methods.dpo import sft_loss
from tokengrain.retrieval.corpus import prompt_ids
from tokengrain.retrieval.search import search
from tokengrain.retrieval.words import BM25
from tokengrain.worlds import load_world


@dataclass(frozen=True)
class Scale:
    """Steps and sizes."""

    sft_steps: int = 1200
    steps: int = 200
    batch: int = 64
    sft_rate: float = 1e-3
    rate: float = 3e-4
    top: int = 8


@dataclass
class Context:
    """What the arms of a seed share. `clicked` and `right` are documents by number, one per training query."""

    seed: int
    scale: Scale
    world: Any
    prompts: Tensor
    docids: Tensor
    clicked: list[int]
    right: list[int]
    model: Any
    negatives: dict[str, list[list[int]]] = field(default_factory=dict)

    def draws(self, steps: int) -> Iterator[tuple[list[int], random.Random]]:
        """Training queries of each step, the same for every arm."""
        draw = random.Random(f"{self.seed} {steps}")
        for _ in range(steps):
            yield [draw.randrange(len(self.right)) for _ in range(self.scale.batch)], draw

    def logps(self, model: Any, queries: list[int], *documents: list[int]) -> Tensor:
        """Log-probabilities `[N]` of the docids of one document per query, or of several, each query's together."""
        docids = torch.stack([self.docids[listed] for listed in documents], 1)
        count, length = len(documents), docids.shape[-1]
        states = model.get_encoder()(input_ids=self.prompts[queries]).last_hidden_state
        flat = docids.view(-1, length)
        inputs = torch.nn.functional.pad(flat[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
        states = (states.repeat_interleave(count, 0),)
        logits = model(encoder_outputs=states, decoder_input_ids=inputs, use_cache=False).logits
        return logits.log_softmax(-1).gather(2, flat[..., None]).flatten()

    def segments(self, completions: int) -> Segments:
        return Segments.from_lengths([self.docids.shape[1]] * completions)

    def sft(self, model: Any, steps: int, documents: list[int], rate: float) -> None:
        """Fine-tune on one document per query."""

        def losses() -> Iterator[Tensor]:
            for queries, _ in self.draws(steps):
                output = sft_loss(
                    self.logps(model, queries, [documents[q] for q in queries]), self.segments(len(queries))
                )
                assert output.token_losses is not None
                yield output.token_losses.mean()

        train(model, losses, rate)

    def ddro(self, model: Any, source: str, **settings: Any) -> None:
        """Train on pairs: the right document before one of the source's."""

        def losses() -> Iterator[Tensor]:
            normalise = make_normaliser("mean")
            for queries, draw in self.draws(self.scale.steps):
                pairs = [self.right[q] for q in queries], [draw.choice(self.negatives[source][q]) for q in queries]
                segments = self.segments(2 * len(queries))
                with torch.no_grad():
                    ref_logps = self.logps(self.model, queries, *pairs)
                output = ddro_loss(self.logps(model, queries, *pairs), segments, ref_logps=ref_logps, **settings)
                yield normalise(output, Counts.of(segments, pairs=True))

        train(model, losses, self.scale.rate)


def train(model: Any, losses: Callable[[], Iterator[Tensor]], rate: float) -> None:
    """Adam without schedule or clipping."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for loss in losses():
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def prepare(seed: int, scale: Scale) -> Context:
    world: Any = load_world(f"world://library?seed={seed}")
    rows = world.prompts()
    prompts = torch.tensor(prompt_ids(world.tokenizer, [row["query"] for row in rows], None))
    clicked, right = ([int(row[kind][1:]) for row in rows] for kind in ("clicked", "positive"))
    model = copy_of(world.reference)
    context = Context(seed, scale, world, prompts, torch.tensor(world.docids), clicked, right, model)
    context.sft(model, scale.sft_steps, clicked, scale.sft_rate)
    number = {docid: i for i, docid in enumerate(world.docids)}
    found = search(model, prompts.tolist(), world.trie, beams=scale.top)
    bm25 = BM25([document["text"].split() for document in world.documents()])
    context.negatives = {
        "model": [[number[one.docid] for one in each] for each in found],
        "bm25": [bm25.ranking(row["query"].split())[: scale.top] for row in rows],
    }
    for source, listed in context.negatives.items():
        context.negatives[source] = [[d for d in each if d != r] for each, r in zip(listed, right, strict=True)]
    return context


def run(context: Context, arm: Arm) -> Measures:
    scale, settings = context.scale, dict(arm.settings)
    model = copy_of(context.model)
    if "labels" in settings:
        labels = context.clicked if settings["labels"] == "clicked" else context.right
        context.sft(model, scale.steps, labels, scale.rate)
    elif settings:
        context.ddro(model, settings.pop("negatives"), **settings)
    found = context.world.evaluate(model)
    return {name: found[name] for name in ("mrr", "hit", "best_mrr", "mass")}


SFT, CLICKS, CLEAN = "SFT", "SFT continued on clicks", "SFT continued on the right documents"
DDRO, LOW, NLL = "DDRO", "DDRO β 0.1", "DDRO + 0.3 NLL"
WORDS = "DDRO, negatives of BM25"


def _ddro(name: str, negatives: str = "model", **settings: float) -> Arm:
    return Arm(name, "ddro", {"negatives": negatives, "beta": 0.4, **settings})


_spec = Source("ddro", "ddro.md 7; arXiv 2504.05181")
CLAIMS = (
    _spec.sure("DDRO ranks better than the SFT model", DDRO, SFT, "mrr", "above", reported="+0.03 to +0.05"),
    # Says the source of 300 steps; after these 200 one seed has less.
    _spec.claim("by 0.02 in every seed", DDRO, SFT, "mrr", "above", threshold=0.02, judged="every seed"),
    _spec.sure("and than as long an SFT on the same clicks", DDRO, CLICKS, "mrr", "above", judged="mean"),
    _spec.claim(
        "and than as long an SFT on the right documents",
        DDRO,
        CLEAN,
        "mrr",
        "above",
        reported="−0.01 to −0.03: not expected",
    ),
    _spec.sure("Probability leaves the docids", DDRO, SFT, "mass", "below"),
    _spec.sure("but stays above one half", DDRO, None, "mass", "above", threshold=0.5, reported="0.87–0.89"),
    _spec.sure("A smaller β loses more of it", LOW, DDRO, "mass", "below", reported="0.72–0.78"),
    _spec.claim("The NLL term keeps it", NLL, DDRO, "mass", "above", reported="0.93–0.94"),
    _spec.claim(
        "and does no harm to the ranking", NLL, DDRO, "mrr", "above", judged="mean", reported="+0.003 to +0.014"
    ),
    _spec.claim("Negatives of the model's own ranking beat BM25's", DDRO, WORDS, "mrr", "above"),
)
GROUP = Group(
    "library",
    "DDRO: the world library",
    "160 documents in 20 clusters of 8; docids of three codes; 1,920 training queries, 40 % of whose clicks lead to "
    "another document of the cluster, 320 held-out ones. A T5 of 0.17 million parameters: SFT on clicks, 1,200 steps "
    "of 64, Adam 1e-3; then 200 steps of 64, Adam 3e-4, β 0.4, the right document before one of the SFT model's first "
    "8 (or of BM25's). MRR and hits at 10 of the exact ranking; mass is the probability that the model writes "
    "a docid.",
    (Scale(), Scale(sft_steps=4, steps=2, batch=8)),
    (
        Arm(SFT, "sft"),
        Arm(CLICKS, "sft", {"labels": "clicked"}),
        Arm(CLEAN, "sft", {"labels": "right"}),
        _ddro(DDRO),
        _ddro(LOW, beta=0.1),
        _ddro(NLL, nll_weight=0.3),
        _ddro(WORDS, "bm25"),
    ),
    CLAIMS,
    prepare,
    run,
    {"mrr": "MRR@10", "hit": "hit@10", "best_mrr": "best MRR@10 there is", "mass": "mass on docids"},
)
