"""Heat maps of real text under every credit source, side by side: `python -m benchmarks.real_gallery`.

Writes docs/images/real-*.svg. Needs the guides that `benchmarks.real_credit` trained.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.picture import LINE, MARGIN, WHAT, svg_of, words
from benchmarks.real_credit import SOURCES, Kept, Study
from tokengrain.batch import TokenBatch
from tokengrain.corruption import Corrupted, corrupt
from tokengrain.data.dataset import prepare_sft
from tokengrain.data.rows import load_rows
from tokengrain.data.tokens import token_texts
from tokengrain.errors import write_text
from tokengrain.report.html import colour_scale, pieces
from tokengrain.report.rows import Side

PROBLEMS = (28, 23, 59, 127, 71, 126, 131)  # of GSM8K's test problems: short, and told in words
SHOWN_OF = {"swap": 2, "random": 0}  # corruption: which of the problems
SHOWN = (
    "surprise", "lookahead", "entropy", "contrastive, prefix", "contrastive, general", "gradient_attribution",
    "guide, 4 steps", "guide, 25 steps",
)  # fmt: skip


def answers(file: Path, study: Study) -> TokenBatch:
    """The problems' own solutions, without the marks of a calculator."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        given = [json.loads(line) for line in lines]
    rows = [
        {
            "prompt": [{"role": "user", "content": given[i]["question"]}],
            "completion": [{"role": "assistant", "content": _plain(given[i]["answer"])}],
        }
        for i in PROBLEMS
    ]
    return TokenBatch.from_samples(list(prepare_sft(load_rows(rows), study.tokenizer)))


def _plain(answer: str) -> str:
    return re.sub(r"<<.*?>>", "", answer).split("\n####")[0]


def standardised(credit: Tensor) -> list[float]:
    """In standard deviations from the answer's mean: many sources have an order and no zero."""
    spread = float(credit.std()) or 1.0
    return ((credit - credit.mean()) / spread).tolist()


def picture(data: Corrupted, credit: Mapping[str, Tensor], study: Study) -> str:
    """One corrupted answer under every source; first which tokens were changed."""
    batch, y, parts = data.corrupted, MARGIN, list[str]()
    texts = token_texts(study.tokenizer, batch.completion(0).tolist())
    question = study.tokenizer.decode(batch.prompt(0)).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
    for line in wrap(question, 80):
        y += 18
        parts.append(f'<text class="what" x="{MARGIN}" y="{y}">{escape(line)}</text>')
    shown = {name: standardised(values) for name, values in credit.items()}
    for name, values in ({"changed tokens": (-data.marked.float()).tolist()} | shown).items():
        y += WHAT + 6
        parts.append(f'<text class="head" x="{MARGIN}" y="{y}">{escape(name)}</text>')
        drawn, lines = words(pieces(Side(texts, values), colour_scale(values)), y + WHAT)
        parts.append(drawn)
        y += lines * LINE
    return svg_of(parts, y + MARGIN, "credit of an answer under several sources")


def one_of(data: Corrupted, index: int) -> Corrupted:
    """One of the answers alone."""
    clean, corrupted = (batch.select([index]) for batch in (data.clean, data.corrupted))
    return Corrupted(clean, corrupted, data.corrupted.segments.split(data.marked)[index], 0)


def main(
    pairs: Annotated[Path, typer.Option(help="HH's pairs: what the guides learn from")] = Path(
        "../shared/data/hh-harmless-pairs.jsonl.gz"
    ),
    problems: Path = Path("../shared/data/gsm8k-test.jsonl.gz"),
    runs: Path = Path("runs/real"),
    output: Path = Path("docs/images"),
) -> None:
    """Draw corrupted solutions of GSM8K under every source."""
    torch.set_num_threads(1)
    study = Study(pairs, runs)
    batch = answers(problems, study)
    for how, index in SHOWN_OF.items():
        data = one_of(corrupt(batch, study.tokenizer, how=how, tokens=2, seed=0), index)
        kept = Kept(study.model)
        credit = {name: SOURCES[name](study, kept, 0)(data.corrupted).detach() for name in SHOWN}
        write_text(output / f"real-{how}.svg", picture(data, credit, study))


if __name__ == "__main__":
    typer.run(main)
