"""Credit samples: made from a batch, written, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.credit.annotate_worker import make_tokenizer
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, write_json
from tokengrain.report.rows import CreditSample, Side, by_pair, collect_credit_samples, read_credit_samples


def make_batch() -> TokenBatch:
    tokenizer = make_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(text.split())

    first = [
        Completion(ids("was kind </s>")),
        Completion(ids("was cruel and hurt"), [True, True, False, True]),
    ]
    second = [Completion(ids("a sea")), Completion(ids("captain"))]
    return TokenBatch.from_samples([Sample(ids("the sea"), first, row=4), Sample(ids("a"), second, row="x")])


def test_round_trip_of_tokens_credit_and_truth(tmp_path: Path) -> None:
    batch = make_batch()
    assert batch.segments.total == 9
    credit = torch.arange(9) / 10
    entries = collect_credit_samples(batch, make_tokenizer(), {"a": credit, "b": -credit}, truth=credit + 1)
    write_json(tmp_path / "credit_samples.json", entries)
    samples = read_credit_samples(tmp_path / "credit_samples.json")
    assert [(s.source, s.row) for s in samples] == [("a", 4), ("b", 4), ("a", "x"), ("b", "x")]
    chosen, rejected = samples[0].sides
    assert samples[0].prompt == "the sea"
    assert chosen.tokens == ["was", " kind", " </s>"]
    assert chosen.credit == pytest.approx([0.0, 0.1, 0.2])
    assert rejected.tokens == ["was", " cruel", " and", " hurt"]
    assert rejected.credit == [0.3, 0.4, None, 0.5]
    assert rejected.truth == [1.3, 1.4, None, 1.5]
    assert samples[3].sides[1].credit == [-0.8]
    assert [[s.source for s in group] for group in by_pair(samples)] == [["a", "b"], ["a", "b"]]


def test_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(8,\), expected \(9,\)"):
        collect_credit_samples(make_batch(), make_tokenizer(), {"a": torch.zeros(8)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: Expecting"),
        ("{}", "expected a list of samples"),
        ('[{"prompt": "p"}]', "row 0: not a credit sample"),
        ('[{"chosen": {"tokens": ["a"], "credit": [NaN]}}]', "row 0: field 'chosen.credit': token 0 has no finite"),
        ('[{"chosen": [1]}]', "field 'chosen': not a side of a pair"),
        ('[{"chosen": {"tokens": ["a"], "credit": 1}}]', "field 'chosen.credit': not lists"),
        ('[{"chosen": {"tokens": [7], "credit": [1]}}]', "field 'chosen.tokens': no tokens"),
        (
            '[{"chosen": {"tokens": ["a"], "credit": [1%s]}}]' % ("0" * 400),
            "field 'chosen.credit': token 0 has no finite",
        ),
        (
            '[{"chosen": {"tokens": ["a"], "credit": [1], "truth": []}}]',
            "field 'chosen.truth': .* do not fit",
        ),
    ],
)
def test_damaged_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "credit_samples.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_credit_samples(path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "credit_samples.json"
    path.write_bytes(b"\xff\xfe[]")
    with pytest.raises(DataError, match="is damaged"):
        read_credit_samples(path)


def test_the_same_pair_twice_is_two_pairs() -> None:
    def sample(source: str, row: int, text: str = "a") -> CreditSample:
        return CreditSample("p", source, (Side([text], [1.0]), Side(["b"], [0.0])), row)

    samples = [sample("x", 0), sample("x", 1, "c"), sample("x", 2), sample("y", 10), sample("y", 11, "c")]
    assert [[(s.source, s.row) for s in group] for group in by_pair(samples)] == [
        [("x", 0), ("y", 0)],  # the other source numbers its rows otherwise
        [("x", 1), ("y", 1)],
        [("x", 2)],
    ]
