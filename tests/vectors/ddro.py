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
from tokengrain.retrieval.docids import GENERIC_TERMS, ProductQuantiser, code_tokens, title_url
from tokengrain.retrieval.metrics import mean_metrics, ranking_metrics
from tokengrain.retrieval.search import Trie, beam_search
from tokengrain.retrieval.words import stratum_sizes


@adapter("ddro", "ddro_loss")
def loss(case: Case) -> dict[str, Any]:
    """Positions are not shifted: position t scores label t."""
    settings, x = case.settings("beta", "nll_weight"), case.inputs
    labels = [_padded(x[f"{side}_labels"]) for side in ("pos", "neg")]
    masks = [
        _padded(x[f"{side}_mask"]).bool() if f"{side}_mask" in x else torch.ones_like(label, dtype=torch.bool)
        for side, label in zip(("pos", "neg"), labels)
    ]
    pairs = Pairs(*masks)

    def logps(model: str) -> Tensor:
        logits = (_padded(x[f"{model}_{side}_logits"]) for side in ("pos", "neg"))
        return from_logits(pairs.flat(*logits), pairs.flat(*labels), ("logps",))["logps"]

    policy, ref = logps("policy"), logps("ref")
    output = ddro_loss(policy, pairs.segments, ref_logps=ref, **settings)
    value = make_normaliser("mean")(output, pairs.counts)
    (gradient,) = torch.autograd.grad(value, policy, retain_graph=True)
    ref_sums = pairs.segments.pairs(pairs.segments.sum(ref))
    m = output.metrics
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
        **dict(zip(("grad_pos_token_logps", "grad_neg_token_logps"), pairs.padded(gradient))),
    }


@adapter("ddro", "docid_sft_loss")
def docid_sft(case: Case) -> dict[str, Any]:
    """With padding: the authors' labels, of which every position counts. Without: those of the docids."""
    p, x = case.settings("pad_id", "eos_id", "decoder_start_id"), case.inputs
    logits, labels = _padded(x["logits"]).detach().requires_grad_(), _padded(x["labels"])
    mask = _padded(x["mask"]).bool() if "mask" in x else labels != p.get("pad_id", 0)
    results: dict[str, Any] = {}
    for name, counted in (("pad_counts", torch.ones_like(mask)), ("pad_ignored", mask)):
        rows = Rows(counted)
        logps = from_logits(rows.flat(logits), rows.flat(labels), ("logps",))["logps"]
        value = rows.normalised(sft_loss(logps, rows.segments), "mean")
        (results[f"grad_logits_{name}"],) = torch.autograd.grad(value, logits)
        results[f"loss_{name}"] = value.detach()
    return results | {"decoder_input_ids": F.pad(labels[:, :-1], (1, 0), value=p["decoder_start_id"])}


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
    p = case.settings("num_beams", "num_return", "max_new_tokens", "start_id", "pad_id", "eos_id", "append_eos")
    table = {tuple(map(int, key.split(","))): row for key, row in case.inputs["logprob_table"].items()}
    end = [p["eos_id"]] if p.get("append_eos") else []
    trie = Trie([_ints(d) + end for d in case.inputs["docids"]])
    # The lists have docids with their end tokens or without.
    shown = {i for docids in (v for k, v in case.expected.items() if "ranked" in k) for d in docids for i in d}

    def ranked(beams: int, count: int, length: Any) -> tuple[list[list[int]], list[float]]:
        prefixes: list[tuple[int, ...]] = [()]

        def step(parents: Tensor, tokens: Tensor) -> Tensor:
            prefixes[:] = [(*prefixes[b], t) for b, t in zip(parents.tolist(), tokens.tolist())]
            return torch.tensor([table[prefix] for prefix in prefixes], dtype=torch.float64)

        (found,) = beam_search(step, 1, trie, start_id=p["start_id"], beams=beams, length=length)
        cut = len(end) if p["eos_id"] not in shown else 0
        return [list(d[: len(d) - cut]) for d, _ in found[:count]], [score for _, score in found[:count]]

    results: dict[str, Any] = {}
    results["ranked"], results["scores"] = ranked(p["num_beams"], p["num_return"], "sum")
    normalised = ranked(p["num_beams"], p["num_return"], "mean")
    results["ranked_length_normalised"], results["scores_length_normalised"] = normalised
    results["exhaustive_ranked"], results["exhaustive_scores"] = ranked(len(trie), len(trie), "sum")
    return results


@adapter("ddro", "ranking_metrics")
def metrics(case: Case) -> dict[str, Any]:
    names = case.settings("metrics")["metrics"]
    per_query = ranking_metrics(case.inputs["predictions"], case.inputs["truth"], names)
    return {"per_query": per_query, "mean": mean_metrics(per_query)}


@adapter("ddro", "pq_docid")
def pq_docid(case: Case) -> dict[str, Any]:
    p = case.settings("vocab_size", "level_stride")
    codes = ProductQuantiser(case.inputs["codewords"]).encode(case.inputs["vectors"])
    return {"codes": codes, "docid_tokens": code_tokens(codes, p["vocab_size"], p.get("level_stride"))}


@adapter("ddro", "tu_docid_string")
def title_and_url(case: Case) -> dict[str, Any]:
    p = case.settings(generic_terms="generic", min_segment_chars="shortest")
    generic, shortest = p.get("generic", GENERIC_TERMS), p.get("shortest", 3)
    items = case.inputs["items"]
    return {"strings": [title_url(i.get("url"), i.get("title"), generic=generic, shortest=shortest) for i in items]}


@adapter("ddro", "negative_group_sizes")
def negative_groups(case: Case) -> dict[str, Any]:
    p = case.settings("n_negatives", "scheme")
    remainder = {"ms_marco": "last", "msmarco": "last", "nq": "first"}[p["scheme"].lower()]
    sizes, again = stratum_sizes(p["n_negatives"], len(case.inputs["rank_ranges"]), remainder)  # type: ignore[arg-type]
    return {"top_mid_lower": sizes, "refill_from_top_with_replacement": again}


def _ints(values: Any) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
