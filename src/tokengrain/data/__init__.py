"""Rows of text -> samples of token ids: formats, chat templates, the seam, truncation, rewards."""

from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import (
    IterablePairDataset,
    PairDataset,
    collate,
    prepare_pairs,
    prepare_sft,
)
from tokengrain.data.loading import load_rows, split_rows
from tokengrain.data.report import Report
from tokengrain.data.rows import Rows, RowStream, StoredRows
from tokengrain.data.spans import SpanConfig, diff_spans, parse_span_tags
from tokengrain.data.tokenize import tokenizer_fingerprint

__all__ = [
    "IterablePairDataset",
    "PairDataset",
    "Report",
    "RowStream",
    "Rows",
    "SpanConfig",
    "StoredRows",
    "TokenizeConfig",
    "collate",
    "diff_spans",
    "load_rows",
    "parse_span_tags",
    "prepare_pairs",
    "prepare_sft",
    "split_rows",
    "tokenizer_fingerprint",
]
