"""Times steps in turn and measures the memory of one, so that a drifting machine cannot favour either side."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.setting import Setting
from benchmarks.steps import STEPS


@dataclass
class Timing:
    """Seconds per step of one implementation, and the loss of its second step.

    At the first step policy and reference are equal and the loss is ln 2 for everybody; the second one also says
    whether the gradients were the same.
    """

    name: str
    seconds: list[float]
    second_loss: float

    def summary(self, tokens: int) -> dict[str, Any]:
        median = statistics.median(self.seconds)
        return {
            "name": self.name,
            "median_s": median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "tokens_per_s": tokens / median,
            "second_loss": self.second_loss,
        }


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_alternating(
    setting: Setting, names: list[str], repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """One step of each in turn, `repeats` times, after `warmup` rounds."""
    steps = {name: STEPS[name](setting) for name in names}
    timings = {name: Timing(step.name, [], float("nan")) for name, step in steps.items()}
    for round_ in range(warmup + repeats):
        for name, step in steps.items():
            gc.collect()
            synchronise(setting.device)
            start = clock()
            loss = step.step()
            synchronise(setting.device)
            if round_ == 1:
                timings[name].second_loss = loss
            if round_ >= warmup:
                timings[name].seconds.append(clock() - start)
    return list(timings.values())


CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def alternating(steps: Sequence[Any], repeats: int) -> dict[str, list[Timing]]:
    """Timings of objects with a `name` and a `step()` in turn, by clock, after a first step of each.

    Other processes do not stretch a process's CPU seconds.
    """
    found = {clock: [Timing(step.name, [], float("nan")) for step in steps] for clock in CLOCKS}
    for round_ in range(repeats + 1):
        for place, step in enumerate(steps):
            before = {clock: read() for clock, read in CLOCKS.items()}
            loss = step.step()
            for clock, read in CLOCKS.items():
                timing = found[clock][place]
                timing.second_loss = loss if round_ == 1 else timing.second_loss
                timing.seconds += [read() - before[clock]] if round_ else []
    return found


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times as fast `fast` is, pair by pair."""
    ratios = sorted(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))
    return {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}


def peak_memory(setting: Setting, name: str, *, whole: bool = False) -> float:
    """Peak MiB of one step above policy, reference and optimiser, in a fresh process; of all that it has if `whole`."""
    code = (
        "import sys, json; from benchmarks.timing import _measure_peak; from benchmarks.setting import Setting;"
        "s = json.loads(sys.argv[1]); s['prompt'] = tuple(s['prompt']); s['completion'] = tuple(s['completion']);"
        "print('PEAK', _measure_peak(Setting(**s), sys.argv[2], bool(sys.argv[3])))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(setting)), name, "whole" * whole],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        # Freed memory goes back to the system at once, so the peak is what the step really holds.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    if run.returncode:
        raise RuntimeError(f"measuring {name} failed:\n{run.stderr[-2000:]}")
    return float(run.stdout.split("PEAK")[-1])


def _measure_peak(setting: Setting, name: str, whole: bool) -> float:
    # The first steps make gradients and optimiser state; both belong to every implementation alike.
    small = STEPS[name](setting)
    small.optimiser.zero_grad = lambda: torch.optim.Optimizer.zero_grad(small.optimiser, set_to_none=False)
    small.step()
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = 0 if whole else torch.cuda.memory_allocated()
        small.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    sampler = ResidentSampler()
    with sampler:
        small.step()
    return (sampler.peak - (0 if whole else sampler.before)) / 2**20


class ResidentSampler:
    """Peak resident bytes of this process while the block runs, sampled every millisecond."""

    def __enter__(self) -> ResidentSampler:
        self.before = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine(module: str = "benchmarks.preference_step") -> dict[str, Any]:
    """What the numbers were measured on; `module` is the command that was run."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "date": date.today().isoformat(),
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
    }
