from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.vectors.layout import Pairs, from_logits
from tests.vectors.rows import Rows, _padded
from tests.vectors.runner import Case, adapter
from tokengrain.loss import make_normaliser
from tokengrain.methods.ddro import ddro_loss
from tokengrain.methods.dpo import sft_loss
from tokengrain.retrieval.docids import GENERIC_TERMS, ProductQuantiser, code_tokens, padded, title_url
from tokengrain.retrieval.metrics import mean_metrics, ranking_metrics
from tokengrain.retrieval.search import Trie, beam_search
from tokengrain.retrieval.words import stratum_sizes


def _counted(x: dict[str, Any], name: str, labels: Any, pad_id: int | None, pad_counts: bool = False) -> Tensor:
    """Which labels count, bool `[B, L]`: by the mask; without one all but -100 and padding, and none beyond a row."""
    if name in x and not pad_counts:
        return _padded(x[name]).bool()
    rows = labels if isinstance(labels, list) else list(labels)
    within = _padded([torch.ones_like(row) for row in rows]).bool()
    there = _padded(labels)
    return within & (there != -100) & (torch.ones_like(within) if pad_counts or pad_id is None else there != pad_id)


@adapter("ddro", "ddro_loss")
def loss(case: Case) -> dict[str, Any]:
    """Positions are not shifted: position t scores label t. Without labels the log-probabilities are given."""
    p, x = case.settings("beta", "nll_weight", "pad_id", "eos_id", "decoder_start_id", "pad_counts"), case.inputs
    settings = {name: p[name] for name in ("beta", "nll_weight") if name in p}
    shapes = [x[f"{side}_labels"] if f"{side}_labels" in x else _logps(x, "policy", side) for side in ("pos", "neg")]
    about = p.get("pad_id") if "pos_labels" in x else None, bool(p.get("pad_counts"))
    pairs = Pairs(*(_counted(x, f"{side}_mask", shape, *about) for side, shape in zip(("pos", "neg"), shapes)))

    def logps(model: str) -> Tensor:
        if f"{model}_pos_logits" not in x:
            return pairs.flat(*(_padded(_logps(x, model, side)) for side in ("pos", "neg")))
        logits = (_padded(x[f"{model}_{side}_logits"]) for side in ("pos", "neg"))
        return from_logits(pairs.flat(*logits), pairs.flat(*map(_padded, shapes)), ("logps",))["logps"]

    policy, ref = logps("policy"), logps("ref")
    output = ddro_loss(policy, pairs.segments, ref_logps=ref, **settings)
    value = make_normaliser("mean")(output, pairs.counts)
    ref_sums = pairs.segments.pairs(pairs.segments.sum(ref))
    m, gradient = output.metrics, {}
    if policy.requires_grad:
        (grad,) = torch.autograd.grad(value, policy, retain_graph=True)
        gradient = dict(zip(("grad_pos_token_logps", "grad_neg_token_logps"), pairs.padded(grad)))
    return {
        "loss": value,
        "per_example": output.losses,
        "pos_logps": m["logps/chosen"],
        "neg_logps": m["logps/rejected"],
        "ref_pos_logps": ref_sums[0],
        "ref_neg_logps": ref_sums[1],
        "pos_reward": m["rewards/chosen"],
        "neg_reward": m["rewards/rejected"],
        **dict(zip(("pos_token_logps", "neg_token_logps"), pairs.padded(policy))),
        **gradient,
    }


def _logps(x: dict[str, Any], model: str, side: str) -> Any:
    return next(x[name] for name in (f"{model}_{side}_token_logps", f"{model}_{side}_logps") if name in x)


@adapter("ddro", "docid_sft_loss")
def docid_sft(case: Case) -> dict[str, Any]:
    """With padding: the authors' labels, of which every position counts. Without: those of the docids."""
    p, x = case.settings("pad_id", "eos_id", "decoder_start_id", "pad_counts"), case.inputs
    pad_id, logits = p.get("pad_id", 0), x["logits"]
    logits = [row if row.requires_grad else row.requires_grad_() for row in logits]
    own = _counted(x, "mask", x["labels"], pad_id)
    labels = torch.tensor(padded([row.tolist() for row in x["labels"]], pad_id))
    labels = labels.masked_fill(labels == -100, pad_id)
    results: dict[str, Any] = {}
    for name, counted in (("pad_counts", torch.ones_like(labels).bool()), ("pad_ignored", own)):
        # Rows of logits as long as their own docids say nothing about padding.
        rows = Rows(counted & _padded([torch.ones(len(row)) for row in logits]).bool())
        logps = from_logits(rows.flat(logits), rows.flat(labels), ("logps",))["logps"]
        value = rows.normalised(sft_loss(logps, rows.segments), "mean")
        results[f"grad_logits_{name}"] = _padded(list(torch.autograd.grad(value, logits, retain_graph=True)))
        results[f"loss_{name}"] = value
    results["loss"] = results["loss_pad_counts" if p.get("pad_counts") else "loss_pad_ignored"]
    return results | {"decoder_input_ids": F.pad(labels[:, :-1], (1, 0), value=p.get("decoder_start_id", 0))}


