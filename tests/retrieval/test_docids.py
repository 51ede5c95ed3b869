"""Docids: made, kept, refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tokengrain.errors import DataError
from tokengrain.retrieval.docids import (
    Docids,
    ProductQuantiser,
    code_tokens,
    hierarchical_codes,
    kmeans,
    text_tokens,
    title_url,
)


def blobs(clusters: int, each: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(clusters, dim, generator=g, dtype=torch.float64)
    return (centres[:, None] + torch.randn(clusters, each, dim, generator=g, dtype=torch.float64)).flatten(0, 1)


def test_kmeans_finds_separate_clusters() -> None:
    _, cluster = kmeans(blobs(6, 20), 6, torch.Generator().manual_seed(1))
    assert all(len(set(part.tolist())) == 1 for part in cluster.split(20))
    assert len(set(cluster.tolist())) == 6


def test_kmeans_with_fewer_vectors_than_clusters() -> None:
    centroids, cluster = kmeans(torch.tensor([[1.0], [1.0], [5.0]]), 7, torch.Generator().manual_seed(0))
    assert sorted(centroids.flatten().tolist()) == [1.0, 5.0]
    assert cluster[0] == cluster[1] != cluster[2]


def test_a_quantiser_knows_its_own_codes() -> None:
    quantiser = ProductQuantiser.fit(blobs(10, 30), levels=4, codes=8, seed=3)
    assert quantiser.codewords.shape == (4, 8, 2)
    codes = torch.randint(8, (50, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantiser.encode(quantiser.decode(codes)), codes)


def test_a_part_with_few_different_vectors_has_few_codes() -> None:
    vectors = torch.tensor([[float(i), 0.0, float(i % 2)] for i in range(6)])
    quantiser = ProductQuantiser.fit(vectors, levels=3, codes=6)
    codes = quantiser.encode(vectors)
    assert [len(set(column.tolist())) for column in codes.T] == [6, 1, 2]
    assert torch.equal(quantiser.decode(codes), vectors.double())


def test_codes_are_those_of_nanopq() -> None:
    nanopq = pytest.importorskip("nanopq")
    vectors = blobs(10, 30).float()
    theirs = nanopq.PQ(M=4, Ks=16, verbose=False)
    theirs.fit(vectors.numpy(), seed=1)
    mine = ProductQuantiser(torch.from_numpy(theirs.codewords)).encode(vectors)
    assert mine.tolist() == theirs.encode(vectors.numpy()).tolist()
    own = ProductQuantiser.fit(vectors, levels=4, codes=16)
    errors = [
        (q.decode(q.encode(vectors)) - vectors).square().mean()
        for q in (own, ProductQuantiser(torch.from_numpy(theirs.codewords)))
    ]
    assert errors[0] < 1.1 * errors[1]


def test_hierarchical_codes_are_all_different_and_follow_clusters() -> None:
    codes = hierarchical_codes(blobs(5, 12), levels=3, branching=5)
    assert len({tuple(c) for c in codes.tolist()}) == 60
    assert all(len(set(part[:, 0].tolist())) == 1 for part in codes.split(12))


def test_levels_have_tokens_of_their_own() -> None:
    codes = torch.tensor([[0, 3], [2, 1]])
    assert code_tokens(codes, 100) == [(100, 107), (102, 105)]
    assert code_tokens(codes, 100, stride=256) == [(100, 359), (102, 357)]
    with pytest.raises(
        DataError, match="a code is not below the number of ids of a level; got 3; expected codes below 3"
    ):
        code_tokens(codes, 100, stride=3)


@pytest.mark.parametrize(
    ("url", "title", "expected"),
    [
        ("HTTPS://Site.org/Deep-Sea/Fish", "x", "fish deep sea site.org"),
        ("site.org/12/index", "A Fish", "a fish site.org"),  # one of three parts says something
        ("site.org/ab", "", None),
        ("site.org/abc", None, "abc site.org"),
        (None, "  Fish ", "fish"),
        ("http://", "", None),
    ],
)
def test_text_of_a_page(url: str | None, title: str | None, expected: str | None) -> None:
    assert title_url(url, title) == expected


def test_a_long_text_keeps_its_end_token() -> None:
    assert text_tokens("x" * 200, lambda t: [5] * len(t), end_id=1, longest=99) == (5,) * 98 + (1,)


def test_a_table_is_kept_whole(tmp_path: Path) -> None:
    table = Docids(("a", "b", "c"), ((5, 1), (5, 6, 1), (5, 1)), scheme="title_url")
    table.save(tmp_path / "docids.parquet")
    read = Docids.load(tmp_path / "docids.parquet")
    assert (read.keys, read.tokens, read.scheme) == (table.keys, table.tokens, "title_url")
    assert read.documents == {(5, 1): ("a", "c"), (5, 6, 1): ("b",)}
    assert read.of("b") == (5, 6, 1)


@pytest.mark.parametrize(
    ("keys", "docids", "message"),
    [
        ((), (), "d.parquet: there are no documents"),
        (("a", "a"), ((1,), (2,)), "d.parquet: row 0: field 'key': the key is that of a later document too; got 'a'"),
        (("a", "b"), ((1,), ()), "d.parquet: row 1: field 'docid': the document has no docid; got 'b'"),
        (
            ("a", "b", "c"),
            ((4, 5, 6), (3,), (4, 5)),
            r"d.parquet: row 2: field 'docid': the docid is the beginning of another, \[4, 5, 6\]; got \[4, 5\]",
        ),
    ],
)
def test_a_table_that_cannot_be_used(keys: tuple[str, ...], docids: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Docids(keys, docids, "d.parquet")


def test_tokens_that_the_model_does_not_have() -> None:
    table = Docids(("a", "b"), ((3, 38271), (3, 38272)), "d.parquet")
    table.check_vocabulary(38273)
    message = (
        "row 1: field 'docid': a docid has a token outside the model's vocabulary; got 38272; expected .* 0 to 38271"
    )
    with pytest.raises(DataError, match=message):
        table.check_vocabulary(38272)


def test_a_document_without_docid() -> None:
    table = Docids(("a",), ((3,),), "d.parquet")
    message = (
        "t.jsonl: row 7: field 'negatives': there is no docid for it; got 'z'; expected one of the 1 documents of d"
    )
    with pytest.raises(DataError, match=message):
        table.of("z", file="t.jsonl", row=7, field="negatives")


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: field 'docid': a table of docids lacks a column"):
        Docids.load(tmp_path / "x.parquet")
    pq.write_table(pa.table({"key": ["a"], "docid": ["12 13"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="field 'docid': the column has no token ids; got 'string'; expected lists of"):
        Docids.load(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_text("key,docid")
    with pytest.raises(DataError, match=r"x\.parquet is no table of docids: ArrowInvalid"):
        Docids.load(tmp_path / "x.parquet")
