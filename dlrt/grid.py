"""A grid of runs: what is there is skipped, what broke off is continued, and several run at a time."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from tqdm import tqdm

from dlrt.datasets import TEXTS, load
from dlrt.errors import DIVERGED, RunError
from dlrt.flags import NATURAL, TOLERANCE, HelpFormatter, Parser
from dlrt.option_fields import add_flags, as_flags
from dlrt.options import DATA_DIR, NOT_PART_OF_THE_EXPERIMENT, Options
from dlrt.runs import epochs_done, epochs_planned, read_options, same_option

SHARED = ("dataset", "data_dir", "device")  # options of a grid that every one of its runs gets


def make_parser(
    description: str,
    folder: Path,
    epochs: int | None,
    seeds: int = 3,
    taus: Sequence[float] = (),
    runs: str = "every run",
    options: type[Options] = Options,
) -> Parser:
    """A parser for the run.py of an experiment, which makes a grid of runs in the folder's results/.

    runs says of which of them --epochs and --taus are, options what one is.
    """
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--epochs", type=NATURAL, default=epochs, help=f"of {runs}")
    add("--seeds", type=NATURAL, default=seeds, help="runs of every setting")
    if taus:
        add("--taus", type=TOLERANCE, nargs="*", default=taus, help=f"tolerances of {runs}")
    add("--jobs", type=NATURAL, default=1, help="runs at a time, which share the CPU's cores")
    add_flags(parser, options, *SHARED)
    add("--output-dir", type=Path, default=folder / "results", help="where the run folders go")
    return parser


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a grid that every one of its runs gets."""
    return {name: getattr(args, name) for name in SHARED}


@dataclass(frozen=True, eq=False)
class RunSpec:
    """A run to make: a training script and its options, by the names that they have in config.json.

    name is the run's folder below that of the results; `epochs` is among the options.
    """

    name: str
    script: Path
    options: Mapping[str, Any]

    @property
    def epochs(self) -> int:
        return epochs_planned(self.options)

    def command(self, results: Path, threads: int) -> list[str]:
        """The command that begins the run or goes on with it."""
        folder = results / self.name
        place = {"output_dir": folder.parent, "name": folder.name, "workers": threads}
        command = [sys.executable, str(self.script), "--quiet", *as_flags({**self.options, **place})]
        return command + ["--resume"] * folder.exists()

    def other_options(self, results: Path, **recorded: Any) -> list[str]:
        """In which options the run that is there differs from this plan, or in what else is recorded."""
        was = read_options(results / self.name)
        if not was:
            return []
        return [
            f"{name} {was.get(name)!r} instead of {value!r}"
            for name, value in {"finetune_epochs": 0, **self.options, **recorded}.items()
            if name not in NOT_PART_OF_THE_EXPERIMENT and not _same(name, was.get(name), value)
        ]


def _same(name: str, recorded: Any, value: Any) -> bool:
    """Whether a value of config.json is the planned one; of weights it has the file's name and a checksum."""
    if name == "from_checkpoint":
        return re.sub(r" [0-9a-f]{8}$", "", str(recorded)) == Path(value).name
    return same_option(name, recorded, list(value) if isinstance(value, tuple) else value)


def make(
    plans: Sequence[RunSpec],
    results: Path,
    jobs: int = 1,
    may_diverge: bool = False,
    then: Sequence[RunSpec] = (),
) -> None:
    """Make every run that is not finished yet, `jobs` at a time, each with its share of the CPU's cores.

    A run that fails is reported and the others go on; then RunError, unless it was for a loss that is not
    finite and runs may diverge. Ctrl-C and SIGTERM (exit code 143) stop the runs, whose last complete epochs
    are kept. RunError before any is made where a run is there with other options, of other data, or damaged.
    Records without weights are finished runs, too, unless one of the plans `then` is missing and begins with
    those weights: its record is deleted when it is made again, and what is finished stays as it is.
    """
    if not plans:
        return
    plans = list({plan.name: plan for plan in plans}.values())
    _check_there(plans, results)
    missing = _missing(plans, then, results)
    _check_data(plans, missing, results)
    results.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    codes = _run_all(plans, missing, results, jobs)
    failed = [name for name, code in codes.items() if not (may_diverge and code == DIVERGED)]
    print(f"{len(plans) - len(codes)} of {len(plans)} runs are in {results}")
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; the same command tries them again")


def _check_there(plans: Sequence[RunSpec], results: Path, **recorded: Any) -> None:
    for plan in plans:
        if other := plan.other_options(results, **recorded):
            was = f"{results / plan.name} was made with {', '.join(other)}"
            raise RunError(f"{was}: move it, or take another --output-dir")


def _check_data(plans: Sequence[RunSpec], missing: Sequence[RunSpec], results: Path) -> None:
    """Load the data once, before several runs would fetch them, and compare: where a run is still to be made.

    Texts, which are never fetched, are compared always.
    """
    shared = plans[0].options
    if "dataset" in shared and (missing or shared["dataset"] in TEXTS):
        data = load(shared["dataset"], shared.get("data_dir", DATA_DIR), seed=0)
        _check_there(plans, results, data=data.checksum)


def _missing(plans: Sequence[RunSpec], then: Sequence[RunSpec], results: Path) -> list[RunSpec]:
    """The plans whose run is not finished, or lacks the weights with which a missing one of `then` begins."""

    def finished(plan: RunSpec) -> bool:
        return epochs_done(results / plan.name) >= plan.epochs

    starts = {plan.options.get("from_checkpoint") for plan in then if not finished(plan)}
    return [
        plan
        for plan in plans
        if not finished(plan)
        or (results / plan.name in starts and not (results / plan.name / "checkpoint.pt").exists())
    ]


def _run_all(
    plans: Sequence[RunSpec], missing: Sequence[RunSpec], results: Path, jobs: int
) -> dict[str, int]:
    """Make what is missing, with a bar over the epochs of all plans; the exit codes of those that failed."""
    waiting, failed = list(missing), {}
    running: dict[Popen, tuple[RunSpec, IO[bytes]]] = {}
    done = {plan.name: epochs_done(results / plan.name) for plan in plans}
    # of the cores that this program may use
    threads = max(1, torch.get_num_threads() // max(1, min(jobs, len(waiting))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    total, there = sum(plan.epochs for plan in plans), sum(done.values())
    with ExitStack() as logs, tqdm(total=total, initial=there, unit="epoch", disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    plan = waiting.pop(0)
                    if not (results / plan.name / "checkpoint.pt").exists():
                        (results / plan.name / "metrics.csv").unlink(missing_ok=True)
                    command = plan.command(results, threads)
                    log = logs.enter_context(TemporaryFile())  # a pipe that nobody reads would stop the run
                    process = Popen(command, env=environment, stdout=DEVNULL, stderr=log)
                    running[process] = plan, log
                time.sleep(0.2)
                for process, (plan, log) in list(running.items()):
                    code = process.poll()
                    done[plan.name] = epochs_done(results / plan.name)
                    if code is not None:
                        del running[process]
                    if code:
                        failed[plan.name] = code
                        tqdm.write(f"{plan.name} failed: {_last_line(log)}")
                bar.set_postfix_str(", ".join(plan.name for plan, _ in running.values()), refresh=False)
                bar.update(sum(done.values()) - bar.n)
        except BaseException:  # whatever ends this program ends its runs
            for process in running:
                process.terminate()  # they may ignore SIGINT, as in the background
            for process in running:
                process.wait()
            raise
    return failed


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"
