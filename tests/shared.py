"""What several test files share, and what takes seconds to import: whatever is forked has it already."""

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import sklearn.datasets  # noqa: F401  (for whatever is forked, as the next but one)
import torch
import torch._dynamo

from dlrt.low_rank_options import LowRankOptions
from dlrt.models import ResNet20


def plain(**options):
    """Options of a run without what draws at random or changes over the epochs, unless asked for."""
    quiet = {"tau": 0.0, "tau_warmup": 0.0, "label_smoothing": 0.0, "augment": False}
    return LowRankOptions(**{**quiet, **options})


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests came before it in its process."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Tiny matrices in double precision, where the theory's equalities hold to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def resnet():
    """A ResNet20 of random weights, two random pictures, and batch norms that have seen such pictures."""
    torch.manual_seed(0)
    model, x = ResNet20(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 32, 32))
    return model.eval(), x


@pytest.fixture
def run_script(monkeypatch, tmp_path, capsys):
    """Run a script of the tree as the command line does, from tmp_path, but in this process: to import torch
    takes seconds. What comes back is that of `subprocess.run`."""

    def run(script, *flags):
        path = Path(__file__).parents[1] / script
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
        monkeypatch.syspath_prepend(path.parent)
        threads, loaded, code = torch.get_num_threads(), set(sys.modules), 0
        capsys.readouterr()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a user would see it, but not a deprecation
                warnings.simplefilter("ignore", DeprecationWarning)
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            torch.set_num_threads(threads)
            for name in set(sys.modules) - loaded:  # another script may have another sibling of that name
                if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == path.parent:
                    del sys.modules[name]
        out, err = capsys.readouterr()
        if isinstance(code, str):
            code, err = 1, f"{err}{code}\n"
        return subprocess.CompletedProcess(sys.argv, code, out, err)

    return run


class Forked:
    """A script, or -m or -c, in a process of its own, as by subprocess.Popen([python, script, *flags]).

    It is forked from this one, which has imported torch already: that takes seconds. `env` adds to the
    environment.
    """

    def __init__(self, command, cwd=".", env=(), stdout=None, stderr=None):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = self._run([str(part) for part in command[1:]], cwd, env, stdout, stderr)
            finally:
                os._exit(code)

    @staticmethod
    def _run(arguments, cwd, env, *outputs):
        code = 0
        for number, file in enumerate(outputs, start=1):
            to = os.open(os.devnull, os.O_WRONLY) if file in (None, subprocess.DEVNULL) else file.fileno()
            os.dup2(to, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # the threads of the process before are not there
        try:
            os.chdir(cwd)
            os.environ.update(env)
            if arguments[0] == "-m":
                sys.argv = arguments[1:]
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            elif arguments[0] == "-c":
                exec(arguments[1], {"__name__": "__main__"})
            else:
                sys.argv = arguments
                sys.path.insert(0, str(Path(arguments[0]).parent))
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        return self.poll(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def fork(command, send=None, once=None, **options):
    """Run a script to its end in a `Forked` process; what comes back is that of `subprocess.run`.

    It is sent a signal 0.1 s after a file `once` is there.
    """
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process, end = Forked(command, stdout=out, stderr=err, **options), time.monotonic() + 300
        while (code := process.poll()) is None:
            if send and once.exists():
                time.sleep(0.1)
                process.send_signal(send)
                send = None
            if time.monotonic() > end:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(command, code, *texts)


@pytest.fixture
def forked_grid(monkeypatch):
    """The runs of a grid are `Forked`."""
    monkeypatch.setattr("dlrt.grid.Popen", Forked)
