"""`head_quantities`: log-probability, entropy and KL per token without the `[N, V]` logits.

Hidden states are projected in chunks of tokens; no more than a chunk of logits is alive. Backward computes
the chunk again and applies closed-form gradients (z are the logits, p and q the softmax of the model and of
the reference, e the one-hot label, H the entropy; the KL to a teacher is in `tokengrain.scoring.distil`):

    d logp / dz    = e - p
    d KL(q||p)/ dz = p - q
    d H / dz       = -p (log p + H)

Every gradient is a sum of per-token factors times such `[n, V]` matrices ("bases" below). If those of all
tokens fit in `KEEP_BYTES` they are kept from the forward pass and nothing is computed twice. Nor is it where
the head is frozen: then the products of bases and weight, `[N, H]`, are all that backward needs. The slow twin
is `tokengrain.scoring.head.reference_head_quantities`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokengrain.scoring import distil
from tokengrain.scoring.chunks import Job, Scratch, chunk_logits, softmax_, weighted_sum_
from tokengrain.scoring.head import Distribution, Head, accumulation_dtype, checked_reference
from tokengrain.scoring.teacher import Teacher, checked_teacher

QUANTITIES = ("logps", "entropy", "kl", "teacher_kl")


def head_quantities(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    want: Collection[str],
    reference: Distribution | None = None,
    teacher: Teacher | None = None,
    *,
    chunk_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Per-token quantities of the head's distribution, differentiable in `hidden`, weight and bias.

    Args:
        hidden: `[N, H]` last hidden states at the positions that predict the labels.
        head: the head.
        labels: long `[N]`, token ids.
        want: of "logps" (log-probability of the label, nats), "entropy" (nats), "kl" (forward KL of the
            reference to the model over the whole vocabulary, KL(q||p), nats) and "teacher_kl" (reverse KL of
            the model to the teacher, KL(p||q), nats, and with it the teacher's constants).
        reference: q of "kl", needed for it; it gets no gradient.
        teacher: q of "teacher_kl", needed for it; it gets no gradient.
        chunk_tokens: tokens projected at a time; None chooses by memory, and may keep what backward needs
            when all of it is small.

    Returns:
        `{name: [N]}` in float32 (float64 for float64 hidden states). "teacher_kl" brings without gradient
        "teacher_alpha", "tvd" (see `Teacher`) and "teacher_reward", log target - log contrast at the label.

    Raises:
        ModelError: "kl" without a reference, or with one of another vocabulary or number of tokens;
            "teacher_kl" without a teacher, with one of another number of tokens, or a label it does not have.
    """
    names = tuple(name for name in QUANTITIES if name in want)
    if not names:
        return {}
    if "kl" in names:
        reference = checked_reference(reference, head.vocab_size, hidden.shape[0])
        reference = reference.detach()
    else:
        reference = None
    teacher = checked_teacher(teacher, head.vocab_size, labels) if "teacher_kl" in names else None
    banned = teacher is not None and distil.may_ban(head, teacher)
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Inside the function gradients are always off, so whether there will be a backward is noted here.
    backward = torch.is_grad_enabled()
    job = Job(head.scale, head.softcap, labels, names, reference, teacher, banned, autocast, chunk_tokens, backward)
    with torch.autocast(device, enabled=False):
        values = _HeadQuantities.apply(hidden, head.weight, head.bias, job)
    return dict(zip(_outputs(job), values))


def _outputs(job: Job) -> tuple[str, ...]:
    return job.names + (distil.CONSTANTS if job.teacher is not None else ())


def _bases(
    names: Collection[str], p: Tensor, q: Tensor | None, taught: Tensor | None, labels: Tensor, slope: Tensor | None
) -> dict[str, Tensor]:
    """`[n, V]` matrices D such that dz = factor * D, factor as in `_factors`. Overwrites p, q and taught."""
    out = {}
    if "kl" in names:
        assert q is not None
        out["kl"] = torch.sub(p, q, out=q)
    if "teacher_kl" in names:
        assert taught is not None
        out["teacher_kl"] = taught
    if "entropy" in names:
        p_logp = torch.xlogy(p, p)
        out["entropy"] = p_logp.addcmul_(p, p_logp.sum(-1, keepdim=True), value=-1.0)
    if "logps" in names:
        out["logps"] = p.scatter_add_(1, labels[:, None], p.new_full((len(labels), 1), -1.0))
    if slope is not None:
        for basis in out.values():
            basis.mul_(slope)
    return out


