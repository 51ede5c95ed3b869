"""Mismatch metrics and importance weights, by hand; prompts."""

import math

import pytest
import torch

from tests.credit.small import tokenizer
from tests.data.tokenizers import CHATML, gpt2_like
from tokengrain.batch import Segments
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import Report
from tokengrain.errors import DataError, ModelError, RolloutError
from tokengrain.methods._clipped import importance_weights, sampler_mismatch
from tokengrain.rollout.sampler import encode_prompts

SEGMENTS = Segments.from_lengths([2, 0, 1])
SAMPLER = torch.log(torch.tensor([0.5, 0.25, 0.2], dtype=torch.float64))
TRAINER = torch.log(torch.tensor([0.25, 0.75, 0.1], dtype=torch.float64))  # ratios 1/2, 3, 1/2


def test_metrics():
    found = sampler_mismatch(SAMPLER, TRAINER, SEGMENTS)
    two, three = math.log(2), math.log(3)
    want = {
        "mean_abs": (two + three + two) / 3,
        "max_abs": three,
        "k1": (two - three + two) / 3,
        "k3": ((0.5 - 1 + two) + (3 - 1 - three) + (0.5 - 1 + two)) / 3,
        "max_ratio": 3,
        "min_ratio": 0.5,
        "max_sequence_ratio": 1.5,
    }
    assert found == pytest.approx({f"mismatch/{k}": v for k, v in want.items()})
    same = sampler_mismatch(SAMPLER, SAMPLER, SEGMENTS)
    assert all(v == (1 if "ratio" in k else 0) for k, v in same.items())


def test_k3_estimates_the_divergence():
    torch.manual_seed(0)
    p, q = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True)
    segments = Segments.from_lengths([len(tokens)])
    found = sampler_mismatch(p[tokens], q[tokens], segments)
    kl = float((p.exp() * (p - q)).sum())
    assert found["mismatch/k1"] == pytest.approx(kl, rel=0.05)
    assert found["mismatch/k3"] == pytest.approx(kl, rel=0.05)


def test_weights():
    weights = lambda kind, cap=2.0: importance_weights(SAMPLER, TRAINER, SEGMENTS, kind=kind, cap=cap).tolist()  # noqa: E731
    assert weights(kind="token") == pytest.approx([0.5, 2, 0.5])
    assert weights(kind="token", cap=10) == pytest.approx([0.5, 3, 0.5])
    assert weights(kind="sequence") == pytest.approx([1.5, 1.5, 0.5])
    assert weights(kind="sequence", cap=1.2) == pytest.approx([1.2, 1.2, 0.5])
    far = importance_weights(SAMPLER - 1000, TRAINER.requires_grad_(), SEGMENTS, kind="sequence", cap=2.0)
    assert far.tolist() == pytest.approx([2, 2, 2])
    assert not far.requires_grad


def test_bad_input():
    with pytest.raises(RolloutError, match="shape"):
        sampler_mismatch(SAMPLER[:2], TRAINER, SEGMENTS)
    with pytest.raises(RolloutError, match=r"nan for token 2 \(completion 2\)"):
        importance_weights(SAMPLER, torch.tensor([0.0, 0.0, math.nan]), SEGMENTS, kind="token", cap=2.0)
    with pytest.raises(ValueError, match="kind must be 'token' or 'sequence', got 'tis'"):
        importance_weights(SAMPLER, TRAINER, SEGMENTS, kind="tis", cap=2.0)


def test_prompts_of_text():
    tok = tokenizer()
    rows = [{"prompt": "write about the sea", "answer": 1}, {"prompt": "sun", "id": "x", "answer": 2}]
    items = encode_prompts(rows, tok)
    assert [i.ids for i in items] == [tok(r["prompt"])["input_ids"] for r in rows]
    assert [i.row for i in items] == [0, "x"]
    assert items[1].raw == rows[1]
    again = encode_prompts([{"q": "the sea"}], tok, template="write about {q}")
    assert again[0].ids == items[0].ids
    assert encode_prompts([{"q": "<s> sun"}], tok, column="q")[0].ids == items[1].ids, "BOS is not put in twice"
    short = encode_prompts(rows, tok, TokenizeConfig(max_prompt_length=3))
    assert short[0].ids == [items[0].ids[0], *items[0].ids[-2:]]


def test_prompts_of_messages():
    tok = gpt2_like()
    config = TokenizeConfig(chat_template=CHATML)
    messages = [{"role": "user", "content": "the sky"}]
    item = encode_prompts([{"prompt": messages}], tok, config)[0]
    assert tok.decode(item.ids) == "<|im_start|>user\nthe sky<|im_end|>\n<|im_start|>assistant\n"
    assert encode_prompts([{"prompt": "the sky"}], tok, config, chat=True)[0].ids == item.ids


def test_bad_prompts():
    tok = tokenizer()
    for rows, message in (
        ([{"prompt": "sea"}, {"prompt": " "}], "p.jsonl: row 1: field 'prompt': is empty"),
        ([{"question": "sea"}], r"column is missing; .* or made from these by `data.columns`: \{prompt: question\}"),
        ([{"prompt": 3}], "is of type int"),
    ):
        with pytest.raises(DataError, match=message):
            encode_prompts(rows, tok, file="p.jsonl")
    with pytest.raises(DataError, match=r"template does not fit the row \(KeyError"):
        encode_prompts([{"prompt": "sea"}], tok, template="{question}")
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompts([{"prompt": "sea"}], tok, chat=True)
    report, lenient = Report(), TokenizeConfig(on_invalid="skip", max_prompt_length=1)
    skipped = encode_prompts([{"prompt": ""}, {"prompt": "sea sky"}], tok, lenient, file="p.jsonl", report=report)
    assert [i.row for i in skipped] == [1]
    assert (report.kept, sum(report.skipped.values()), report.prompts_cut) == (1, 1, 1)
    assert all(message.startswith("p.jsonl: row 0") for message in report.first.values())
