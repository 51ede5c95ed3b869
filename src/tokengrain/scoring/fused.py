"""`head_quantities`: log-probability, entropy and KL per token without the `[N, V]` logits.

Hidden states are projected in chunks of tokens. Backward computes each chunk again and applies closed-form gradients
(z are the logits, p and q the softmax of the model and of the reference, e the one-hot label, H the entropy; the KL to
a teacher stands at the end of the file):

    d logp / dz    = e - p
    d KL(q||p)/ dz = p - q
    d H / dz       = -p (log p + H)

Every gradient is a sum of per-token factors times such `[n, V]` matrices ("bases" below). They are kept from the
forward pass if all of them fit in `KEEP_BYTES`; of a frozen head the products of bases and weight, `[N, H]`, are kept.
The slow twin is `tokengrain.scoring.head.logits_quantities`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokengrain.errors import ModelError, require
from tokengrain.scoring.head import Distribution, Head, Teacher, accumulation_dtype, checked_reference, checked_teacher

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
    sparing: bool = False,
) -> dict[str, Tensor]:
    """Per-token quantities `{name: [N]}` of the head's distribution, differentiable in `hidden`, weight and bias.

    In float32 (float64 for float64 hidden states). "teacher_kl" brings without gradient "teacher_alpha", "tvd" (see
    `Teacher`) and "teacher_reward", log target - log contrast at the label.

    Args:
        hidden: `[N, H]` last hidden states at the positions that predict the labels.
        labels: long `[N]`, token ids.
        want: of "logps", "entropy", "kl" (KL(q||p) over the whole vocabulary) and "teacher_kl" (KL(p||q)), all in nats.
        reference, teacher: q of "kl" and of "teacher_kl", needed for them; they get no gradient.
        chunk_tokens: tokens projected at a time; None chooses by memory, and may keep what backward needs.
        sparing: where memory chooses, take half as much at a time and keep a quarter as much for backward.

    Raises:
        ModelError: "kl" or "teacher_kl" without its q, or with one of another number of tokens or another vocabulary.
    """
    names = tuple(name for name in QUANTITIES if name in want)
    if not names:
        return {}
    known = checked_reference(reference, head.vocab_size, hidden.shape[0]).detach() if "kl" in names else None
    teacher = checked_teacher(teacher, head.vocab_size, labels) if "teacher_kl" in names else None
    banned = teacher is not None and may_ban(head, teacher)
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Inside the function gradients are always off, so whether there will be a backward is noted here.
    backward = torch.is_grad_enabled()
    job = Job(
        head.scale, head.softcap, labels, names, known, teacher, banned, autocast, chunk_tokens, backward, sparing
    )
    with torch.autocast(device, enabled=False):
        values = _HeadQuantities.apply(hidden, head.weight, head.bias, job)
    return dict(zip(job.outputs, values))


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
        values = {name: hidden.new_empty(n, dtype=dtype) for name in job.outputs}
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
        ctx.mark_non_differentiable(*(values[name] for name in job.outputs[len(job.names) :]))
        return tuple(values.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        kept = dict(zip(ctx.kept_names, rest))
        # The sign and scale of each basis.
        tempered = 1.0 if ctx.job.teacher is None else 1.0 / ctx.job.teacher.temperature
        by = {"logps": -1.0, "entropy": -1.0, "kl": 1.0, "teacher_kl": tempered}
        factors = {name: grad * by[name] for name, grad in zip(ctx.job.names, grads) if grad is not None}
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
    based: tuple[str, ...],
    scratch: Scratch,
) -> dict[str, Tensor]:
    """Fills `values[name][rows]`; returns the bases of the names in `based`."""
    n, labels = rows.stop - rows.start, job.labels[rows]
    logits = chunk_logits(hidden[rows], head, job.compute(head), scratch, "p")
    slope = _slope(logits, head.softcap) if based else None
    logp = q = taught = None
    if job.teacher is not None:
        student = student_logits(logits, job, scratch)
        logp, ratio, found = log_ratio(student, job, rows, scratch)
        for name, value in found.items():
            values[name][rows] = value
        p = torch.exp(logp, out=scratch("contrast", *logp.shape))
        kl = values["teacher_kl"][rows] = torch.linalg.vecdot(p, ratio)
        taught = basis_(p, ratio, kl, scratch, head.vocab_size) if based else None
        logp = logp if student is logits else None
    if logp is None:
        logp = softmax_(logits, log=True)
    if "logps" in values:
        values["logps"][rows] = logp.gather(1, labels[:, None]).squeeze(1)
    if "kl" in values:
        logq = _reference_softmax(job.reference, rows, job, scratch, log=True)
        q = scratch("q", n)
        torch.exp(logq, out=q)
        values["kl"][rows] = weighted_sum_(q, logq.sub_(logp))
    if "entropy" in values:
        p = torch.exp(logp, out=scratch("entropy", n))
        values["entropy"][rows] = -weighted_sum_(p, logp.clone() if based else logp)
    if not based:
        return {}
    # Probabilities, over their logarithms, if any of the bases needs them.
    p = logp if based == ("teacher_kl",) else logp.exp_()
    return _bases(based, p, q, taught, labels, slope)


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
    d_weight = None
    if needed[1]:
        make = torch.empty if exact and n else torch.zeros  # the first product is written over what it finds
        d_weight = make(head.weight.shape, dtype=sum_dtype, device=hidden.device)
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
                d_weight.addmm_(scaled.t(), weighted, beta=float(rows.start > 0))
            else:
                d_weight.add_(scaled.t() @ weighted)
        if d_bias is not None:
            d_bias.addmv_(basis.t(), factor * job.scale)
    if d_weight is not None:
        d_weight = d_weight.to(head.weight.dtype)
    if d_bias is not None and head.bias is not None:
        d_bias = d_bias.to(head.bias.dtype)
    return d_hidden, d_weight, d_bias


def _recomputed_bases(
    hidden: Tensor, head: Head, job: Job, rows: slice, scratch: Scratch, constants: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The bases of a chunk again; `constants` are the teacher's KL and strength of all tokens."""
    logits = chunk_logits(hidden[rows], head, job.compute(head), scratch, "p")
    slope = _slope(logits, head.softcap)
    p = q = taught = None
    if "teacher_kl" in job.names:
        student = student_logits(logits, job, scratch)
        kl, strength = (values[rows] for values in constants)
        logp, ratio, _ = log_ratio(student, job, rows, scratch, strength)
        own = logp.exp_()
        taught = basis_(own, ratio, kl, scratch, head.vocab_size)
        p = own if student is logits else None
    if p is None:
        p = softmax_(logits, log=False)
    if "kl" in job.names:
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


