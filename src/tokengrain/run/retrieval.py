"""The stages of generative retrieval: docids, pairs of docids, and search with a trained model.

index/       docids.parquet  documents.parquet  queries.parquet  model/
             train.parquet, eval.parquet: queries and texts of documents with docids, for an sft stage
negatives/   train.parquet, eval.parquet: pairs of docids, for a train stage
evaluate/    rankings.jsonl: the documents found for each held-out query, with its metrics
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tokengrain import models
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import Rows, load_rows
from tokengrain.errors import (
    DataError,
    ModelError,
    RecipeError,
    atomic_write,
    file_fingerprint,
    foreign,
    require,
    write_text,
)
from tokengrain.evaluation.statistics import mean_interval
from tokengrain.recipe import schema
from tokengrain.recipe.check import Mistakes, check_reference
from tokengrain.retrieval.corpus import (
    DocidRow,
    Document,
    NamedQuery,
    Query,
    documents_of,
    indexing_texts,
    prompt_ids,
    read_documents,
    read_queries,
    save_rows,
)
from tokengrain.retrieval.docids import (
    Docids,
    ProductQuantiser,
    code_tokens,
    hierarchical_codes,
    padded,
    text_tokens,
    title_url,
)
from tokengrain.retrieval.metrics import mean_metrics, ranking_metrics
from tokengrain.retrieval.search import Found, Trie, search
from tokengrain.retrieval.words import BM25, LSA, STRATA, Strata, draw_negatives, words
from tokengrain.run.build import RunModels, open_rows, tokenize_config
from tokengrain.run.stages import Asked, Stage
from tokengrain.specs import ModelSpec
from tokengrain.worlds import is_world, load_world

PARTS = ("train", "eval")


class DocidStage(Stage):
    """A stage that makes rows of docids, or searches with a model that knows them."""

    def made(self, run: RunModels, user: Stage, settings: Mapping[str, Any]) -> tuple[Any, Any]:
        folder, tokenizer = run.run_dir / self.name, run.tokenizer(user.model)
        config = replace(tokenize_config(user.data), prompt_role="encoder", truncation_side="right")
        make = prepare_pairs if user.row_form == "pairs" else prepare_sft
        files = [folder / f"{part}.parquet" for part in PARTS]
        train, held_out = (make(str(file), tokenizer, config) if file.exists() else None for file in files)
        return train, held_out

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        own = self.own.model_dump(exclude={"kind", "model", "data", "before"}, exclude_none=True)
        contents = {k: load_rows(v).fingerprint for k, v in own.items() if k in ("documents", "docids")}
        contents |= {k: file_fingerprint(own[k]) for k in own.keys() & {"vectors"}}
        asked = {key: above[str(one.spec.stage)] for key, one in self.asks.items() if one.spec.stage}
        return {**super().decides(run_dir, above), **own, **contents, **asked}

    def check_models(self, run: RunModels) -> None:
        super().check_models(run)
        if self.model.stage in (None, schema.INIT):
            config = models.load_config(self.model, run.path(self.model))
            what = (
                f"{self.model.describe()} is no encoder-decoder, and a stage of kind {self.kind} needs one (T5, BART)"
            )
            require(config.is_encoder_decoder, ModelError, what)

    @property
    def index(self) -> Index:
        """The stage that made the docids."""
        found = self.above[str(self.data.stage)]
        assert isinstance(found, Index)  # checked
        return found


class Index(DocidStage):
    """Makes docids, the model's tokens for them, and rows that teach it where documents are."""

    kind = "index"
    makes = "a language model that knows docids, and rows of them"

    def check(self, found: Mistakes) -> None:
        super().check(found)
        where, own = f"stages.{self.name}", self.own
        if self.data.stage is not None:
            found.add(f"{where}.data", "docids are made of queries and documents; expected rows of these")
        if own.docids is not None and own.scheme != "given":
            found.add(f"{where}.docids", f"a table of docids does not go with scheme {own.scheme}; expected given")
        if own.scheme != "given" and own.documents is None and not is_world(self.data.train):
            found.add(f"{where}.documents", f"scheme {own.scheme} makes docids of documents; expected a file of them")

    def describe(self) -> str:
        shape = f" ({self.own.levels} x {self.own.codes})" if self.own.scheme in ("pq", "hierarchical") else ""
        return f"{self.own.scheme} docids{shape} for {self.own.documents or self.data.train}"

    def rows(self) -> tuple[Rows, Rows | None]:
        return open_rows(self.data, self.recipe.seed, prompts=is_world(self.data.train))

    def check_rows(self, run: RunModels, settings: Mapping[str, Any]) -> None:
        tokenizer, config = run.tokenizer(self.model), models.load_config(self.model, run.path(self.model))
        documents, queries = self.read()
        docids = self.docids(documents, tokenizer, config.get_text_config().vocab_size)
        for query in queries:
            query.resolved(docids)

    def read(self) -> tuple[list[Document], list[NamedQuery]]:
        """Documents and queries as their rows have them."""
        queries = [q for rows, part in zip(self.rows(), PARTS) if rows for q in read_queries(rows, part == "eval")]
        if self.own.documents is not None:
            return read_documents(load_rows(self.own.documents)), queries
        if is_world(self.data.train):
            world: Any = load_world(self.data.train)
            return read_documents(load_rows(world.documents())), queries
        return documents_of(queries), queries

    def docids(self, documents: Sequence[Document], tokenizer: Any, vocabulary: int) -> Docids:
        """The table, by the scheme; codes get the tokens behind a vocabulary of the given size."""
        own = self.own
        keys = tuple(document.key for document in documents)
        places = tuple((document.file, document.row, document.column) for document in documents)
        file = own.docids or own.documents or str(self.data.train)
        if own.docids is not None:
            table = Docids.load(own.docids)
            table.check_vocabulary(vocabulary)
            named = own.documents is not None
            found = [table.of(d.key, file=d.file, row=d.row, field="key") for d in documents] if named else table.tokens
            table = Docids(keys, tuple(found), own.docids, places=places) if named else table
        elif own.scheme in ("given", "title_url"):
            listed = [self._text_docid(d, tokenizer) for d in documents]
            table = Docids(keys, tuple(listed), file, own.scheme, places)
        else:
            first = max(vocabulary, len(tokenizer))
            table = Docids(keys, tuple(code_tokens(self._codes(documents), first)), file, own.scheme, places)
            vocabulary = 1 + max(token for docid in table.tokens for token in docid)
        table.check_vocabulary(vocabulary)
        return table

    def _text_docid(self, document: Document, tokenizer: Any) -> tuple[int, ...]:
        given: Any = document.docid if self.own.scheme == "given" else title_url(document.url, document.title)
        given = given.tolist() if hasattr(given, "tolist") else given
        column, needed = document.column, "a docid (token ids, or text)"
        if self.own.scheme == "title_url":
            column, needed = "title", "a title, or a URL of words"
        where: dict[str, Any] = {"file": document.file, "row": document.row, "field": column, "expected": needed}
        require(given is not None, DataError, "the document has no docid", **where, value=document.key)
        ids = isinstance(given, (list, tuple)) and given and all(type(token) is int for token in given)
        fine = ids or (isinstance(given, str) and given.strip())
        require(fine, DataError, "this is no docid", **where, value=given)
        if isinstance(given, str):
            return text_tokens(
                given, lambda text: tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id
            )
        return tuple(given)

    def _codes(self, documents: Sequence[Document]) -> torch.Tensor:
        own, seed = self.own, self.recipe.seed
        if own.vectors is not None:
            with foreign(f"{own.vectors} holds no vectors: ", DataError):
                vectors = torch.from_numpy(np.load(own.vectors))
                finite = vectors.ndim == 2 and bool(vectors.isfinite().all())
            what = f"{own.vectors} is an array {list(vectors.shape)} for {len(documents)} documents"
            fine = finite and len(vectors) == len(documents)
            require(fine, DataError, what, expected="a row of finite numbers for each document")
        else:
            dimensions = own.levels * math.ceil(own.dimensions / own.levels)
            vectors = LSA([d.words for d in documents], dimensions, seed).vectors
            # Few documents have vectors of fewer numbers; parts of one length need a multiple of `levels`.
            vectors = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % own.levels))
        if own.scheme == "hierarchical":
            return hierarchical_codes(vectors, own.levels, own.codes, seed)
        return ProductQuantiser.fit(vectors, own.levels, own.codes, seed).encode(vectors)

    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        tokenizer, model = run.tokenizer(self.model), cast(Any, models.load_model(self.model, run.path(self.model)))
        documents, named = self.read()
        docids = self.docids(documents, tokenizer, models.vocabulary(model))
        queries = [query.resolved(docids) for query in named]
        taught = docids
        if self.own.pad_counts:
            taught = replace(docids, tokens=padded(docids.tokens, tokenizer.pad_token_id))
        rows = {part: self._sft_rows(documents, taught, queries, part == "eval") for part in PARTS}
        if run.state.is_main_process:
            torch.manual_seed(self.recipe.seed)
            grow(model, tokenizer, docids, self.own.own_head)
            folder.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            docids.save(folder / "docids.parquet")
            _save_table(
                [{"key": d.key, "title": d.title, "text": d.text} for d in documents], folder / "documents.parquet"
            )
            _save_table([asdict(query) for query in queries], folder / "queries.parquet")
            for part, listed in rows.items():
                if listed:
                    save_rows(listed, folder / f"{part}.parquet")
        shared = len(docids) - len(docids.documents)
        counts = {part: len(listed) for part, listed in rows.items() if listed}
        return {"rows": counts, "documents": len(docids), "sharing": shared, "vocabulary": models.vocabulary(model)}

    def _sft_rows(
        self, documents: Sequence[Document], docids: Docids, queries: Sequence[Query], held_out: bool
    ) -> list[DocidRow]:
        """Queries with what was clicked, else with what is relevant; training rows also have texts of documents."""
        own = self.own
        found = [
            DocidRow(query.text, docids.of(key), row=query.row)
            for query in queries
            if query.held_out is held_out
            for key in (query.relevant if held_out else query.clicked or query.relevant)
        ]
        if not held_out and any(d.words for d in documents):
            bm25 = BM25([d.words for d in documents])
            sizes = {"passages": own.passages, "words_each": own.passage_words, "terms": own.terms}
            texts = indexing_texts(documents, bm25.rarity, **sizes, seed=self.recipe.seed)
            found += [DocidRow(text, docids.of(key), row=key) for key, text in texts]
        return found


