"""What a credit source is, and what sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError
from tokengrain.files import fingerprint


@runtime_checkable
class CreditSource(Protocol):
    """Turns a batch into one number per counted completion token.

    Any callable `(batch) -> Tensor [N]` works as one; `name` and `fingerprint` serve annotation files. A class
    may say what its numbers mean in a class attribute `values`: "signed" (sign and size, around 0), "order" (only
    their order within a completion), "marks" (0 but at marked tokens) or "any" (up to the user; the default).
    """

    name: str

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Token credit `[N]`, float, without gradient."""
        ...

    def fingerprint(self) -> str:
        """Identifies the numbers it gives: its settings and the weights of the models it asks."""
        ...


def checked_credit(values: Tensor | Sequence[Any], batch: TokenBatch, name: str) -> Tensor:
    """Credit as a detached float `[N]` on the batch's device.

    Args:
        values: `[N]`, or one sequence of numbers per completion.
        name: the source, for messages.

    Raises:
        DataError: wrong type or length, or a value that is NaN or infinite; names the row.
    """
    flat = values if isinstance(values, Tensor) else _joined(values, batch, name)
    total = batch.segments.total
    if flat.shape != (total,):
        raise DataError(
            f"credit source {name!r} gave a wrong number of values",
            value=tuple(flat.shape),
            expected=f"({total},): one per completion token that counts",
        )
    flat = flat.detach().to(batch.device)
    if not flat.is_floating_point():
        flat = flat.float()
    bad = ~torch.isfinite(flat)
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        completion = int(batch.segments.ids[token])
        raise DataError(
            f"credit source {name!r} gave a value that is not finite for token "
            f"{token - int(batch.segments.offsets[completion])} of completion {_place(batch, completion)}",
            row=row_of(batch, completion),
            value=float(flat[token]),
            expected="finite numbers",
        )
    return flat


def row_of(batch: TokenBatch, completion: int) -> int | str:
    """The row that a completion belongs to."""
    group = int(batch.group[completion])
    return batch.rows[group] if batch.rows else group


def is_peft(model: nn.Module) -> bool:
    """Whether there is a PEFT model, whose adapter can be switched off, in `model` or its wrapper."""
    inner: Any = model
    while inner is not None and not hasattr(inner, "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return hasattr(inner, "peft_config")


def frozen_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probabilities `[N]` under `model` in evaluation mode, without gradient; its mode is restored."""
    from tokengrain.scoring import score
    from tokengrain.scoring.forward import evaluating

    with evaluating(model):
        return _wanted(score(model, batch, ("logps",)).logps)


def scorer_logps(scorer: Any, batch: TokenBatch) -> Tensor:
    """Log-probabilities `[N]` under a model, or under a `Reference` (called with what is wanted)."""
    if isinstance(scorer, nn.Module):
        return frozen_logps(scorer, batch)
    return _wanted(scorer(batch, {"logps"}).logps)


def scorer_fingerprint(scorer: Any) -> str:
    """Identifies a model's weights and config, or a reference by its class and its model's weights."""
    if isinstance(scorer, nn.Module):
        return model_fingerprint(scorer)
    kind = type(scorer).__name__
    model = getattr(scorer, "model", None)
    # What an adapter that is switched off holds does not change the numbers.
    content = model_fingerprint(model, adapter=kind != "AdapterOffReference") if model is not None else ""
    return fingerprint([kind, content])


def model_fingerprint(model: nn.Module, *, adapter: bool = True) -> str:
    """16 hex digits over names, types and every byte of the weights, and over the config.

    Args:
        adapter: whether LoRA weights count.
    """
    digest = hashlib.blake2b()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        digest.update(config.to_json_string(use_diff=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if "lora_" in name and not adapter:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def _wanted(logps: Tensor | None) -> Tensor:
    assert logps is not None  # it was asked for
    return logps


def _joined(values: Sequence[Any], batch: TokenBatch, name: str) -> Tensor:
    """One sequence per completion, as a flat tensor."""
    expected = batch.segments.lengths.tolist()
    try:
        parts = [torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"credit source {name!r} gave something that is not numbers ({error})",
            expected="a tensor [N], or one list of numbers per completion",
        ) from None
    if len(parts) != len(expected):
        raise DataError(
            f"credit source {name!r} gave values for a wrong number of completions",
            value=len(parts),
            expected=f"{len(expected)}, or a tensor of {batch.segments.total} values",
        )
    for completion, (part, length) in enumerate(zip(parts, expected, strict=True)):
        if part.numel() != length:
            raise DataError(
                f"credit source {name!r} gave a wrong number of values for completion {_place(batch, completion)}",
                row=row_of(batch, completion),
                value=part.numel(),
                expected=f"{length}, one per completion token that counts",
            )
    return torch.cat(parts) if parts else torch.zeros(0)


def _place(batch: TokenBatch, completion: int) -> int:
    """Index of a completion within its prompt."""
    first = int((batch.group < batch.group[completion]).sum())
    return completion - first
