"""A grid of runs: what is there is skipped, what broke off is continued, and several run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dlrt.runs import epochs_done


@dataclass(frozen=True)
class Plan:
    """A run to make: a training script and its flags; name is the run's folder below that of the results."""

    name: str
    script: Path
    epochs: int
    flags: Sequence[str]

    def command(self, results: Path, threads: int) -> list[str]:
        folder = results / self.name
        shared = ["--epochs", self.epochs, "--output-dir", folder.parent, "--name", folder.name]
        shared += ["--workers", threads, "--resume", "--quiet"]
        return [sys.executable, *map(str, [self.script, *self.flags, *shared])]


def make(plans: Sequence[Plan], results: Path, jobs: int = 1) -> None:
    """Make every run that is not finished yet, `jobs` at a time, each with its share of the CPU's cores.

    A run that fails is told and the others go on; then the program ends with 1. Ctrl-C stops the runs, whose
    last complete epochs are kept, and ends with 130.
    """
    failed: list[str] = []
    running: dict[subprocess.Popen, Plan] = {}
    waiting = [plan for plan in plans if epochs_done(results / plan.name) < plan.epochs]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    bar = tqdm(total=sum(plan.epochs for plan in plans), unit="epoch", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                plan = waiting.pop(0)
                running[_start(plan.command(results, threads), threads)] = plan
            time.sleep(1)
            _show(bar, plans, results, running)
            for process in [process for process in running if process.poll() is not None]:
                plan, errors = running.pop(process), process.communicate()[1].strip()
                if process.returncode:
                    failed.append(plan.name)
                    tqdm.write(f"{plan.name} failed: {errors.splitlines()[-1] if errors else 'no message'}")
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        sys.exit(130)
    finally:
        _show(bar, plans, results, running)
        bar.close()
    print(f"{len(plans) - len(failed)} of {len(plans)} runs are in {results}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


def _start(command: list[str], threads: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **output)


def _show(bar: tqdm, plans: Sequence[Plan], results: Path, running: dict[subprocess.Popen, Plan]) -> None:
    bar.n = sum(min(plan.epochs, epochs_done(results / plan.name)) for plan in plans)
    bar.set_postfix_str(", ".join(plan.name for plan in running.values()))