def grow(model: Any, tokenizer: Any, docids: Docids, own_head: bool) -> None:
    """Give model and tokenizer the tokens of the docids, and the model a head of its own if wanted.

    Tokens of codes are called `<level:code>`; one that only the model knew so far, `<id:number>`.
    """
    size = 1 + max(max(token for docid in docids.tokens for token in docid), models.vocabulary(model) - 1)
    names = {token: f"<id:{token}>" for token in range(len(tokenizer), size)}
    if docids.scheme in ("pq", "hierarchical"):
        for level, tokens in enumerate(zip(*docids.tokens, strict=True)):
            first = min(tokens) if level else models.vocabulary(model)
            names |= {token: f"<{level}:{token - first}>" for token in names.keys() & set(tokens)}
    tokenizer.add_tokens([names[token] for token in sorted(names)])
    if size > (before := models.vocabulary(model)):
        # By default new rows are nearly equal, and codes would have to come apart first: these spread like the old.
        model.resize_token_embeddings(size, mean_resizing=False)
        for part in ("encoder", "decoder"):  # which T5Gemma forgets
            config: Any = getattr(model.config, part, None)
            if hasattr(config, "vocab_size"):
                config.vocab_size = size
        for weight in {
            id(e.weight): e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings())
        }.values():
            old, new = weight.data[:before], weight.data[before:]
            new.copy_(old.mean(0) + old.std(0) * torch.randn_like(new))
    if own_head:
        head = model.get_output_embeddings()
        weight = head.weight.detach().clone()
        # Equal weights would be tied again when they are loaded. The config goes on saying that weights are tied: those
        # of encoder and decoder are, and T5 divides by the root of its width only then.
        head.weight = torch.nn.Parameter(weight + 0.01 * weight.std() * torch.randn_like(weight))


