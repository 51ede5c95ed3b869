"""Document identifiers (docids): sequences of token ids that a model generates to name a document.

Three ways to make them, beside docids that are given:

    product quantisation   the vector cut into M parts, the number of the nearest of K centroids in each
    hierarchical clusters  clusters of clusters, and the place in the smallest one (arXiv 2202.06991)
    title and URL          words of the URL from its end to the domain, or the title (arXiv 2208.09257)

Codes of different levels are different tokens: level m has `stride` ids from `first_id + m * stride` on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from os import PathLike
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokengrain.errors import DataError, atomic_write, foreign, require

GENERIC_TERMS = ("index", "page", "item", "view", "default", "home")


@dataclass(frozen=True)
class Docids:
    """The docid of every document. Documents may share one; none is the beginning of another.

    Args:
        keys: names of the documents, all different.
        tokens: their docids, an end token included where the scheme has one.
        file: where they come from, for messages.
        scheme: how they were made.
        places: file, row and column that each comes from, for messages; none: rows of `file`.

    Raises:
        DataError: no documents; a name twice; a document without docid; a docid that another one begins with.
    """

    keys: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    file: str = "docids"
    scheme: str = "given"
    places: tuple[tuple[str, Any, str], ...] = ()

    def __post_init__(self) -> None:
        require(self.keys, DataError, "there are no documents, so no trie of docids", file=self.file)
        for row, (key, docid) in enumerate(zip(self.keys, self.tokens, strict=True)):
            twice = self.row[key] != row
            self._check(not twice, row, "the key is that of a later document too", "another key", "key", value=key)
            self._check(docid, row, "the document has no docid", "at least one token id", "docid", value=key)
        ordered = sorted((docid, row) for row, docid in enumerate(self.tokens))
        for (docid, row), (after, _) in pairwise(ordered):
            what = f"the docid is the beginning of another, {list(after)}"
            self._check(docid == after or after[: len(docid)] != docid, row, what, ENDED, "docid", value=list(docid))

    def _check(self, holds: object, row: int, what: str, expected: str, field: str, value: object) -> None:
        file, place, column = self.places[row] if self.places else (self.file, row, "docid")
        named = column if field == "docid" else field
        require(holds, DataError, what, file=file, row=place, field=named, value=value, expected=expected)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def row(self) -> Mapping[str, int]:
        """Number of each document by its name."""
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def documents(self) -> Mapping[tuple[int, ...], tuple[str, ...]]:
        """Names of the documents that each docid stands for."""
        found: dict[tuple[int, ...], tuple[str, ...]] = {}
        for key, docid in zip(self.keys, self.tokens, strict=True):
            found[docid] = (*found.get(docid, ()), key)
        return found

    def of(self, key: Any, *, file: object = None, row: object = None, field: str | None = None) -> tuple[int, ...]:
        """The docid of a document by its name; file, row and field say where it was named.

        Raises:
            DataError: there is no such document.
        """
        expected = f"one of the {len(self)} documents of {self.file}"
        where: dict[str, Any] = {"file": file, "row": row, "field": field}
        require(str(key) in self.row, DataError, "there is no docid for it", **where, value=key, expected=expected)
        return self.tokens[self.row[str(key)]]

    def check_vocabulary(self, size: int) -> None:
        """Raises `DataError` for a docid with a token that a model with `size` tokens does not have."""
        for row, docid in enumerate(self.tokens):
            for token in docid:
                what = "a docid has a token outside the model's vocabulary"
                self._check(0 <= token < size, row, what, f"a token id from 0 to {size - 1}", "docid", value=token)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a parquet file with the columns `key` and `docid`."""
        table = pa.table({"key": list(self.keys), "docid": pa.array(map(list, self.tokens), pa.list_(pa.int64()))})
        with atomic_write(path) as temporary:
            pq.write_table(table.replace_schema_metadata({"scheme": self.scheme}), temporary)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Docids:
        """The inverse of `save`; any parquet file with these columns will do. Raises `DataError`."""
        with foreign(f"{path} is no table of docids: ", DataError):
            table = pq.read_table(path)
        for field in ("key", "docid"):
            there = field in table.column_names
            require(there, DataError, "a table of docids lacks a column", file=path, field=field)
        kind: Any = table.schema.field("docid").type
        ids = pa.types.is_integer(getattr(kind, "value_type", None) or kind) and hasattr(kind, "value_type")
        what = "the column has no token ids"
        require(ids, DataError, what, file=path, field="docid", value=str(kind), expected="lists of whole numbers")
        docids = tuple(tuple(docid or ()) for docid in table["docid"].to_pylist())
        scheme = (table.schema.metadata or {}).get(b"scheme", b"given").decode()
        return cls(tuple(map(str, table["key"].to_pylist())), docids, str(path), scheme)


ENDED = "an end token, so that the two can be told apart"


def padded(docids: Sequence[Sequence[int]], pad_id: int) -> tuple[tuple[int, ...], ...]:
    """Docids as long as the longest by padding, which a model then learns like their own tokens."""
    longest = max(map(len, docids))
    return tuple((*docid, *[pad_id] * (longest - len(docid))) for docid in docids)


# ---- Vectors -> codes ----


