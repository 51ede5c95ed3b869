"""Documents and queries: read from rows, and made into rows of docids to train on.

A document has a `key` (or `id`) and may have `title`, `text` (or `body`), `url` and `docid`. A query (`query` or
`prompt`) names the documents that are relevant for it (`positive`, `pos_docid` or `chosen`) and may name some that
are not (`negatives`, `neg_docid` or `rejected`), and others that were `clicked`, which need not be relevant: by their
keys, or as docids (lists of token ids), or, where the rows are all there is, as the docids' text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokengrain.data.rows import Rows
from tokengrain.errors import DataError, atomic_write, require
from tokengrain.retrieval.docids import Docids
from tokengrain.retrieval.words import words

Name = str | tuple[int, ...]
"""A document in a row: its key (or its docid's text), or its docid."""

COLUMNS = {
    "relevant": ("positive", "positives", "pos_docid", "chosen"),
    "negatives": ("negatives", "negative", "neg_docid", "rejected"),
    "clicked": ("clicked",),
}


@dataclass(frozen=True)
class Document:
    """A document as its row has it; `file`, `row` and `column` (of its docid) say where."""

    key: str
    title: str = ""
    text: str = ""
    url: str | None = None
    docid: Any = None
    file: str = ""
    row: Any = 0
    column: str = "docid"

    @property
    def words(self) -> list[str]:
        return words(f"{self.title} {self.text}")


@dataclass(frozen=True)
class Query:
    """A query with documents by their keys; `file` and `row` say where it stands."""

    text: str
    relevant: tuple[str, ...]
    clicked: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    file: str = ""
    row: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class NamedQuery:
    """A query whose documents are not looked up yet: names by what they are to it, with the column they stand in."""

    text: str
    file: str
    row: Any
    held_out: bool
    names: dict[str, tuple[str, tuple[Name, ...]]] = field(default_factory=dict)

    def resolved(self, docids: Docids) -> Query:
        """The query with its documents looked up.

        Raises:
            DataError: a document without docid; no relevant one; a negative that is relevant, or shares its docid.
        """
        where: dict[str, Any] = {"file": self.file, "row": self.row}
        found = {
            kind: tuple(key for name in names for key in _keys(docids, name, field=column, **where))
            for kind, (column, names) in self.names.items()
        }
        wanted = f"a document in one of the columns {', '.join(COLUMNS['relevant'])}"
        column, what = self.names.get("relevant", (COLUMNS["relevant"][0], ()))[0], "the query has no relevant document"
        require(found.get("relevant"), DataError, what, **where, field=column, expected=wanted)
        relevant = {docids.of(key): key for key in found["relevant"]}
        for key in found.get("negatives", ()):
            same = relevant.get(docids.of(key))
            what = f"a negative has the docid of the relevant document {same!r}"
            column, expected = self.names["negatives"][0], "a document that the model can tell from it"
            require(same is None, DataError, what, **where, field=column, value=key, expected=expected)
        return Query(self.text, **found, file=self.file, row=str(self.row), held_out=self.held_out)


def _keys(docids: Docids, name: Name, **where: Any) -> tuple[str, ...]:
    if isinstance(name, str):
        docids.of(name, **where)
        return (name,)
    found = docids.documents.get(name)
    expected = f"the docid of one of the {len(docids)} documents of {docids.file}"
    require(found, DataError, "no document has this docid", **where, value=list(name), expected=expected)
    return found or ()


def read_documents(rows: Rows) -> list[Document]:
    """The documents of a source, in order. Raises `DataError` for a row that is none."""
    found = []
    for number, row in rows:
        file, place = rows.place(number)
        key = next((row[name] for name in ("key", "id") if row.get(name) is not None), None)
        where: dict[str, Any] = {"file": file, "row": place}
        require(key is not None, DataError, "the document has no key", **where, field="key", expected="a key or an id")
        text = row.get("text") if row.get("text") is not None else row.get("body")
        given = str(row.get("title") or ""), str(text or ""), row.get("url"), row.get("docid")
        found.append(Document(str(key), *given, **where))
    return found


def read_queries(rows: Rows, held_out: bool) -> list[NamedQuery]:
    """The queries of a source, in order. Raises `DataError` for a row that is none."""
    found = []
    for number, row in rows:
        file, place = rows.place(number)
        text = row.get("query") if row.get("query") is not None else row.get("prompt")
        fine = isinstance(text, str) and text.strip()
        what, expected = "the row has no query", "text in the column query (or prompt)"
        require(fine, DataError, what, file=file, row=place, field="query", value=text, expected=expected)
        query = NamedQuery(str(text), file, place, held_out)
        for kind, columns in COLUMNS.items():
            column = next((name for name in columns if row.get(name) is not None), None)
            if column is not None:
                query.names[kind] = column, _names(row[column], file, place, column)
        found.append(query)
    return found


def _names(value: Any, file: str, row: Any, column: str) -> tuple[Name, ...]:
    """One name or several; a list of whole numbers is one docid."""
    value = value.tolist() if hasattr(value, "tolist") else value
    listed = isinstance(value, (list, tuple))
    if listed and value and all(isinstance(token, int) for token in value):
        return (tuple(value),)
    names: list[Name] = []
    for one in value if listed else [value]:
        one = one.tolist() if hasattr(one, "tolist") else one
        ids = isinstance(one, (list, tuple)) and one and all(isinstance(token, int) for token in one)
        fine = ids or (isinstance(one, (str, int)) and str(one).strip())
        expected = "a key, a docid (a list of token ids), or a list of these"
        require(
            fine, DataError, "this names no document", file=file, row=row, field=column, value=one, expected=expected
        )
        names.append(tuple(one) if ids else str(one))
    return tuple(names)


def documents_of(queries: Sequence[NamedQuery]) -> list[Document]:
    """The documents that rows of queries name, where there is no list of them: each is its docid, or the text of it."""
    found: dict[Name, Document] = {}
    for query in queries:
        for column, names in query.names.values():
            for name in names:
                key = name if isinstance(name, str) else " ".join(map(str, name))
                found.setdefault(name, Document(key, docid=name, file=query.file, row=query.row, column=column))
    return list(found.values())


# ---- Rows of docids, in the columns that training reads ----


@dataclass(frozen=True)
class DocidRow:
    """A prompt with a docid, and perhaps with others that are not relevant; `row` is the query's."""

    prompt: str
    chosen: tuple[int, ...]
    rejected: tuple[tuple[int, ...], ...] = ()
    row: str = ""


def save_rows(rows: Sequence[DocidRow], path: str | PathLike[str]) -> None:
    """Write columns `prompt`, `chosen` and, where there are any, `rejected` (token ids), and `row`."""
    columns: dict[str, Any] = {"prompt": [row.prompt for row in rows], "row": [row.row for row in rows]}
    columns["chosen"] = pa.array([list(row.chosen) for row in rows], pa.list_(pa.int64()))
    if any(row.rejected for row in rows):
        listed = [[list(docid) for docid in row.rejected] for row in rows]
        columns["rejected"] = pa.array(listed, pa.list_(pa.list_(pa.int64())))
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def prompt_ids(tokenizer: Any, texts: Sequence[str], longest: int | None) -> list[list[int]]:
    """Texts as an encoder reads them: with the tokenizer's own special tokens, the end cut if they are too long."""
    more = {} if longest is None else {"truncation": True, "max_length": longest}
    return list(tokenizer(list(texts), add_special_tokens=True, **more).input_ids)


def indexing_texts(
    documents: Sequence[Document],
    rarity: Callable[[str], float],
    *,
    passages: int,
    words_each: int,
    terms: int,
    seed: int,
) -> Iterator[tuple[str, str]]:
    """Texts from which a model learns where documents are: `(key, text)`.

    Of each document its title, its first `passages` of `words_each` words, and `terms` stand-ins for queries: 4 to 12
    of its words, rare ones more often.
    """
    draw = random.Random(seed)
    for document in documents:
        if document.title:
            yield document.key, document.title
        body = document.text.split()
        starts = range(0, min(len(body), passages * words_each), words_each)
        yield from ((document.key, " ".join(body[a : a + words_each])) for a in starts)
        own = sorted(set(document.words))
        for _ in range(terms if own else 0):
            # The k largest of u^(1/w) are a weighted sample without replacement.
            keyed = sorted(own, key=lambda w: draw.random() ** (1 / max(rarity(w), 1e-3)), reverse=True)
            yield document.key, " ".join(keyed[: draw.randint(4, 12)])
