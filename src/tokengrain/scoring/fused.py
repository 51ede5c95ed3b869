"""`head_quantities`: log-probability, entropy and KL per token without the `[N, V]` logits.

Hidden states are projected in chunks of tokens; no more than a chunk of logits is alive. Backward computes
the chunk again and applies closed-form gradients (z are the logits, p and q the softmax of the model and of
the reference, e the one-hot label, H the entropy):

    d logp / dz    = e - p
    d KL(q||p)/ dz = p - q
    d H / dz       = -p (log p + H)

Every gradient is a sum of per-token factors times such `[n, V]` matrices ("bases" below). If those of all
tokens fit in `KEEP_BYTES` they are kept from the forward pass and nothing is computed twice. The slow twin
is `tokengrain.scoring.head.reference_head_quantities`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokengrain.scoring.head import Distribution, Head, accumulation_dtype, checked_reference

QUANTITIES = ("logps", "entropy", "kl")
# Logits of one chunk, and bases that may be kept for backward, in bytes per device type.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
KEEP_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
# Fewer tokens than this per chunk and adding to the weight's gradient costs more than the products.
MIN_CHUNK_TOKENS = 128


def head_quantities(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    want: Collection[str],
    reference: Distribution | None = None,
    *,
    chunk_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Per-token quantities of the head's distribution, differentiable in `hidden`, weight and bias.

    Args:
        hidden: `[N, H]` last hidden states at the positions that predict the labels.
        head: the head.
        labels: long `[N]`, token ids.
        want: of "logps" (log-probability of the label, nats), "entropy" (nats) and "kl" (forward KL of the
            reference to the model over the whole vocabulary, KL(q||p), nats).
        reference: q, needed for "kl"; it gets no gradient.
        chunk_tokens: tokens projected at a time; None chooses by memory, and may keep what backward needs
            when all of it is small.

    Returns:
        `{name: [N]}` in float32 (float64 for float64 hidden states).

    Raises:
        ModelError: "kl" without a reference, or with one of another vocabulary or number of tokens.
    """
    names = tuple(name for name in QUANTITIES if name in want)
    if not names:
        return {}
    if "kl" in names:
        reference = checked_reference(reference, head.vocab_size, hidden.shape[0])
        reference = Distribution(reference.hidden.detach(), reference.head.detach())
    else:
        reference = None
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Inside the function gradients are always off, so whether there will be a backward is noted here.
    backward = torch.is_grad_enabled()
    job = _Job(head.scale, head.softcap, labels, names, reference, autocast, chunk_tokens, backward)
    with torch.autocast(device, enabled=False):
        values = _HeadQuantities.apply(hidden, head.weight, head.bias, job)
    return dict(zip(names, values))