def _bases(
    names: Collection[str], p: Tensor, q: Any, taught: Any, labels: Tensor, slope: Tensor | None
) -> dict[str, Tensor]:
    """`[n, V]` matrices D such that dz = factor * D, factor as in `backward`. Overwrites p, q and taught."""
    out = {}
    if "kl" in names:
        out["kl"] = torch.sub(p, q, out=q)
    if "teacher_kl" in names:
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


def _slope(capped: Tensor, softcap: float | None) -> Tensor | None:
    """Derivative of the soft cap, 1 - tanh^2, from capped logits."""
    return None if softcap is None else (capped / softcap).square_().neg_().add_(1.0)


# ---- A call in chunks of tokens: what it computes, how large its chunks are, and their logits.

# Logits of one chunk, and bases that may be kept for backward, in bytes per device type.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
KEEP_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
# Fewer tokens than this per chunk and adding to the weight's gradient costs more than the products.
MIN_CHUNK_TOKENS = 128
# Temporary values of a reduction, and a block of weights that is turned into another type.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def room(table: dict[str, int], device: torch.device) -> int:
    """The entry of a device's type; unknown types count as GPUs."""
    return table.get(device.type, table["cuda"])


def check_tokens(name: str, value: int | None) -> None:
    """Raises ModelError unless a number of tokens is None or at least 1."""
    require(value is None or value >= 1, ModelError, f"{name} must be at least 1, or None; got {value}")