def _save_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), temporary)


class Corpus:
    """What an index stage made: docids, documents and queries."""

    def __init__(self, folder: Path) -> None:
        self.docids = Docids.load(folder / "docids.parquet")
        self.words = [
            words(f"{d['title']} {d['text']}") for d in pq.read_table(folder / "documents.parquet").to_pylist()
        ]
        rows: list[dict[str, Any]] = pq.read_table(folder / "queries.parquet").to_pylist()
        self.queries = [
            cast(Any, Query)(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in rows
        ]

    @property
    def has_words(self) -> bool:
        return any(self.words)

    def found(
        self, model: Any, tokenizer: Any, queries: Sequence[Query], longest: int | None, **how: Any
    ) -> list[list[Found]]:
        """What a model finds for queries."""
        ids = prompt_ids(tokenizer, [query.text for query in queries], longest)
        return search(model, ids, Trie(self.docids.tokens), **how)


class Negatives(DocidStage):
    """Pairs every query's relevant documents with others."""

    kind = "negatives"
    makes = "pairs of docids, not a model"

    def check(self, found: Mistakes) -> None:
        super().check(found)
        _check_index(self, found)
        for stratum in self.own.strata or ():
            if len(stratum) != 2 or not 1 <= stratum[0] <= stratum[1]:
                found.add(f"stages.{self.name}.strata", f"got {stratum}; expected [first rank, last rank] from 1 on")

    def describe(self) -> str:
        return f"{self.own.count} negatives per query, source {self.own.source}"

    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        corpus = Corpus(run.run_dir / self.index.name)
        source = self._source(corpus)
        draw, counts = random.Random(self.recipe.seed), dict[str, int]()
        for part in PARTS:
            queries = [query for query in corpus.queries if query.held_out is (part == "eval")]
            rankings = self._rankings(run, corpus, queries, source)
            pairs = [self._pairs(corpus.docids, q, ranking, source, draw) for q, ranking in zip(queries, rankings)]
            rows = [row for row in pairs if row.rejected]
            if rows and run.state.is_main_process:
                save_rows(rows, folder / f"{part}.parquet")
            counts |= {part: len(rows)} if rows else {}
        what = f"no query of {self.index.data.train} has a negative; expected more documents, or negatives in the rows"
        require("train" in counts, DataError, what)
        return {"rows": counts, "source": source}

    def _source(self, corpus: Corpus) -> str:
        given = any(query.negatives for query in corpus.queries)
        found = self.own.source
        if found == "auto":
            found = "rows" if given else "bm25" if corpus.has_words else "model"
        require(found != "rows" or given, DataError, f"the rows of {self.index.data.train} name no negatives")
        require(found != "bm25" or corpus.has_words, DataError, "BM25 needs documents with text; this index has none")
        return found

    def _rankings(self, run: RunModels, corpus: Corpus, queries: Sequence[Query], source: str) -> list[list[int]]:
        """Documents by number for each query, the best first."""
        if source == "rows":
            return [[corpus.docids.row[key] for key in query.negatives] for query in queries]
        if source == "bm25":
            bm25 = BM25(corpus.words)
            return [bm25.ranking(words(query.text)) for query in queries]
        tokenizer, longest = run.tokenizer(self.model), tokenize_config(self.data).max_prompt_length
        found = corpus.found(run.frozen(self.model), tokenizer, queries, longest, beams=self.own.beams)
        by_docid = corpus.docids.documents
        return [[corpus.docids.row[key] for one in each for key in by_docid[one.docid]] for each in found]

    def _pairs(
        self, docids: Docids, query: Query, ranking: Sequence[int], source: str, draw: random.Random
    ) -> DocidRow:
        """A relevant docid before others; before one of a held-out query, which only measures."""
        relevant = {docids.of(key) for key in query.relevant}
        excluded = [docid in relevant for docid in docids.tokens]
        own: Strata = STRATA if source == "bm25" else [(1, max(len(ranking), 1))]
        strata = [(low, high) for low, high in self.own.strata] if self.own.strata else own
        count = 1 if query.held_out else self.own.count
        drawn = draw_negatives(ranking, excluded, count, draw, strata=strata, remainder=self.own.remainder)
        chosen = docids.of(draw.choice(query.relevant))
        return DocidRow(query.text, chosen, tuple(docids.tokens[d] for d in drawn), query.row)


class Retrieve(DocidStage):
    """Searches for the held-out queries with a model, and perhaps with another before it."""

    kind = "retrieve"
    makes = "rankings, not a model"

    @property
    def asks(self) -> dict[str, Asked]:
        return {} if self.own.before is None else {"before": Asked(self.own.before)}

    def check(self, found: Mistakes) -> None:
        super().check(found)
        _check_index(self, found)
        with found.at(f"stages.{self.name}.metrics"):
            try:
                ranking_metrics([["a"]], [["a"]], self.own.metrics)
            except DataError as error:
                raise RecipeError(str(error)) from None

    def describe(self) -> str:
        return f"search with {self.model.describe()}, {self.own.beams} beams"

    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        corpus = Corpus(run.run_dir / self.index.name)
        queries = [query for query in corpus.queries if query.held_out]
        what = f"{self.index.data.train} has no held-out queries; expected data.eval, or data.eval_fraction above 0"
        require(queries, DataError, what)
        metrics: dict[str, Any] = {"queries": len(queries), "beams": self.own.beams}
        lines = [{"query": query.text, "row": query.row, "relevant": query.relevant} for query in queries]
        for name, spec in {"before": self.own.before, "after": self.model}.items():
            if spec is not None:
                rankings, mass = self._ranked(run, corpus, queries, spec)
                metrics[name] = self._measured(name, rankings, queries, lines) | {"mass": mass}
        if self.own.baselines and corpus.has_words:
            rankers: dict[str, Any] = {"bm25": BM25(corpus.words), "lsa": LSA(corpus.words)}
            for name, ranker in rankers.items():
                rankings = [[corpus.docids.keys[d] for d in ranker.ranking(words(q.text))] for q in queries]
                metrics[name] = self._measured(name, rankings, queries, lines)
        if run.state.is_main_process:
            write_text(
                folder / "rankings.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
        return metrics

    def _ranked(
        self, run: RunModels, corpus: Corpus, queries: Sequence[Query], spec: ModelSpec
    ) -> tuple[list[list[Any]], float]:
        """Documents for each query, those of one docid tied; and the mean probability of the docids found."""
        how = {"beams": self.own.beams, "length": self.own.length, "renormalise": self.own.renormalise}
        longest = tokenize_config(self.data).max_prompt_length
        found = corpus.found(run.frozen(spec), run.tokenizer(spec), queries, longest, **how)
        mass = [
            math.fsum(math.exp(one.score * (len(one.docid) if self.own.length == "mean" else 1)) for one in each)
            for each in found
        ]
        return [[corpus.docids.documents[one.docid] for one in each] for each in found], math.fsum(mass) / len(mass)

    def _measured(
        self, name: str, rankings: Sequence[Sequence[Any]], queries: Sequence[Query], lines: list[dict[str, Any]]
    ) -> dict[str, float]:
        """Means over queries with their 95 % intervals; those of each query go into its line."""
        per_query = ranking_metrics(rankings, [query.relevant for query in queries], self.own.metrics)
        for line, ranking, own in zip(lines, rankings, per_query, strict=True):
            line[name] = {"found": list(ranking[:10]), **own}
        found: dict[str, float] = {}
        for metric, mean in mean_metrics(per_query).items():
            found[metric] = mean
            if len(queries) > 1:
                interval = mean_interval([own[metric] for own in per_query])
                found |= {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        return found


def _check_index(stage: Stage, found: Mistakes) -> None:
    """Its `data:` must be an index stage's."""
    where = f"stages.{stage.name}.data"
    if stage.data.stage is None:
        found.add(where, "missing; expected '@STAGE', a stage of kind index")
    elif not found.about(where):
        check_reference(where, stage.data.stage, ("index",), stage.above, stage.recipe, found)