@dataclass
class _Job:
    """What a fused call computes; everything in it is a constant of the gradient."""

    scale: float
    softcap: float | None
    labels: Tensor
    names: tuple[str, ...]
    reference: Distribution | None
    autocast: torch.dtype | None
    chunk_tokens: int | None
    backward: bool

    def compute(self, head: Head) -> torch.dtype:
        """The type of the matrix products."""
        return head.weight.dtype if self.autocast is None else self.autocast

    def chunks(self, n: int, vocab: int, dtype: torch.dtype) -> list[slice]:
        rows = self.chunk_tokens
        if rows is None:
            room = CHUNK_BYTES.get(self.labels.device.type, CHUNK_BYTES["cuda"])
            rows = max(MIN_CHUNK_TOKENS, room // (vocab * dtype.itemsize))
            # Even chunks: the last one is not a sliver.
            rows = -(-n // -(-n // rows)) if n else rows
        return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]

    def keeps(self, n: int, vocab: int, dtype: torch.dtype) -> bool:
        """Whether the bases of all tokens may stay in memory until backward (entropy's are not kept)."""
        kept = sum(name != "entropy" for name in self.names)
        room = KEEP_BYTES.get(self.labels.device.type, KEEP_BYTES["cuda"])
        return self.chunk_tokens is None and 0 < kept * n * vocab * dtype.itemsize <= room


class _Scratch:
    """Named `[rows, V]` buffers, reused by every chunk: on CPU fresh memory costs a pass over it."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = (rows, vocab), dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.buffers[name][:rows]


def _logits(hidden: Tensor, head: Head, compute: torch.dtype, scratch: _Scratch, name: str) -> Tensor:
    """Logits of a chunk `[n, V]`, in the accumulation type."""
    out = scratch(name, hidden.shape[0])
    hidden = hidden if head.scale == 1.0 else hidden * head.scale
    hidden, weight = hidden.to(compute), head.weight.to(compute)
    if out.dtype == compute:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    if head.bias is not None:
        out.add_(head.bias.to(out.dtype), alpha=head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _softmax_(logits: Tensor, *, log: bool) -> Tensor:
    """Softmax of every row, written over the logits on CPU, where memory traffic is what counts."""
    operation = torch.log_softmax if log else torch.softmax
    if logits.device.type == "cpu":
        return operation(logits, -1, out=logits)
    return operation(logits, -1)


def _bases(
    names: Collection[str], p: Tensor, q: Tensor | None, labels: Tensor, slope: Tensor | None
) -> dict[str, Tensor]:
    """`[n, V]` matrices D such that dz = factor * D, factor as in `_factors`. Overwrites p and q."""
    out = {}
    if "kl" in names:
        assert q is not None
        out["kl"] = torch.sub(p, q, out=q)
    if "entropy" in names:
        p_logp = torch.xlogy(p, p)
        out["entropy"] = p_logp.addcmul_(p, p_logp.sum(-1, keepdim=True), value=-1.0)
    if "logps" in names:
        out["logps"] = p.scatter_add_(1, labels[:, None], p.new_full((len(labels), 1), -1.0))
    if slope is not None:
        for basis in out.values():
            basis.mul_(slope)
    return out


def _factors(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream gradients `[n]` with the sign of each basis."""
    return {name: grad if name == "kl" else -grad for name, grad in grads.items()}


def _slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """Derivative of the soft cap, 1 - tanh^2, from capped logits."""
    return None if softcap is None else (capped / softcap).square_().neg_().add_(1.0)


class _HeadQuantities(torch.autograd.Function):
    """(hidden, weight, bias, job) -> one `[N]` tensor per name of the job."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        head = Head(weight, bias, job.scale, job.softcap)
        n, vocab, dtype = hidden.shape[0], weight.shape[0], accumulation_dtype(hidden.dtype)
        keep = job.backward and any(ctx.needs_input_grad) and job.keeps(n, vocab, dtype)
        chunks = [slice(0, n)] if keep else job.chunks(n, vocab, dtype)
        scratch = _Scratch(max((c.stop - c.start for c in chunks), default=0), vocab, dtype, hidden.device)
        values = {name: hidden.new_empty(n, dtype=dtype) for name in job.names}
        kept: dict[str, Tensor] = {}
        for rows in chunks:
            bases = _forward_chunk(hidden, head, job, rows, values, keep, scratch)
            kept.update(bases)
        reference = job.reference
        saved = [] if reference is None else [reference.hidden, reference.head.weight, reference.head.bias]
        names = tuple(kept)
        ctx.save_for_backward(hidden, weight, bias, *saved, *kept.values())
        ctx.job, ctx.kept_names, ctx.n_saved = replace(job, reference=None), names, len(saved)
        ctx.reference_head = None if reference is None else (reference.head.scale, reference.head.softcap)
        ctx.set_materialize_grads(False)
        return tuple(values[name] for name in job.names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        job: _Job = ctx.job
        reference = None
        if ctx.n_saved:
            ref_hidden, ref_weight, ref_bias = rest[:3]
            reference = Distribution(ref_hidden, Head(ref_weight, ref_bias, *ctx.reference_head))
        kept = dict(zip(ctx.kept_names, rest[ctx.n_saved :]))
        factors = _factors({name: g for name, g in zip(job.names, grads) if g is not None})
        if not factors:
            return None, None, None, None
        job = replace(job, reference=reference, names=tuple(factors))
        head = Head(weight, bias, job.scale, job.softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            return (*_backward(hidden, head, job, factors, kept, ctx.needs_input_grad), None)


def _forward_chunk(
    hidden: Tensor,
    head: Head,
    job: _Job,
    rows: slice,
    values: dict[str, Tensor],
    keep: bool,
    scratch: _Scratch,
) -> dict[str, Tensor]:
    """Fills `values[name][rows]`; returns the bases to keep, if any."""
    n, labels = rows.stop - rows.start, job.labels[rows]
    logits = _logits(hidden[rows], head, job.compute(head), scratch, "p")
    slope = _slope(logits, head.softcap) if keep else None
    logp = _softmax_(logits, log=True)
    q = None
    if "logps" in values:
        values["logps"][rows] = logp.gather(1, labels[:, None]).squeeze(1)
    if "kl" in values:
        assert job.reference is not None
        logq = _reference_softmax(job.reference, rows, job, scratch, log=True)
        q = scratch("q", n)
        torch.exp(logq, out=q)
        values["kl"][rows] = _weighted_sum_(q, logq.sub_(logp))
    if "entropy" in values:
        p = torch.exp(logp, out=scratch("entropy", n))
        values["entropy"][rows] = -_weighted_sum_(p, logp if not keep else logp.clone())
    if not keep:
        return {}
    p = logp.exp_()
    return _bases([name for name in job.names if name != "entropy"], p, q, labels, slope)


def _weighted_sum_(weights: Tensor, terms: Tensor) -> Tensor:
    """`sum(weights * terms)` per row, where zero weights count 0 whatever the term. Overwrites `terms`."""
    out = terms.mul_(weights).sum(-1)
    if not bool(torch.isfinite(out).all()):
        out = terms.masked_fill_(weights == 0, 0.0).sum(-1)
    return out


def _reference_softmax(reference: Distribution, rows: slice, job: _Job, scratch: _Scratch, *, log: bool) -> Tensor:
    compute = job.compute(reference.head)
    return _softmax_(_logits(reference.hidden[rows], reference.head, compute, scratch, "log q"), log=log)


def _backward(
    hidden: Tensor,
    head: Head,
    job: _Job,
    factors: dict[str, Tensor],
    kept: dict[str, Tensor],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias."""
    (n, _), vocab, dtype = hidden.shape, head.vocab_size, accumulation_dtype(hidden.dtype)
    use_kept = bool(kept) and set(job.names) <= set(kept)
    chunks = [slice(0, n)] if use_kept else job.chunks(n, vocab, dtype)
    scratch = _Scratch(max((c.stop - c.start for c in chunks), default=0), vocab, dtype, hidden.device)
    compute = job.compute(head)
    weight = head.weight.to(compute)
    d_hidden = torch.empty_like(hidden) if needed[0] else None
    # Low-precision weights: many chunks are added up in float32.
    exact = compute == head.weight.dtype and (len(chunks) == 1 or dtype == head.weight.dtype)
    sum_dtype = head.weight.dtype if exact else dtype
    d_weight = torch.zeros(head.weight.shape, dtype=sum_dtype, device=hidden.device) if needed[1] else None
    d_bias = torch.zeros(vocab, dtype=dtype, device=hidden.device) if needed[2] else None
    for rows in chunks:
        bases = kept if use_kept else _recomputed_bases(hidden, head, job, rows, scratch)
        basis, factor = _combined(bases, {name: f[rows] for name, f in factors.items()}, scratch, use_kept)
        scaled = basis.to(compute)
        if d_hidden is not None:
            d_hidden[rows] = (scaled @ weight) * (factor * job.scale)[:, None]
        if d_weight is not None:
            weighted = (hidden[rows] * (factor * job.scale)[:, None]).to(compute)
            if exact:
                d_weight.addmm_(scaled.t(), weighted)
            else:
                d_weight.add_(scaled.t() @ weighted)
        if d_bias is not None:
            d_bias.addmv_(basis.t(), factor * job.scale)
    if d_weight is not None:
        d_weight = d_weight.to(head.weight.dtype)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(head.bias.dtype)  # type: ignore[union-attr]


def _recomputed_bases(hidden: Tensor, head: Head, job: _Job, rows: slice, scratch: _Scratch) -> dict[str, Tensor]:
    logits = _logits(hidden[rows], head, job.compute(head), scratch, "p")
    slope = _slope(logits, head.softcap)
    p, q = _softmax_(logits, log=False), None
    if "kl" in job.names:
        assert job.reference is not None
        q = _reference_softmax(job.reference, rows, job, scratch, log=False)
    return _bases(job.names, p, q, job.labels[rows], slope)


def _combined(
    bases: dict[str, Tensor], factors: dict[str, Tensor], scratch: _Scratch, keep: bool
) -> tuple[Tensor, Tensor]:
    """(D, f) with dz = f * D. One basis needs no pass over `[n, V]`: its factor goes into small matrices."""
    (name, factor), *more = factors.items()
    basis = bases[name]
    if not more:
        return basis, factor
    # Kept bases must survive: backward may run again on a retained graph.
    total = torch.mul(basis, factor[:, None], out=scratch("sum", len(factor)) if keep else basis)
    for name, factor in more:
        total.addcmul_(bases[name], factor[:, None])
    return total, torch.ones_like(factor)