@dataclass(frozen=True)
class ProductQuantiser:
    """Codes of vectors of D numbers: M parts, each with K centroids of its own.

    Args:
        codewords: the centroids, float `[M, K, D / M]`.
    """

    codewords: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, levels: int, codes: int, seed: int = 0) -> ProductQuantiser:
        """Centroids of vectors `[n, D]`, by k-means in each of `levels` parts; no more `codes` than vectors.

        Raises:
            DataError: D is no multiple of `levels`.
        """
        what = f"vectors of {vectors.shape[1]} numbers cannot be cut into {levels} parts of one length"
        require(vectors.shape[1] % levels == 0, DataError, what)
        generator = torch.Generator().manual_seed(seed)
        found = [kmeans(part, codes, generator)[0] for part in vectors.double().chunk(levels, 1)]
        # A part with few different vectors has few centroids; its first one again is never the first of the nearest.
        most = max(map(len, found))
        return cls(torch.stack([torch.cat([c, c[:1].expand(most - len(c), -1)]) for c in found]))

    def encode(self, vectors: Tensor) -> Tensor:
        """Numbers of the nearest centroids, long `[n, M]`; of equally near ones the first."""
        parts = vectors.to(self.codewords).chunk(len(self.codewords), 1)
        return torch.stack([nearest_centroid(x, c) for x, c in zip(parts, self.codewords, strict=True)], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors `[n, D]` that codes `[n, M]` stand for."""
        return torch.cat([c[code] for c, code in zip(self.codewords, codes.T, strict=True)], 1)


def nearest_centroid(vectors: Tensor, centroids: Tensor) -> Tensor:
    """By squared distance, long `[n]`. The differences are taken as they are: a product would round them."""
    distance = torch.cdist(vectors, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.argmin(1)


def kmeans(vectors: Tensor, k: int, generator: torch.Generator, rounds: int = 25) -> tuple[Tensor, Tensor]:
    """Centroids `[k, d]` and the cluster of each vector `[n]`.

    Starts are drawn far from each other (k-means++), each the best of a few.
    """
    centroids = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    gap = torch.cdist(vectors, centroids)[:, 0].square()
    while len(centroids) < min(k, len(vectors)) and bool(gap.any()):  # all 0: no more different vectors
        drawn = vectors[torch.multinomial(gap, 2 + int(math.log(k)), replacement=True, generator=generator)]
        gaps = torch.minimum(gap[:, None], torch.cdist(vectors, drawn).square())
        best = int(gaps.sum(0).argmin())
        centroids, gap = torch.cat([centroids, drawn[best : best + 1]]), gaps[:, best]
    for _ in range(rounds):
        cluster = nearest_centroid(vectors, centroids)
        size = torch.bincount(cluster, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add(0, cluster, vectors)
        centroids = torch.where(size[:, None] > 0, sums / size.clamp(min=1)[:, None], centroids)
    return centroids, nearest_centroid(vectors, centroids)


def hierarchical_codes(vectors: Tensor, levels: int, branching: int, seed: int = 0) -> Tensor:
    """Codes long `[n, levels]`, all different: cluster, cluster within it, ..., place in the smallest cluster.

    Args:
        vectors: `[n, D]`.
        branching: clusters at each level but the last, which counts the documents of its cluster.
    """
    generator, vectors = torch.Generator().manual_seed(seed), vectors.double()
    codes = torch.zeros(len(vectors), levels, dtype=torch.long)

    def split(rows: Tensor, level: int) -> None:
        if level == levels - 1:
            codes[rows, level] = torch.arange(len(rows))
            return
        _, codes[rows, level] = kmeans(vectors[rows], branching, generator)
        for code in codes[rows, level].unique():
            split(rows[codes[rows, level] == code], level + 1)

    split(torch.arange(len(vectors)), 0)
    return codes


def code_tokens(codes: Tensor, first_id: int, stride: int | None = None) -> list[tuple[int, ...]]:
    """Token ids of codes `[n, M]`: `first_id + m * stride + code`; `stride` None: the largest code + 1.

    Raises:
        DataError: a code that would run into the ids of the next level.
    """
    largest = int(codes.max())
    stride = largest + 1 if stride is None else stride
    what = "a code is not below the number of ids of a level"
    require(largest < stride, DataError, what, value=largest, expected=f"codes below {stride}")
    return list(map(tuple, (first_id + stride * torch.arange(codes.shape[1]) + codes).tolist()))


# ---- Titles and URLs -> text ----


def title_url(
    url: str | None, title: str | None, *, generic: Sequence[str] = GENERIC_TERMS, shortest: int = 3
) -> str | None:
    """The text that stands for a web page, in small letters; None where neither URL nor title will do.

    Of a URL with more than half of its parts descriptive it is the parts from the last one to the domain, else the
    title and the domain. A part is descriptive that is no number, not generic, and at least `shortest` long.
    """
    address, title = (url or "").strip().lower(), (title or "").strip().lower()
    address = address.replace("http://", "").replace("https://", "").replace("-", " ")
    parts = [part for part in address.split("/") if part]
    telling = [p for p in parts if not p.isnumeric() and p not in generic and len(p) >= shortest]
    if len(telling) > len(parts) / 2:
        return " ".join([*parts[:0:-1], parts[0]])
    return " ".join([title, *parts[:1]]) if title else None


def text_tokens(text: str, encode: Callable[[str], Sequence[int]], end_id: int, longest: int = 99) -> tuple[int, ...]:
    """A docid of text: its tokens without special ones, cut so that with the end token there are at most `longest`."""
    return (*list(encode(text))[: longest - 1], end_id)
