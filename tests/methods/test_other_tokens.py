"""Token scores across tokenizers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.data.tokenizers import all_tokenizers, byt5, merging_bpe
from tokengrain.methods._other_tokens import aligned_scores, decoded_spans

TEXT = " The sky is naïve — 日本語 😀👍 it's the end."


def test_shared_characters_weigh() -> None:
    # "abcd|ef" seen as "ab|cdef": the second token has two characters of each.
    scores = torch.tensor([1.0, 4.0], dtype=torch.float64)
    got = aligned_scores(scores, [(0, 4), (4, 6)], [(0, 2), (2, 6)])
    assert got.tolist() == [1.0, (2 * 1.0 + 2 * 4.0) / 4]


def test_same_spans_change_nothing() -> None:
    spans = [(0, 3), (3, 4), (4, 9), (9, 9)]
    # Eighths: three times one, divided by three, is the same number to the last bit; of any number it is not.
    scores = torch.randint(-999, 999, (4,), generator=torch.Generator().manual_seed(0)).double() / 8
    assert torch.equal(aligned_scores(scores, spans, spans), scores)


def test_tokens_without_characters_take_the_last_score() -> None:
    scores = torch.tensor([1.0, 2.0, 7.0])
    assert aligned_scores(scores, [(0, 2), (2, 4), (4, 4)], [(0, 4), (4, 4)]).tolist() == [1.5, 7.0]
    # Cut short: there is no EOS, so the last token's score stands for it.
    assert aligned_scores(scores[:2], [(0, 2), (2, 4)], [(0, 4), (4, 4)]).tolist() == [1.5, 2.0]
    assert aligned_scores(scores[:1], [(4, 4)], [(0, 2), (2, 2)]).tolist() == [1.0, 1.0]


def test_dropped_white_space_takes_what_stands_before() -> None:
    scores = torch.tensor([1.0, 2.0, 9.0])
    # "ab cd" read by a tokenizer without the space.
    got = aligned_scores(scores, [(0, 2), (3, 5), (5, 5)], [(0, 2), (2, 3), (3, 5)])
    assert got.tolist() == [1.0, 1.0, 2.0]
    assert aligned_scores(scores, [(1, 2), (3, 5), (5, 5)], [(0, 1), (1, 5)])[0] == 1.0  # nothing stands before


def test_mass_is_kept() -> None:
    """A token's score times its characters adds up to the same over the text."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cuts = [sorted({0, 40, *torch.randint(1, 40, (n,), generator=generator).tolist()}) for n in (5, 12)]
        source, target = ([(a, b) for a, b in pairwise(c)] for c in cuts)
        scores = torch.randn(len(source), generator=generator, dtype=torch.float64)
        moved = aligned_scores(scores, source, target)
        masses = [sum(float(v) * (b - a) for v, (a, b) in zip(x, s)) for x, s in ((scores, source), (moved, target))]
        assert masses[0] == pytest.approx(masses[1], abs=1e-9)


def test_wrong_number_of_spans_is_refused() -> None:
    with pytest.raises(ValueError, match="one score per span"):
        aligned_scores(torch.zeros(2), [(0, 1)], [(0, 1)])


@pytest.mark.parametrize("name", sorted(all_tokenizers()))
def test_spans_of_decoded_tokens(name: str) -> None:
    tokenizer: Any = all_tokenizers()[name]
    prompt = tokenizer("what colour is the sky?", add_special_tokens=False)["input_ids"]
    ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    text, spans = decoded_spans(tokenizer, prompt, ids)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole.endswith(text)
    assert len(spans) == len(ids)
    assert spans[0][0] == 0
    assert spans[-1] == (len(text), len(text))  # EOS has no characters
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(spans))
    covered = {c for low, high in spans for c in range(low, high)}
    assert covered == set(range(len(text)))


def test_bytes_of_one_character_share_it() -> None:
    ids = byt5()("é😀a", add_special_tokens=False)["input_ids"]
    text, spans = decoded_spans(byt5(), [], ids)
    assert text == "é😀a"
    assert spans == [(0, 1)] * 2 + [(1, 2)] * 4 + [(2, 3)]


def test_ids_that_no_text_gives() -> None:
    """Sampled ids need not be what the tokenizer would make of their text; half a character stays what it is."""
    tokenizer = merging_bpe()
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "sky"]
    assert tokenizer("sky", add_special_tokens=False)["input_ids"] != letters
    assert decoded_spans(tokenizer, [], letters) == ("sky", [(0, 1), (1, 2), (2, 3)])
    half = tokenizer("👻", add_special_tokens=False)["input_ids"][:2]
    text, spans = decoded_spans(tokenizer, [], half)
    assert set(text) == {"\ufffd"}
    assert spans == [(0, len(text))] * 2
