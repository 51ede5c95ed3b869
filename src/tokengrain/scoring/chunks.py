"""A fused call in chunks of tokens: what it computes, how large its chunks are, and their logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokengrain.errors import ModelError
from tokengrain.scoring.head import Distribution, Head
from tokengrain.scoring.teacher import Teacher

# Logits of one chunk, and bases that may be kept for backward, in bytes per device type.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
KEEP_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
# Fewer tokens than this per chunk and adding to the weight's gradient costs more than the products.
MIN_CHUNK_TOKENS = 128
# Temporary values of a reduction, and a block of weights that is turned into another type.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


def check_tokens(name: str, value: int | None) -> None:
    """Raises ModelError unless a number of tokens is None or at least 1."""
    if value is not None and value < 1:
        raise ModelError(f"{name} must be at least 1, or None; got {value}")


@dataclass
class Job:
    """What a fused call computes; everything in it is a constant of the gradient.

    Attributes:
        scale, softcap: the head's.
        labels: long `[N]`.
        names: of `fused.QUANTITIES`, in that order.
        reference, teacher: detached; None where no name needs them.
        banned: some token may have a logit of -inf in the teacher's or the student's distribution.
        autocast: the type of the student's and the reference's products under autocast.
        chunk_tokens: as the user gave it.
        backward: whether there may be a backward.
    """

    scale: float
    softcap: float | None
    labels: Tensor
    names: tuple[str, ...]
    reference: Distribution | None
    teacher: Teacher | None
    banned: bool
    autocast: torch.dtype | None
    chunk_tokens: int | None
    backward: bool

    def __post_init__(self) -> None:
        check_tokens("chunk_tokens", self.chunk_tokens)

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
    return max(1, BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cuda"]) // (max(width, 1) * like.dtype.itemsize))


def softmax_(logits: Tensor, *, log: bool) -> Tensor:
    """Softmax of every row, written over the logits on CPU, where memory traffic is what counts."""
    operation = torch.log_softmax if log else torch.softmax
    if logits.device.type == "cpu":
        return operation(logits, -1, out=logits)
    return operation(logits, -1)


def weighted_sum_(weights: Tensor, terms: Tensor) -> Tensor:
    """`sum(weights * terms)` per row, where zero weights count 0 whatever the term. Overwrites `terms`."""
    out = terms.mul_(weights).sum(-1)
    if not bool(torch.isfinite(out).all()):
        out = terms.masked_fill_(weights == 0, 0.0).sum(-1)
    return out