def _factors(grads: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
    """Upstream gradients `[n]` with the sign and scale of each basis."""
    tempered = 1.0 if job.teacher is None else 1.0 / job.teacher.temperature
    by = {"logps": -1.0, "entropy": -1.0, "kl": 1.0, "teacher_kl": tempered}
    return {name: grad * by[name] for name, grad in grads.items()}


def _slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """Derivative of the soft cap, 1 - tanh^2, from capped logits."""
    return None if softcap is None else (capped / softcap).square_().neg_().add_(1.0)


class _HeadQuantities(torch.autograd.Function):
    """(hidden, weight, bias, job) -> one `[N]` tensor per output of the job."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        head = Head(weight, bias, job.scale, job.softcap)
        n, vocab, dtype = hidden.shape[0], weight.shape[0], accumulation_dtype(hidden.dtype)
        backward, (wants_hidden, *wants_head) = job.backward and any(ctx.needs_input_grad), ctx.needs_input_grad[:3]
        keep = backward and job.keeps(n, vocab, dtype)
        project = backward and not keep and wants_hidden and not any(wants_head)
        chunks = [slice(0, n)] if keep else job.chunks(n, vocab, dtype)
        scratch = Scratch(max((c.stop - c.start for c in chunks), default=0), vocab, dtype, hidden.device)
        values = {name: hidden.new_empty(n, dtype=dtype) for name in _outputs(job)}
        based = tuple(name for name in job.names if project or (keep and name != "entropy"))
        kept: dict[str, Tensor] = {}
        # The casts live as long as this call: `ctx` has the weights as they are stored.
        ready, typed = job.with_typed_reference(), job.typed(head)
        if project:
            compute = job.compute(head)
            kept = {name: hidden.new_empty(hidden.shape, dtype=compute) for name in based}
        for rows in chunks:
            bases = _forward_chunk(hidden, typed, ready, rows, values, based, scratch)
            if project:
                for name, basis in bases.items():
                    torch.mm(basis.to(compute), typed.weight, out=kept[name][rows])
            else:
                kept.update(bases)
        ctx.save_for_backward(hidden, weight, bias, *kept.values())
        ctx.job, ctx.kept_names, ctx.projected = job, tuple(kept), project
        ctx.constants = () if job.teacher is None else (values["teacher_kl"].clone(), values["teacher_alpha"].clone())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(values[name] for name in _outputs(job)[len(job.names) :]))
        return tuple(values.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        kept = dict(zip(ctx.kept_names, rest))
        factors = _factors({name: g for name, g in zip(ctx.job.names, grads) if g is not None}, ctx.job)
        if not factors:
            return None, None, None, None
        job: Job = replace(ctx.job, names=tuple(factors))
        if ctx.projected:
            d_hidden = sum(kept[name] * (factor * job.scale)[:, None] for name, factor in factors.items())
            return d_hidden.to(hidden.dtype), None, None, None
        head = Head(weight, bias, job.scale, job.softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            return (*_backward(hidden, head, job, factors, kept, ctx), None)


def _forward_chunk(
    hidden: Tensor,
    head: Head,
    job: Job,
    rows: slice,
    values: dict[str, Tensor],
    based: Collection[str],
    scratch: Scratch,
) -> dict[str, Tensor]:
    """Fills `values[name][rows]`; returns the bases of the names in `based`."""
    n, labels = rows.stop - rows.start, job.labels[rows]
    logits = chunk_logits(hidden[rows], head, job.compute(head), scratch, "p")
    slope = _slope(logits, head.softcap) if based else None
    logp = q = taught = None
    if job.teacher is not None:
        student = distil.student_logits(logits, job, scratch)
        logp, taught = distil.forward_chunk(student, job, rows, values, scratch, head.vocab_size, basis=bool(based))
        logp = logp if student is logits else None
    if logp is None:
        logp = softmax_(logits, log=True)
    if "logps" in values:
        values["logps"][rows] = logp.gather(1, labels[:, None]).squeeze(1)
    if "kl" in values:
        assert job.reference is not None
        logq = _reference_softmax(job.reference, rows, job, scratch, log=True)
        q = scratch("q", n)
        torch.exp(logq, out=q)
        values["kl"][rows] = weighted_sum_(q, logq.sub_(logp))
    if "entropy" in values:
        p = torch.exp(logp, out=scratch("entropy", n))
        values["entropy"][rows] = -weighted_sum_(p, logp.clone() if based else logp)
    if not based:
        return {}
    return _bases(based, _exp_(logp, based), q, taught, labels, slope)


def _exp_(logp: Tensor, names: Collection[str]) -> Tensor:
    """Probabilities, written over their logarithms, if any of the bases needs them."""
    return logp if tuple(names) == ("teacher_kl",) else logp.exp_()


def _reference_softmax(reference: Distribution, rows: slice, job: Job, scratch: Scratch, *, log: bool) -> Tensor:
    compute = job.compute(reference.head)
    return softmax_(chunk_logits(reference.hidden[rows], reference.head, compute, scratch, "log q"), log=log)


def _backward(
    hidden: Tensor, head: Head, job: Job, factors: dict[str, Tensor], kept: dict[str, Tensor], ctx: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias."""
    (n, _), vocab, dtype = hidden.shape, head.vocab_size, accumulation_dtype(hidden.dtype)
    use_kept = bool(kept) and set(job.names) <= set(kept)
    chunks = [slice(0, n)] if use_kept else job.chunks(n, vocab, dtype)
    scratch = Scratch(max((c.stop - c.start for c in chunks), default=0), vocab, dtype, hidden.device)
    compute, typed = job.compute(head), job.typed(head)
    ready = job if use_kept else job.with_typed_reference()
    needed = ctx.needs_input_grad
    d_hidden = torch.empty_like(hidden) if needed[0] else None
    # Low-precision weights: many chunks are added up in float32.
    exact = compute == head.weight.dtype and (len(chunks) == 1 or dtype == head.weight.dtype)
    sum_dtype = head.weight.dtype if exact else dtype
    d_weight = torch.zeros(head.weight.shape, dtype=sum_dtype, device=hidden.device) if needed[1] else None
    d_bias = torch.zeros(vocab, dtype=dtype, device=hidden.device) if needed[2] else None
    for rows in chunks:
        bases = kept if use_kept else _recomputed_bases(hidden, typed, ready, rows, scratch, ctx.constants)
        basis, factor = _combined(bases, {name: f[rows] for name, f in factors.items()}, scratch, use_kept)
        scaled = basis.to(compute)
        if d_hidden is not None:
            d_hidden[rows] = (scaled @ typed.weight) * (factor * job.scale)[:, None]
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
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(head.bias.dtype)  # type: ignore[union-attr]  # then there is a bias


def _recomputed_bases(
    hidden: Tensor, head: Head, job: Job, rows: slice, scratch: Scratch, constants: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The bases of a chunk again; `constants` are the teacher's KL and strength of all tokens."""
    logits = chunk_logits(hidden[rows], head, job.compute(head), scratch, "p")
    slope = _slope(logits, head.softcap)
    p = q = taught = None
    if "teacher_kl" in job.names:
        student = distil.student_logits(logits, job, scratch)
        kl, strength = (values[rows] for values in constants)
        own, taught = distil.recomputed_chunk(student, job, rows, kl, strength, scratch, head.vocab_size)
        p = own if student is logits else None
    if p is None:
        p = softmax_(logits, log=False)
    if "kl" in job.names:
        assert job.reference is not None
        q = _reference_softmax(job.reference, rows, job, scratch, log=False)
    return _bases(job.names, p, q, taught, job.labels[rows], slope)


def _combined(
    bases: dict[str, Tensor], factors: dict[str, Tensor], scratch: Scratch, keep: bool
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
