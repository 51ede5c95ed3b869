"""Frozen quantities of a reference: another model, an adapter switched off or for another one, stored columns."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring.forward import evaluating
from tokengrain.scoring.head import Distribution, Head
from tokengrain.scoring.score import head_of, score

WANTED = ("logps", "distribution")


@dataclass
class ReferenceScores:
    """What a reference gave.

    Attributes:
        logps: `[N]` log-probabilities (nats) of the counted tokens, or None if not wanted.
        distribution: the whole next-token distribution at those tokens, or None if not wanted.
    """

    logps: Tensor | None = None
    distribution: Distribution | None = None


class Reference(Protocol):
    """Frozen quantities of a batch, without gradients and without dropout.

    `want` is made of "logps" and "distribution".
    """

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores: ...


class FrozenReference:
    """Another model, for example a copy of the starting weights. It is put into evaluation mode for good.

    Args:
        model: a causal language model, plain or wrapped; its parameters stop requiring gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        return _score_frozen(self.model, batch, want)


class AdapterOffReference:
    """A PEFT model with its adapter disabled: no second copy of the weights.

    Args:
        model: a `PeftModel`, possibly inside DDP, FSDP2 or `torch.compile`.

    Raises:
        ModelError: there is no PEFT model in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _peft_of(model)

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        peft = _peft_of(self.model)
        with _gradients_required_as_before(peft), peft.disable_adapter():
            return _score_frozen(self.model, batch, want)


class AdapterReference:
    """A PEFT model with another of its adapters active: several models over one set of weights.

    The model that is trained keeps its active adapter, its mode and what requires gradients, on errors too. A
    `Distribution` it gives holds the base model's own head, or that of the adapter if the adapter has one.

    Args:
        model: a `PeftModel`, possibly inside DDP, FSDP2 or `torch.compile`.
        adapter: the adapter's name, as in `model.load_adapter(path, adapter)`.

    Raises:
        ModelError: there is no PEFT model in it, or none of its adapters has that name.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.model, self.adapter = model, adapter
        names = list(_peft_of(model).peft_config)
        if adapter not in names:
            raise ModelError(f"unknown adapter; got {adapter!r}, expected one of {names}")

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        peft = _peft_of(self.model)
        with _gradients_required_as_before(peft), _adapter_on(peft, self.adapter):
            return _score_frozen(self.model, batch, want)


class ColumnReference:
    """Stored quantities: `batch.columns["ref_logps"]` `[N]` and, given a head, `["ref_hidden"]` `[N, H]`.

    Args:
        head: the reference's head, needed for "distribution".
    """

    def __init__(self, head: Head | None = None) -> None:
        self.head = None if head is None else head.detach()

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        _check(want)
        out = ReferenceScores()
        if "logps" in want:
            out.logps = self._column(batch, "ref_logps")
        if "distribution" in want:
            if self.head is None:
                raise ModelError(
                    "stored log-probabilities are one number per token; a KL over the whole vocabulary "
                    "(TDPO) needs a live reference, or the column 'ref_hidden' and the reference's head"
                )
            out.distribution = Distribution(self._column(batch, "ref_hidden"), self.head)
        return out

    @staticmethod
    def _column(batch: TokenBatch, name: str) -> Tensor:
        if name not in batch.columns:
            raise ModelError(
                f"the data have no column {name!r} to take the reference from; got {sorted(batch.columns)}, "
                "expected it in every completion"
            )
        return batch.columns[name].detach()


def _check(want: Collection[str]) -> None:
    unknown = sorted(set(want) - set(WANTED))
    if unknown:
        raise ModelError(f"unknown reference quantity; got {unknown}, expected some of {list(WANTED)}")


def _score_frozen(model: nn.Module, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
    _check(want)
    wanted = [{"logps": "logps", "distribution": "hidden"}[w] for w in WANTED if w in want]
    with evaluating(model):
        scores = score(model, batch, wanted)
        out = ReferenceScores(logps=scores.logps)
        if "distribution" in want:
            assert scores.hidden is not None
            out.distribution = Distribution(scores.hidden, head_of(model).detach())
    return out


def _peft_of(model: nn.Module) -> Any:
    inner: Any = model
    while inner is not None and not hasattr(inner, "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if inner is None:
        raise ModelError(f"{type(model).__name__} has no adapter to switch; expected a PEFT model")
    return inner


@contextlib.contextmanager
def _gradients_required_as_before(peft: Any) -> Iterator[None]:
    """Afterwards, what required gradients before does so again, and nothing else: PEFT's switches change it."""
    before = [(p, p.requires_grad) for p in peft.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


@contextlib.contextmanager
def _adapter_on(peft: Any, adapter: str) -> Iterator[None]:
    """Another adapter active. Every layer remembers its own active one, and gets that back."""
    if any(vars(m).get("merged_adapters") for m in peft.modules()):
        raise ModelError("its adapters are merged into the weights, so another cannot be used; unmerge them first")
    names = ("active_adapter", "_active_adapter")
    before = [(m, name, vars(m)[name]) for m in peft.modules() for name in names if name in vars(m)]
    try:
        peft.set_adapter(adapter)
        yield
    finally:
        for module, name, active in before:
            setattr(module, name, active)
