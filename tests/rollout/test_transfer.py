"""Weights over the wire, to a stub of vLLM's weight transfer: TCP stands for NCCL, a list of calls for libnccl."""

import base64
import contextlib
import ctypes
import subprocess
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.credit.small import llama
from tests.rollout.stub import Served, Tcp, serving
from tests.rollout.test_server import PROMPTS, SAMPLING, off
from tokengrain.errors import RecipeError, RolloutError
from tokengrain.models import StreamedWeights
from tokengrain.rollout import transfer
from tokengrain.rollout.server import OpenAIServer


@pytest.fixture
def tcp(monkeypatch):
    monkeypatch.setattr(transfer, "Nccl", Tcp)


def server(*stubs, **kwargs):
    given = {"backoff": 0.01, "retries": 2, "timeout": 20.0, **kwargs}
    return OpenAIServer([stub.url for stub in stubs], model="m", refresh="nccl", **given)


def changed(seed):
    torch.manual_seed(seed)
    model = llama().float()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("workers", [1, 3])
def test_weights_arrive(tcp, workers):
    served, model = Served(llama().float()), changed(1)
    served.workers = workers
    with serving(served) as stub:
        sampler = server(stub)
        sampler.check_reachable()
        stub.requests.clear()
        for _ in range(2):
            sampler.refresh(StreamedWeights(model))
        assert served.version == sampler.weights.name
        assert off(sampler, model)[0] < 1e-4
        sampler.release()
    for name, value in served.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    joining = ["/get_world_size", "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"]
    update = ["/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    update += ["/reset_prefix_cache", "/resume"]
    said = [path for path, _ in stub.requests if not path.startswith("/v1")]
    assert said == [*joining, *update, "/weight_info", *update, "/weight_info"]
    bodies = dict(stub.requests)
    info = bodies["/init_weight_transfer_engine"]["init_info"]
    assert len(base64.b64decode(info.pop("nccl_unique_id_b64"), validate=True)) == 128
    assert info == {"rank_offset": 1, "world_size": 1 + workers, "packed": False}
    told = bodies["/update_weights"]["update_info"]
    assert told["names"] == [name for name, _ in model.named_parameters()]
    assert told["shapes"] == [list(p.shape) for p in model.parameters()]
    assert set(told["dtype_names"]) == {"float32"}
    assert bodies["/start_weight_update"] == {}
    assert bodies["/finish_weight_update"] == {"weight_version": sampler.adapter_name + f"-{sampler._own}-2"}


class Shard:
    """Stands for a sharded parameter: `full_tensor` gathers it, and all ranks have to."""

    def __init__(self, like, gathered):
        self.dtype, self.shape, self.gathered = like.dtype, like.shape, gathered

    def detach(self):
        return self

    def full_tensor(self):
        # The one before is let go when this one has come.
        assert sum(one() is not None for one in self.gathered) <= 1
        whole = torch.full(self.shape, 0.5)
        self.gathered.append(weakref.ref(whole))
        return whole


@pytest.mark.parametrize("fails", [False, True])
def test_one_tensor_at_a_time_whoever_fails(tcp, fails):
    """Of shards each is gathered when it is sent, and all of them are: other ranks are not left waiting."""
    served, gathered, weights = Served(llama().float()), [], StreamedWeights(llama().float())
    weights._values = {name: Shard(value, gathered) for name, value in weights._values.items()}
    with serving(served) as stub:
        sampler = server(stub, retries=0)
        if fails:
            weights.described[1] = ("gone.weight", *weights.described[1][1:])
            with pytest.raises(RolloutError, match=r"/update_weights: status 500.*no module .* 'gone.weight'"):
                sampler.refresh(weights)
            assert (served.version, served.paused, sampler.weights.version) == ("default", False, 0)
        else:
            sampler.refresh(weights)
            assert all(bool((value == 0.5).all()) for value in served.model.parameters())
    assert len(gathered) == len(weights.described)


def test_a_server_started_anew_joins_again_before_the_next_rollout(tcp):
    first, second, model = Served(llama().float()), Served(llama().float()), changed(3)
    with serving(first) as one, serving(second) as two:
        sampler = server(one, two, concurrency=2)
        sampler.refresh(StreamedWeights(model))
        one.delay = two.delay = 0.02
        second.start_anew()
        far, rollouts = off(sampler, model)  # what it answered is drawn from the other
        assert far < 1e-4
        assert (rollouts.metrics["rollout/servers_lost"], sampler.weights.lost) == (1, {1})
        sampler.refresh(StreamedWeights(changed(4)))
        assert sampler.weights.lost == frozenset()
        assert first.version == second.version == sampler.weights.name
        assert off(sampler, changed(4))[0] < 1e-4
        first.start_anew()
        second.start_anew()
        with pytest.raises(RolloutError, match=r"was started anew, without the weights, which are sent again only"):
            sampler.sample(PROMPTS, n=2, sampling=SAMPLING)


def test_a_server_that_takes_no_weights(tcp):
    served, weights = Served(llama().float()), StreamedWeights(llama().float())
    known = served.__call__

    def without(*paths):
        return lambda path, body: {}[path] if path in paths else known(path, body)

    started = r"VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '\{\"backend\": \"nccl\"\}'"
    with serving(without("/get_world_size")) as stub, pytest.raises(RolloutError, match=f"status 404.*{started}"):
        server(stub).check_reachable()

    def refuses(path, body):
        if path == "/init_weight_transfer_engine":
            raise ValueError("Weight transfer not configured. Please set weight_transfer_config")
        return known(path, body)

    with serving(refuses) as stub, pytest.raises(RolloutError, match=f"not configured.*{started}"):
        server(stub).refresh(weights)
    with serving(lambda path, body: {"world_size": 0}) as stub, pytest.raises(RolloutError, match="no world_size"):
        server(stub, retries=0).transfers[0].workers()

    def claims(path, body):
        if path == "/init_weight_transfer_engine":
            body["init_info"]["world_size"] = 2
        return {"world_size": 3} if path == "/get_world_size" else known(path, body)

    with serving(claims) as stub, pytest.raises(RolloutError, match="the workers, 3 as it says, have not all joined"):
        server(stub, timeout=0.5).refresh(weights)


def test_a_server_that_dies_while_it_is_sent_weights(tcp):
    served = Served(llama().float())
    with serving(served) as stub:
        sampler = server(stub, retries=0)
        sampler.refresh(StreamedWeights(llama().float()))
        known = stub.answer

        def dies(path, body):
            if path == "/update_weights":
                served.leave({})
                raise ValueError("EngineDeadError")
            return known(path, body)

        stub.answer = dies
        with pytest.raises(RolloutError, match="EngineDeadError"):
            sampler.refresh(StreamedWeights(llama().float()))
        stub.answer = known
        sampler.refresh(StreamedWeights(llama().float()))
        assert served.version == sampler.weights.name


def test_what_a_trainer_needs(monkeypatch):
    with serving(Served(llama().float())) as stub:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RecipeError, match="torch finds no CUDA here; expected a GPU, or refresh: checkpoint"):
            server(stub).check_reachable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match=r"there is no libnone.so; expected torch's CUDA wheels"):
        transfer.Nccl("libnone.so")
    with pytest.raises(RecipeError, match=r"libc.so.6 has no ncclGetUniqueId; expected NCCL 2.14"):
        transfer.Nccl("libc.so.6")
    with pytest.raises(RecipeError, match="refresh: nccl is vLLM's"):
        OpenAIServer("http://localhost:1", model="m", flavour="sglang", refresh="nccl")


