"""What several test files share."""

import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dlrt.options import LowRankOptions


def plain(**options):
    """Options of a run without what draws at random or changes over the epochs, unless asked for."""
    quiet = {"tau": 0.0, "tau_warmup": 0.0, "label_smoothing": 0.0, "augment": False}
    return LowRankOptions(**{**quiet, **options})


@pytest.fixture
def float64():
    """Tiny matrices in double precision, where the theory's equalities hold to 1e-12."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


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