@dataclass
class Job:
    """What a fused call computes; everything in it is a constant of the gradient."""

    scale: float
    softcap: float | None
    labels: Tensor
    names: tuple[str, ...]  # of QUANTITIES, in that order
    reference: Any  # a Distribution, and a Teacher, where a name needs them
    teacher: Any
    banned: bool  # some token may have a logit of -inf in the teacher's or the student's distribution
    autocast: torch.dtype | None  # of the student's and the reference's products
    chunk_tokens: int | None
    backward: bool  # whether there may be one
    sparing: bool = False

    def __post_init__(self) -> None:
        check_tokens("chunk_tokens", self.chunk_tokens)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.names + (CONSTANTS if self.teacher is not None else ())

    def compute(self, head: Head) -> torch.dtype:
        """The type of the matrix products."""
        return head.weight.dtype if self.autocast is None else self.autocast

    def typed(self, head: Head) -> Head:
        """The head with its weight in the type of the products, cast once instead of for every chunk."""
        compute = self.compute(head)
        return head if head.weight.dtype == compute else replace(head, weight=head.weight.to(compute))

    def with_typed_reference(self) -> Job:
        """The same with the reference's head as `typed` has it."""
        if self.reference is None:
            return self
        return replace(self, reference=replace(self.reference, head=self.typed(self.reference.head)))

    def chunks(self, n: int, vocab: int, dtype: torch.dtype) -> list[slice]:
        rows = self.chunk_tokens
        if rows is None:
            size = room(CHUNK_BYTES, self.labels.device) // (2 if self.sparing else 1)
            rows = max(MIN_CHUNK_TOKENS, size // (vocab * dtype.itemsize))
            # Even chunks: the last one is not a sliver.
            rows = -(-n // -(-n // rows)) if n else rows
        return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]

    def keeps(self, n: int, vocab: int, dtype: torch.dtype) -> bool:
        """Whether the bases of all tokens may stay in memory until backward (entropy's are not kept)."""
        kept = sum(name != "entropy" for name in self.names)
        size = kept * n * vocab * dtype.itemsize
        most = room(KEEP_BYTES, self.labels.device) // (4 if self.sparing else 1)
        return self.chunk_tokens is None and 0 < size <= most


class Scratch:
    """Named `[rows, V]` buffers, reused by every chunk: on CPU fresh memory costs a pass over it."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.vocab, self.dtype, self.device = rows, vocab, dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, vocab: int | None = None) -> Tensor:
        if name not in self.buffers:
            shape = (self.rows, self.vocab if vocab is None else vocab)
            self.buffers[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self.buffers[name][:rows]


def chunk_logits(hidden: Tensor, head: Head, compute: torch.dtype, scratch: Scratch, name: str) -> Tensor:
    """Logits of a chunk `[n, V]`, in the accumulation type."""
    out = scratch(name, hidden.shape[0], head.vocab_size)
    if head.is_identity:
        return out.copy_(head.logits(hidden))
    _multiply(hidden if head.scale == 1.0 else hidden * head.scale, head.weight, compute, out)
    if head.bias is not None:
        out.add_(head.bias.to(out.dtype), alpha=head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _multiply(hidden: Tensor, weight: Tensor, compute: torch.dtype, out: Tensor) -> None:
    """`out = hidden @ weight.T` with products in the type `compute`, whatever type the factors are stored in."""
    if compute != out.dtype:
        out.copy_(hidden.to(compute) @ weight.to(compute).t())
    elif weight.dtype == compute:
        torch.mm(hidden.to(compute), weight.t(), out=out)
    elif out.is_cuda and hidden.dtype == weight.dtype:
        # Products of 16-bit numbers are exact in float32, and added up there.
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden, rows = hidden.to(compute), block_rows(weight.shape[1], out)
        for v in range(0, weight.shape[0], rows):
            torch.mm(hidden, weight[v : v + rows].to(compute).t(), out=out[:, v : v + rows])


def block_rows(width: int, like: Tensor) -> int:
    """How many rows of `width` numbers of `like`'s type to hold at a time besides the chunk's buffers."""
    return max(1, room(BLOCK_BYTES, like.device) // (max(width, 1) * like.dtype.itemsize))


def softmax_(logits: Tensor, *, log: bool) -> Tensor:
    """Softmax of every row, written over the logits on CPU, where memory traffic is what counts."""
    operation = torch.log_softmax if log else torch.softmax
    return operation(logits, -1, out=logits if logits.device.type == "cpu" else None)


def weighted_sum_(weights: Tensor, terms: Tensor) -> Tensor:
    """`sum(weights * terms)` per row, where zero weights count 0 whatever the term. Overwrites `terms`."""
    out = terms.mul_(weights).sum(-1)
    if not bool(torch.isfinite(out).all()):
        out = terms.masked_fill_(weights == 0, 0.0).sum(-1)
    return out


# ---- The KL to a teacher in one chunk of the fused head: student, target and contrast together.
#
# With p = softmax(z / tau) and the teacher's q held constant,
#
#     KL(p||q) = sum_v p (log p - log q),    d KL / dz = p (log p - log q - KL) / tau.
#
# Three `[n, V]` buffers suffice: the student's logits, the target's, which become log q and then log p - log q,
# and the contrast's, which become p. A fourth is needed where the student's softmax is not that of its other
# quantities: another temperature, fewer tokens, or some banned ones. The slow twin is
# `tokengrain.scoring.head.teacher_quantities`.

CONSTANTS = ("teacher_alpha", "tvd", "teacher_reward")


def may_ban(head: Head, teacher: Teacher) -> bool:
    """Whether a logit of the student, the target or the contrast can be -inf."""
    distributions = [d for d in (teacher.target, teacher.contrast) if d is not None]
    given = [d.hidden for d in distributions if d.head.is_identity]
    biases = [h.bias for h in (head, *(d.head for d in distributions)) if h.bias is not None and h.softcap is None]
    return any(bool(values.isneginf().any()) for values in (*given, *biases))


def student_logits(logits: Tensor, job: Job, scratch: Scratch) -> Tensor:
    """The student's logits over the shared vocabulary: `logits` itself where one softmax serves all quantities."""
    n, vocab = len(logits), job.teacher.vocab_size
    alone = job.names == ("teacher_kl",)
    if vocab == logits.shape[1] and (alone or (job.teacher.temperature == 1.0 and not job.banned)):
        return logits
    return scratch("student", n, vocab).copy_(logits[:, :vocab])


def log_ratio(
    student: Tensor, job: Job, rows: slice, scratch: Scratch, strength: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(log p, log p - log q, constants) of a chunk, `[n, V]`, `[n, V]` and `[n]` each. Overwrites `student`.

    `student` are logits, not divided by the temperature. With a known `strength` (alpha) there are no constants.
    """
    teacher: Teacher = job.teacher
    target = _teacher_logits(teacher.target, rows, scratch, "target")
    contrast = None if teacher.contrast is None else _teacher_logits(teacher.contrast, rows, scratch, "contrast")
    banned = None
    if job.banned:
        every = [z for z in (student, target, contrast) if z is not None]
        banned = torch.stack([z.isneginf() for z in every]).any(0)
        for z in every:
            z.masked_fill_(banned, float("-inf"))
    constants: dict[str, Tensor] = {}
    if strength is None:
        target = softmax_(target, log=True)
        contrast = None if contrast is None else softmax_(contrast, log=True)
        constants = _constants(target, contrast, job, rows)
        strength = constants["teacher_alpha"]
    if contrast is not None:
        # target + (alpha - shift) (target - contrast)
        torch.lerp(contrast, target, (1.0 + strength - teacher.shift)[:, None], out=target)
        target = target if banned is None else target.masked_fill_(banned, float("-inf"))
    if teacher.temperature != 1.0:
        student.div_(teacher.temperature)
        target.div_(teacher.temperature)
    logp, logq = softmax_(student, log=True), softmax_(target, log=True)
    ratio = torch.sub(logp, logq, out=logq)
    return logp, ratio if banned is None else ratio.masked_fill_(banned, 0.0), constants


def _teacher_logits(distribution: Distribution, rows: slice, scratch: Scratch, name: str) -> Tensor:
    """Multiplied in the accumulation type: extrapolation amplifies what rounding does to logits."""
    return chunk_logits(distribution.hidden[rows], distribution.head, scratch.dtype, scratch, name)


def _constants(target: Tensor, contrast: Tensor | None, job: Job, rows: slice) -> dict[str, Tensor]:
    """Total variation, strength and reward from log-probabilities."""
    if contrast is None:
        tvd = reward = target.new_zeros(len(target))
    else:
        step = block_rows(target.shape[1], target)
        parts = [
            # A few rows at a time: their probabilities stay in the cache and need no buffer.
            a.exp().sub_(b.exp()).abs_().sum(-1)
            for a, b in zip(target.split(step), contrast.split(step))
        ]
        tvd = torch.cat(parts).mul_(0.5)
        labels = job.labels[rows, None]
        reward = (target.gather(1, labels) - contrast.gather(1, labels)).squeeze(1)
    alpha = job.teacher.slope * tvd + job.teacher.offset
    return {"teacher_alpha": alpha, "tvd": tvd, "teacher_reward": reward}


def basis_(p: Tensor, ratio: Tensor, kl: Tensor, scratch: Scratch, vocab: int) -> Tensor:
    """`[n, vocab]` matrix tau * d KL / dz; 0 for tokens outside the shared vocabulary. Overwrites `ratio`."""
    out = ratio.sub_(kl[:, None]).mul_(p)
    if out.shape[1] == vocab:
        return out
    wide = scratch("wide", len(out))
    wide[:, out.shape[1] :] = 0.0
    wide[:, : out.shape[1]] = out
    return wide