def test_a_model_whose_checkpoints_look_otherwise():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=8, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(RecipeError, match=r"cannot be sent 'model.layers.0.mlp.*in another form; expected refresh"):
        StreamedWeights(model)
    tied = llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert "lm_head.weight" not in [name for name, *_ in StreamedWeights(tied).described]


LIBRARY = r"""
#include <stdio.h>
#include <string.h>
typedef struct { char internal[128]; } Id;
static char said[4096];
static int failing;
#define SAY(...) (snprintf(said + strlen(said), sizeof said - strlen(said), __VA_ARGS__), failing)
const char *told(void) { return said; }
void fail(int code) { failing = code; }
const char *ncclGetErrorString(int code) { return code ? "unhandled cuda error" : "no error"; }
int ncclGetUniqueId(Id *id) { for (int i = 0; i < 128; i++) id->internal[i] = (char)(i + 1); return SAY("id;"); }
int ncclCommInitRank(void **comm, int world, Id id, int rank) {
    *comm = (void *)0x77;
    return SAY("init %d %d %d %d;", world, id.internal[0], (unsigned char)id.internal[127], rank);
}
int ncclAllReduce(const void *a, void *b, size_t n, int type, int op, void *comm, void *stream) {
    return SAY("reduce %d %zu %d %d %p %p;", a == b, n, type, op, comm, stream);
}
int ncclBroadcast(const float *a, void *b, size_t n, int type, int root, void *comm, void *stream) {
    return SAY("broadcast %d %g %zu %d %d %p %p;", a == b, (double)a[0], n, type, root, comm, stream);
}
int ncclCommGetAsyncError(void *comm, int *code) { *code = failing; return 0; }
int ncclCommAbort(void *comm) { return SAY("abort %p;", comm); }
"""


def test_the_calls_of_nccl(tmp_path, monkeypatch):
    """What reaches a shared library, argument by argument. Streams and events are made up: there is no GPU here."""
    (tmp_path / "nccl.c").write_text(LIBRARY)
    path = tmp_path / "libnccl.so.2"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, tmp_path / "nccl.c"], check=True)
    stream = SimpleNamespace(cuda_stream=0x99, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, query=lambda: True)
    made_up = {"is_available": lambda: True, "current_device": lambda: 0, "current_stream": lambda: stream}
    made_up |= {"device": lambda _: contextlib.nullcontext(), "Event": lambda: event}
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    wire = transfer.Nccl(str(path))
    wire.device = torch.device("cpu")
    told = wire.library.told
    told.restype = ctypes.c_char_p
    identifier = wire.identifier()
    assert list(identifier) == list(range(1, 129))
    wire.join(identifier, 3)
    wire.send(torch.tensor([[1.5, 0.0], [2.0, 3.0]]).T)
    assert wire.sent()
    wire.send(torch.zeros(6, dtype=torch.bfloat16))
    wire.library.fail(1)
    with pytest.raises(RolloutError, match="NCCL: unhandled cuda error"):
        wire.sent()
    with pytest.raises(RolloutError, match="ncclBroadcast: unhandled cuda error"):
        wire.send(torch.zeros(1))
    wire.library.fail(0)
    wire.close()
    wire.close()
    expected = "id;init 3 1 128 0;reduce 1 1 7 0 0x77 0x99;broadcast 1 1.5 4 7 0 0x77 0x99;"
    expected += "broadcast 1 0 6 9 0 0x77 0x99;broadcast 1 0 1 7 0 0x77 0x99;abort 0x77;"
    assert told().decode() == expected
