"""Search among docids, against transformers' beam search and teacher forcing."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import transformers

from tokengrain.errors import DataError
from tokengrain.retrieval.search import Trie, beam_search, search

VOCABULARY, END = 60, 1


def tiny(family: str = "t5", seed: int = 0, vocabulary: int = VOCABULARY, width: int = 16) -> Any:
    torch.manual_seed(seed)
    if family == "bart":
        config: Any = transformers.BartConfig(
            vocab_size=vocabulary, d_model=width, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, eos_token_id=END,
            bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, dropout=0.0,
        )  # fmt: skip
        model: Any = transformers.BartForConditionalGeneration(config)
    else:
        config = transformers.T5Config(
            vocab_size=vocabulary, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=END,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else None
    return model.eval()


def docids(
    count: int, seed: int = 0, vocabulary: int = VOCABULARY, shortest: int = 1, longest: int = 4
) -> list[tuple[int, ...]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    ids = [tuple(torch.randint(3, vocabulary, (n,), generator=g).tolist()) for n in lengths]
    return sorted({(*d[:-1], 3 + d[-1] % 9, END) for d in ids})


PROMPTS = [[5, 9, 12, 4, END], [7, 7, END], [30, 8, 22, 11, 19, 40, END]]


def teacher_forced(model: Any, prompt: list[int], docid: tuple[int, ...]) -> float:
    start = model.config.decoder_start_token_id
    inputs = torch.tensor([[start, *docid[:-1]]])
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([prompt]), decoder_input_ids=inputs).logits[0].log_softmax(-1)
    return float(logps.gather(1, torch.tensor(docid)[:, None]).sum())


def generated(
    model: Any, prompt: list[int], trie: Trie, beams: int, penalty: float
) -> list[tuple[tuple[int, ...], float]]:
    out = model.generate(
        torch.tensor([prompt]),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=8,
        length_penalty=penalty,
        early_stopping=False,
        prefix_allowed_tokens_fn=trie.allowed_fn(pad_id=0),
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [tuple(row[1 : row.index(END) + 1]) for row in out.sequences.tolist()]
    # Beams that ran out of docids come back as rubbish at -1e9.
    return [(row, score) for row, score in zip(rows, out.sequences_scores.tolist()) if score > -1e8]


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("length", ["sum", "mean"])
@pytest.mark.parametrize("beams", [2, 5, 20])
def test_docids_and_scores_are_those_of_generate(family: str, length: Any, beams: int) -> None:
    model, trie = tiny(family), Trie(docids(150))
    found = search(model, PROMPTS, trie, beams=beams, length=length)
    for prompt, mine in zip(PROMPTS, found, strict=True):
        theirs = generated(model, prompt, trie, beams, penalty=0.0 if length == "sum" else 1.0)
        assert [f.docid for f in mine] == [docid for docid, _ in theirs]
        assert [f.score for f in mine] == pytest.approx([score for _, score in theirs], abs=1e-5)


@pytest.mark.parametrize("queries_at_once", [1, 2, 3])
def test_as_many_beams_as_docids_give_all_with_their_own_scores(queries_at_once: int) -> None:
    model, trie = tiny(), Trie(docids(40))
    for prompt, mine in zip(
        PROMPTS, search(model, PROMPTS, trie, beams=40, queries_at_once=queries_at_once), strict=True
    ):
        assert {f.docid for f in mine} == set(trie)
        assert [f.score for f in mine] == sorted([f.score for f in mine], reverse=True)
        assert [f.score for f in mine] == pytest.approx(
            [teacher_forced(model, prompt, f.docid) for f in mine], abs=1e-5
        )
        assert sum(math.exp(f.score) for f in mine) < 1


def test_renormalised_probabilities_add_up_to_one() -> None:
    trie = Trie(docids(40))
    for mine in search(tiny(), PROMPTS, trie, beams=40, renormalise=True):
        assert sum(math.exp(f.score) for f in mine) == pytest.approx(1, abs=1e-5)


def test_docids_of_one_length_need_no_end_token() -> None:
    model, trie = tiny(), Trie([(10 + i, 20 + j) for i in range(5) for j in range(5)])
    (mine,) = search(model, PROMPTS[:1], trie, beams=25)
    assert len(mine) == 25
    assert mine[0].score == pytest.approx(max(teacher_forced(model, PROMPTS[0], d) for d in trie), abs=1e-5)


def test_a_narrow_beam_can_miss_the_best() -> None:
    table = {(0,): [-9, -9, -0.1, -2.4], (0, 2): [-3.0, -3.0, -9, -9], (0, 3): [-0.01, -9, -9, -9]}
    prefixes: list[tuple[int, ...]] = [()]

    def step(parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        prefixes[:] = [(*prefixes[b], t) for b, t in zip(parents.tolist(), tokens.tolist())]
        return torch.tensor([table[p] for p in prefixes], dtype=torch.float64)

    trie = Trie([(2, 0), (2, 1), (3, 0)])
    (one,) = beam_search(step, 1, trie, start_id=0, beams=1)
    assert one[0].docid == (2, 0)
    prefixes[:] = [()]
    (two,) = beam_search(step, 1, trie, start_id=0, beams=2)
    assert two[0].docid == (3, 0)
    assert two[0].score == pytest.approx(-2.41)


def test_the_trie_knows_what_may_follow() -> None:
    trie = Trie([(3, 5, 1), (3, 1), (4, 7, 7, 1), (3, 5, 1)])
    assert list(trie) == [(3, 1), (3, 5, 1), (4, 7, 7, 1)]
    assert len(trie) == 3
    assert [trie.allowed(p) for p in ([], [3], [3, 5], [4, 7], [3, 5, 1], [9], [3, 6])] == [
        [3, 4],
        [1, 5],
        [1],
        [7],
        [],
        [],
        [],
    ]
    assert trie.allowed_fn(pad_id=0)(0, torch.tensor([2, 3, 1])) == [0]


def test_an_empty_trie() -> None:
    with pytest.raises(DataError, match="at least one docid, got none"):
        Trie([])


@pytest.mark.slow
def test_it_is_faster_than_generate_at_20_beams() -> None:
    model, trie = tiny(width=64, vocabulary=500), Trie(docids(1200, vocabulary=500))
    seconds = []
    for run in (
        lambda: search(model, PROMPTS, trie, beams=20),
        lambda: [generated(model, p, trie, 20, 0.0) for p in PROMPTS],
    ):
        run()
        begin = time.process_time()
        for _ in range(3):
            run()
        seconds.append(time.process_time() - begin)
    assert seconds[0] < seconds[1], seconds
