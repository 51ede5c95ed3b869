"""DDP and FSDP2 in two gloo processes: the gradient of the mean over ranks equals one process's.

The two ranks score different prompts, and different numbers of them, so that a rank whose forward passes
are not matched by the other's would hang or differ.
"""

from __future__ import annotations

import copy
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.scoring.encdec import tiny_seq2seq
from tests.scoring.models import batch_of, gradients, tiny
from tests.scoring.test_reference import lora
from tokengrain.batch import TokenBatch
from tokengrain.scoring.head import Teacher
from tokengrain.scoring.reference import AdapterOffReference, AdapterReference, FrozenReference
from tokengrain.scoring.score import distribution_of, score

WANT = ("logps", "entropy", "kl")


def batches() -> list[TokenBatch]:
    return [batch_of((9, (4, 7)), (3, (5, 2)), (30, (2,))), batch_of((4, (2, 6, 3)), seed=3)]


def outputs(model: nn.Module, batch: TokenBatch, reference: Any) -> dict[str, Tensor]:
    scores = score(model, batch, WANT, reference=reference(batch, ("distribution",)).distribution)
    return {name: getattr(scores, name) for name in WANT}


def single(model: nn.Module, reference: Any) -> dict[str, Tensor]:
    """Mean over the two batches of their gradients, in this process alone."""
    parts = [gradients(model, outputs(model, batch, reference)) for batch in batches()]
    return {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name in expected:
        difference = float((got[name] - expected[name]).abs().max())
        assert difference < tolerance * scale, f"{name}: {difference}, scale {scale}"


def ddp(rank: int) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    reference = FrozenReference(tiny("llama", initializer_range=0.2))
    expected = single(copy.deepcopy(model), reference)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        got = gradients(wrapped, outputs(wrapped, batches()[rank], reference))
        compare({n.removeprefix("module."): g for n, g in got.items()}, expected)


def ddp_peft(rank: int) -> None:
    model = lora()
    plain = copy.deepcopy(model)
    expected = single(plain, AdapterOffReference(plain))
    wrapped = nn.parallel.DistributedDataParallel(model)
    got = gradients(wrapped, outputs(wrapped, batches()[rank], AdapterOffReference(wrapped)))
    compare({n.removeprefix("module."): g for n, g in got.items()}, expected)


def ddp_adapters(rank: int) -> None:
    """Student and teachers are adapters of one base, inside DDP."""
    from tests.scoring.test_distil import three_adapters

    def taught(model: nn.Module, batch: TokenBatch) -> dict[str, Tensor]:
        references = [AdapterReference(model, name) for name in ("dpo", "reverse")]
        target, contrast = (r(batch, ("distribution",)).distribution for r in references)
        teacher = Teacher(target, contrast, slope=6.0, offset=1e-3)
        return {"teacher_kl": score(model, batch, ("teacher_kl",), teacher=teacher).teacher_kl}

    model, _ = three_adapters()
    plain = copy.deepcopy(model)
    parts = [gradients(plain, taught(plain, batch)) for batch in batches()]
    expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        got = gradients(wrapped, taught(wrapped, batches()[rank]))
        compare({n.removeprefix("module."): g for n, g in got.items()}, expected)


def ddp_scorer(rank: int) -> None:
    model = tiny("llama", scorer=True)
    plain = copy.deepcopy(model)
    want = ("token_scores",)
    parts = [gradients(plain, {"x": score(plain, batch, want).token_scores}) for batch in batches()]
    expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        got = gradients(wrapped, {"x": score(wrapped, batches()[rank], want).token_scores})
        compare({n.removeprefix("module."): g for n, g in got.items()}, expected)


def ddp_seq2seq(rank: int) -> None:
    """Queries and completions of other lengths and numbers on every rank."""
    model, reference = tiny_seq2seq("bart"), FrozenReference(tiny_seq2seq("bart", seed=1))
    expected = single(copy.deepcopy(model), reference)
    for unused in (False, True):
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=unused)
        for _ in range(2):
            got = gradients(wrapped, outputs(wrapped, batches()[rank], reference))
            compare({n.removeprefix("module."): g for n, g in got.items()}, expected, 1e-7)


def fsdp_seq2seq(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def sharded(model: nn.Module) -> nn.Module:
        for block in (*model.encoder.block, *model.decoder.block):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model, ref = tiny_seq2seq("t5"), tiny_seq2seq("t5", seed=1)
    expected = single(copy.deepcopy(model), FrozenReference(copy.deepcopy(ref)))
    wrapped, reference = sharded(model), FrozenReference(sharded(ref))
    for _ in range(2):
        wrapped.zero_grad()
        got = gradients(wrapped, outputs(wrapped, batches()[rank], reference))
        compare({n: g.full_tensor() for n, g in got.items()}, expected)


def fsdp(
    rank: int,
    tied: bool = True,
    root_reshards: bool | None = None,
    own_head: bool = False,
    ckpt: bool = False,
    bf16: bool = False,
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (2,))

    def sharded(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        if own_head:
            fully_shard(model.lm_head, mesh=mesh)
        return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=root_reshards)

    model, ref = (tiny("llama", tie_word_embeddings=tied, initializer_range=r) for r in (0.3, 0.2))
    expected = single(copy.deepcopy(model), FrozenReference(copy.deepcopy(ref)))
    if ckpt:
        model.gradient_checkpointing_enable()
    wrapped, reference = sharded(model), FrozenReference(sharded(ref))
    for _ in range(2):
        wrapped.zero_grad()  # before forward: afterwards the root's parameters are the gathered ones
        got = gradients(wrapped, outputs(wrapped, batches()[rank], reference))
        compare({n: g.full_tensor() for n, g in got.items()}, expected, 0.1 if bf16 else 1e-5)
    # Both layouts, unequal numbers of prompts: every rank runs the decoder once.
    with torch.no_grad():
        layouts = [score(wrapped, batches()[rank], layout=layout).logps for layout in ("shared", "separate")]
    torch.testing.assert_close(*layouts, rtol=0, atol=0.2 if bf16 else 1e-6)
    head = distribution_of(wrapped, batches()[rank]).head
    assert head.weight.shape == (61, 16)


def _process(rank: int, port: int, cases: list[tuple[Callable[..., None], dict[str, Any]]]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for work, kwargs in cases:
            work(rank, **kwargs)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # all was compared: gloo's threads now and then abort an interpreter that winds down


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FSDP_CASES: list[dict[str, Any]] = [
    {},
    {"tied": False, "root_reshards": True, "ckpt": True},
    {"tied": False, "own_head": True},
    {"bf16": True},
]
CASES = {
    "ddp": [(ddp, {}), (ddp_peft, {}), (ddp_adapters, {}), (ddp_scorer, {}), (ddp_seq2seq, {})],
    "fsdp2": [(fsdp, kwargs) for kwargs in FSDP_CASES] + [(fsdp_seq2seq, {})],
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("gloo is not available")
    mp.spawn(_process, args=(_free_port(), CASES[name]), nprocs=2)
