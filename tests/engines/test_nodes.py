"""Two torchrun nodes with a shared folder: on loopback, and each in a network of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training.ranks import free_port
from tokengrain.errors import read_log

ROOT = Path(__file__).parents[2]
NAMES = ("tg-node-0", "tg-node-1")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="networks of their own need root")


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


@pytest.fixture
def networks() -> Iterator[None]:
    """Two network namespaces with the addresses 10.77.0.1 and 10.77.0.2, joined by a cable."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        sh(f"ip netns add {name}")
    sh(f"ip link add tg0 netns {NAMES[0]} type veth peer name tg1 netns {NAMES[1]}")
    for rank, name in enumerate(NAMES):
        sh(f"ip -n {name} addr add 10.77.0.{rank + 1}/24 dev tg{rank}")
        sh(f"ip -n {name} link set tg{rank} up")
        sh(f"ip -n {name} link set lo up")
    yield
    for name in NAMES:
        sh(f"ip netns del {name}")


class Nodes:
    """Two nodes of one process each; `apart`: each in its namespace, with a host name of its own."""

    def __init__(self, folder: Path, apart: bool, *, steps: int, pause: float = 0.0) -> None:
        self.folder, self.processes = folder, []
        address, port = ("10.77.0.1" if apart else "127.0.0.1"), free_port()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for rank, name in enumerate(NAMES):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
            command += ["--nproc-per-node", "1", "--master-addr", address, "--master-port", str(port)]
            command += ["-m", "tests.engines.node", str(folder), str(steps), str(pause), "2"]
            if apart:
                named = f'hostname {name}; exec "$@"'
                command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh", *command]
                environment["GLOO_SOCKET_IFNAME"] = f"tg{rank}"
            output = (folder.parent / f"{folder.name}-{rank}.log").open("ab")
            self.processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=dict(environment), stdout=output, stderr=output, start_new_session=True
                )
            )

    def said(self, rank: int) -> str:
        return (self.folder.parent / f"{self.folder.name}-{rank}.log").read_text(errors="replace")

    def wait(self, rank: int, seconds: float = 240) -> int:
        return self.processes[rank].wait(seconds)

    def kill(self, rank: int) -> None:
        """All of a node at once: its launcher and its worker, which has a session of its own."""
        for process in (*below(self.processes[rank].pid), self.processes[rank].pid):
            os.kill(process, signal.SIGKILL)

    def end(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.kill(rank)
                process.wait()


def below(parent: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "stat").exists():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found += [int(entry.name), *below(int(entry.name))]
    return found


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in read_log(folder / "log.jsonl") if "grad_norm" in entry] if folder.exists() else []


def until(done: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=as_root)], ids=["loopback", "namespaces"])
def test_two_nodes_equal_one_process(apart: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if apart:
        request.getfixturevalue("networks")
    command = [sys.executable, "-m", "tests.engines.node", str(tmp_path / "one"), "3", "0", "1"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}"})
    nodes = Nodes(tmp_path / "two", apart, steps=3)
    try:
        for rank in range(2):
            assert nodes.wait(rank) == 0, nodes.said(rank)
            assert json.dumps({"rank": rank, "step": 3}) in nodes.said(rank)
    finally:
        nodes.end()
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert [entry["step"] for entry in two] == [1, 2, 3]  # one node writes
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=as_root)], ids=["loopback", "namespaces"])
def test_a_node_that_is_killed_ends_the_other_and_the_run_resumes(
    apart: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if apart:
        request.getfixturevalue("networks")
    folder = tmp_path / "run"
    nodes = Nodes(folder, apart, steps=2000, pause=0.3)
    try:
        until(lambda: len(steps_of(folder)) >= 2 or nodes.processes[0].poll() is not None)
        nodes.kill(1)
        started = time.monotonic()
        assert nodes.wait(0, 120) != 0
        assert time.monotonic() - started < 60
        lost = r"rank 1|a rank on another machine"
        assert re.search(rf"({lost}).* of this run has ended.*resume from the last checkpoint", nodes.said(0))
    finally:
        nodes.end()
    resumes(folder, apart)


@as_root
@pytest.mark.slow
def test_a_node_that_is_cut_off_ends_the_other_and_the_run_resumes(networks: None, tmp_path: Path) -> None:
    """No packet passes, and no connection is closed, as after a power failure. It takes a minute to be sure."""
    folder = tmp_path / "run"
    nodes = Nodes(folder, True, steps=2000, pause=0.3)
    try:
        until(lambda: len(steps_of(folder)) >= 2 or nodes.processes[0].poll() is not None)
        sh(f"ip -n {NAMES[1]} link set tg1 down")
        started = time.monotonic()
        assert nodes.wait(0, 180) != 0
        assert time.monotonic() - started < 120
        gone = rf"rank 1 \(machine {NAMES[1]}, silent for 60 s\) of this run has ended.*resume from the last checkpoint"
        assert re.search(gone, nodes.said(0))
    finally:
        nodes.end()
    sh(f"ip -n {NAMES[1]} link set tg1 up")
    resumes(folder, True)


def resumes(folder: Path, apart: bool) -> None:
    """The same command takes the run up where its last checkpoint left it."""
    reached = len(steps_of(folder))
    again = Nodes(folder, apart, steps=reached + 2)
    try:
        assert [again.wait(rank) for rank in range(2)] == [0, 0], again.said(0)
    finally:
        again.end()
    assert [entry["step"] for entry in steps_of(folder)] == list(range(1, reached + 3))