@adapter("ddro", "trie_allowed")
def trie_allowed(case: Case) -> dict[str, Any]:
    """The authors' trie counts a sequence as often as it is put in, and lists those that end at a leaf."""
    case.settings()
    sequences = [_ints(s) for s in case.inputs["sequences"]]
    trie = Trie(sequences)
    return {
        "allowed": [trie.allowed(_ints(prefix)) for prefix in case.inputs["prefixes"]],
        "size": len(sequences),
        "enumerated": [list(s) for s in trie if not trie.allowed(s)],
    }


@adapter("ddro", "constrained_beam_search")
def constrained_beam_search(case: Case) -> dict[str, Any]:
    names = ("num_beams", "num_return", "max_new_tokens", "start_id", "pad_id", "eos_id", "append_eos", "renormalise")
    p = case.settings(*names, renormalised="renormalise")
    rows = {key: [float(value) for value in row] for key, row in case.inputs["logprob_table"].items()}
    table = {tuple(map(int, key.split(","))): row for key, row in rows.items()}
    end = [p["eos_id"]] if p.get("append_eos") else []
    trie = Trie([_ints(d) + end for d in case.inputs["docids"]])
    # The lists have docids with their end tokens or without.
    shown = {i for docids in (v for k, v in case.expected.items() if "ranked" in k) for d in docids for i in d}

    def ranked(beams: int, count: int, length: Any, share: bool) -> tuple[list[list[int]], list[float]]:
        prefixes: list[tuple[int, ...]] = [()]

        def step(parents: Tensor, tokens: Tensor) -> Tensor:
            prefixes[:] = [(*prefixes[b], t) for b, t in zip(parents.tolist(), tokens.tolist())]
            return torch.tensor([table[prefix] for prefix in prefixes], dtype=torch.float64)

        options = {"start_id": p["start_id"], "beams": beams, "length": length, "renormalise": share}
        (found,) = beam_search(step, 1, trie, **options)
        cut = len(end) if p["eos_id"] not in shown else 0
        return [list(d[: len(d) - cut]) for d, _ in found[:count]], [score for _, score in found[:count]]

    results: dict[str, Any] = {}
    sizes, whole, share = (p["num_beams"], p.get("num_return", p["num_beams"])), (len(trie),) * 2, p.get("renormalise")
    asked: dict[str, Any] = {"": (*sizes, "sum"), "_length_normalised": (*sizes, "mean"), "exhaustive": (*whole, "sum")}
    for name, how in asked.items():
        keys = (
            ("exhaustive_ranked", "exhaustive_scores") if name == "exhaustive" else (f"ranked{name}", f"scores{name}")
        )
        results |= dict(zip(keys, ranked(*how, bool(share))))
        for key, value in zip(keys, ranked(*how, True)):
            results |= {f"{key}_{word}": value for word in ("renormalised", "renormalise")}
    return results


@adapter("ddro", "ranking_metrics")
def metrics(case: Case) -> dict[str, Any]:
    names = case.settings("metrics")["metrics"]
    # Documents may be numbers; those of one docid are listed together, or a table says which they are.
    listed = {name: _plain(case.inputs[name]) for name in ("predictions", "truth")}
    truth = [found if isinstance(found, list) else [found] for found in listed["truth"]]
    table = next((value for value in case.inputs.values() if isinstance(value, dict)), {})

    def documents(docid: Any) -> Any:
        key = ",".join(map(str, docid)) if isinstance(docid, list) else str(docid)
        return table.get(key, docid)

    predictions = [[documents(docid) for docid in each] for each in listed["predictions"]]
    per_query = ranking_metrics(predictions, truth, names)
    return {"per_query": per_query, "mean": mean_metrics(per_query)}


@adapter("ddro", "pq_docid")
def pq_docid(case: Case) -> dict[str, Any]:
    p = case.settings("vocab_size", "level_stride")
    quantiser = ProductQuantiser(case.inputs["codewords"])
    codes, stride = quantiser.encode(case.inputs["vectors"]), p.get("level_stride", quantiser.codewords.shape[1])
    return {"codes": codes, "docid_tokens": code_tokens(codes, p["vocab_size"], stride)}


@adapter("ddro", "tu_docid_string")
def title_and_url(case: Case) -> dict[str, Any]:
    p = case.settings(generic_terms="generic", min_segment_chars="shortest")
    generic, shortest = p.get("generic", GENERIC_TERMS), p.get("shortest", 3)
    items = case.inputs["items"]
    return {"strings": [title_url(i.get("url"), i.get("title"), generic=generic, shortest=shortest) for i in items]}


@adapter("ddro", "negative_group_sizes")
def negative_groups(case: Case) -> dict[str, Any]:
    p = case.settings("n_negatives", "scheme")
    remainder: Any = {"ms_marco": "last", "msmarco": "last", "nq": "first"}[p["scheme"].lower()]
    sizes, again = stratum_sizes(p["n_negatives"], len(case.inputs["rank_ranges"]), remainder)
    return {"top_mid_lower": sizes, "refill_from_top_with_replacement": again}


def _plain(values: Any) -> Any:
    """Nested lists without tensors, whole numbers as such."""
    if isinstance(values, Tensor):
        return values.long().tolist()
    return [_plain(value) for value in values] if isinstance(values, list) else values


def _ints(values: Any) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
