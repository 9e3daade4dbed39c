"""A grid of runs: what is there is skipped, what broke off is continued, and several run at a time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dlrt.runs import DIVERGED, NOT_PART_OF_THE_EXPERIMENT, epochs_done


@dataclass(frozen=True)
class Plan:
    """A run to make: a training script and its options, by the names that they have in config.json.

    name is the run's folder below that of the results. A run is of `epochs` and then finetune_epochs.
    """

    name: str
    script: Path
    epochs: int
    options: Mapping[str, Any]
    finetune_epochs: int = 0

    @property
    def all_epochs(self) -> int:
        return self.epochs + self.finetune_epochs

    def command(self, results: Path, threads: int) -> list[str]:
        """The command that begins the run or goes on with it."""
        folder = results / self.name
        options = {**self.options, "epochs": self.epochs, "output_dir": folder.parent, "name": folder.name}
        if self.finetune_epochs:  # a dense run has no such flag
            options["finetune_epochs"] = self.finetune_epochs
        command = [sys.executable, str(self.script), "--resume", "--quiet", "--workers", str(threads)]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                command.append(flag if value else f"--no{flag[1:]}")
            else:
                command += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
        return command

    def other_options(self, results: Path) -> list[str]:
        """In which options the run that is there differs from this plan."""
        path = results / self.name / "config.json"
        if not path.exists():
            return []
        was = {"finetune_epochs": 0, **json.loads(path.read_text())["options"]}
        options = {**self.options, "epochs": self.epochs, "finetune_epochs": self.finetune_epochs}
        return [
            f"{name} {was.get(name)!r} instead of {value!r}"
            for name, value in options.items()
            if name not in NOT_PART_OF_THE_EXPERIMENT and not _same(name, was.get(name), value)
        ]


def _same(name: str, recorded: Any, value: Any) -> bool:
    """Whether a value of config.json is the planned one; of weights it has the file's name and a checksum."""
    if name == "from_checkpoint":
        return re.sub(r" [0-9a-f]{8}$", "", str(recorded)) == Path(value).name
    if name == "rank" and type(recorded) is not type(value):  # 1 is a rank, 1.0 the full one
        return False
    return recorded == (list(value) if isinstance(value, tuple) else value)


def make(plans: Sequence[Plan], results: Path, jobs: int = 1, may_diverge: bool = False) -> None:
    """Make every run that is not finished yet, `jobs` at a time, each with its share of the CPU's cores.

    A run that fails is told and the others go on; then the program ends with 1, unless it was for a loss that
    is not finite and runs may diverge. Ctrl-C stops the runs, whose last complete epochs are kept, and ends
    with 130. A run that is there with other options ends the program with 1 before any of these is made.
    """
    for plan in plans:
        if other := plan.other_options(results):
            folder = results / plan.name
            sys.exit(f"{folder} was made with {', '.join(other)}: move it, or take another --output-dir")
    if not plans:
        return
    with tempfile.TemporaryDirectory() as logs:
        failed = _run_all(plans, results, jobs, Path(logs), may_diverge)
    print(f"{len(plans) - len(failed)} of {len(plans)} runs are in {results}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


def _run_all(plans: Sequence[Plan], results: Path, jobs: int, logs: Path, may_diverge: bool) -> list[str]:
    """Make what is missing, with a bar over the epochs of all plans; the names of those that failed."""
    failed: list[str] = []
    running: dict[subprocess.Popen, Plan] = {}
    done = {plan.name: epochs_done(results / plan.name) for plan in plans}
    waiting = [plan for plan in plans if done[plan.name] < plan.all_epochs]
    threads = max(1, torch.get_num_threads() // jobs)  # of the cores that this program may use
    there = sum(done.values())
    bar = tqdm(total=sum(plan.all_epochs for plan in plans), initial=there, unit="epoch", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                plan = waiting.pop(0)
                running[_start(plan.command(results, threads), threads, _log(logs, plan))] = plan
            time.sleep(1)
            for process, plan in list(running.items()):
                ended = process.poll() is not None
                done[plan.name] = epochs_done(results / plan.name)
                if not ended:
                    continue
                del running[process]
                if process.returncode:
                    tqdm.write(f"{plan.name} failed: {_last_line(_log(logs, plan))}")
                    if not (may_diverge and process.returncode == DIVERGED):
                        failed.append(plan.name)
            bar.set_postfix_str(", ".join(plan.name for plan in running.values()), refresh=False)
            bar.update(sum(done.values()) - bar.n)
    except BaseException as error:  # whatever ends this program ends its runs
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        raise
    finally:
        bar.close()
    return failed


def _start(command: list[str], threads: int, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as errors:  # a pipe that nobody reads would stop the run when it is full
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def _log(logs: Path, plan: Plan) -> Path:
    return logs / plan.name.replace("/", " ")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"
