"""A grid of runs: what is there is skipped, what broke off is continued, and several run at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dlrt.runs import epochs_done

WHERE = ("data_dir", "device", "from_checkpoint")  # a run may be looked at where its data are not


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
        folder = results / self.name
        options = {**self._options(), "output_dir": folder.parent, "name": folder.name, "workers": threads}
        command = [sys.executable, str(self.script), "--resume", "--quiet"]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                command.append(flag if value else f"--no{flag[1:]}")
            else:
                command += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
        return command

    def is_finished(self, results: Path) -> bool:
        """Whether all epochs are there; ends the program where the run was made with other options."""
        folder = results / self.name
        if epochs_done(folder) < self.all_epochs:
            return False
        was = json.loads((folder / "config.json").read_text())["options"]
        other = [
            f"{name} {was.get(name)!r} instead of {value!r}"
            for name, value in self._options().items()
            if name not in WHERE and was.get(name) != (list(value) if isinstance(value, tuple) else value)
        ]
        if other:
            sys.exit(f"{folder} was made with {', '.join(other)}: move it away, or take another --output-dir")
        return True

    def _options(self) -> dict[str, Any]:
        finetuning = {"finetune_epochs": self.finetune_epochs} if self.finetune_epochs else {}
        return {**self.options, "epochs": self.epochs, **finetuning}


def make(plans: Sequence[Plan], results: Path, jobs: int = 1, may_fail: bool = False) -> None:
    """Make every run that is not finished yet, `jobs` at a time, each with its share of the CPU's cores.

    A run that fails is told and the others go on; then the program ends with 1, unless they may fail. Ctrl-C
    stops the runs, whose last complete epochs are kept, and ends with 130. A finished run of other options
    ends the program with 1 before anything is made.
    """
    waiting = [plan for plan in plans if not plan.is_finished(results)]
    with tempfile.TemporaryDirectory() as logs:
        failed = _run_all(plans, waiting, results, jobs, Path(logs))
    print(f"{len(plans) - len(failed)} of {len(plans)} runs are in {results}")
    if failed and not may_fail:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


def _run_all(plans: Sequence[Plan], waiting: list[Plan], results: Path, jobs: int, logs: Path) -> list[str]:
    """Make the waiting runs, with a bar over the epochs of all plans; the names of those that failed."""
    failed: list[str] = []
    running: dict[subprocess.Popen, Plan] = {}
    done = {plan.name: epochs_done(results / plan.name) for plan in plans}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    there = sum(done.values())
    bar = tqdm(total=sum(plan.all_epochs for plan in plans), initial=there, unit="epoch", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                plan = waiting.pop(0)
                log = logs / plan.name.replace("/", " ")
                running[_start(plan.command(results, threads), threads, log)] = plan
            time.sleep(1)
            for process, plan in list(running.items()):
                ended = process.poll() is not None
                done[plan.name] = epochs_done(results / plan.name)
                if ended and running.pop(process) and process.returncode:
                    failed.append(plan.name)
                    log = logs / plan.name.replace("/", " ")
                    tqdm.write(f"{plan.name} failed: {_last_line(log)}")
            bar.set_postfix_str(", ".join(plan.name for plan in running.values()), refresh=False)
            bar.update(sum(done.values()) - bar.n)
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        sys.exit(130)
    finally:
        bar.close()
    return failed


def _start(command: list[str], threads: int, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as errors:  # a pipe that nobody reads would stop the run when it is full
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"
