"""Whatever its user can cause ends a program with one line and an exit code, and nothing else does."""

from types import SimpleNamespace

import pytest

from dlrt import errors

CASES = [
    (errors.RunError("no run"), 1, "train.py: no run\n"),
    (errors.DataError("no data"), 1, "train.py: no data\n"),
    (errors.OptionError("no option"), errors.IMPOSSIBLE, "train.py: no option\n"),
    (OSError(17, "File exists", "a/b"), 1, "train.py: a/b cannot be used (File exists): take another\n"),
    (OSError("a/b cannot be written"), 1, "train.py: a/b cannot be written\n"),
    (FloatingPointError("the loss is nan"), errors.DIVERGED, "train.py: the loss is nan\n"),
    (KeyboardInterrupt(), 130, "\ntrain.py: interrupted; what is finished is kept\n"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/where/train.py"])


def ended(error, **options):
    @errors.boundary(**options)
    def program():
        raise error

    with pytest.raises(SystemExit) as end:
        program()
    return end.value.code


@pytest.mark.parametrize(("error", "code", "line"), CASES, ids=lambda case: type(case).__name__)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    assert ended(error) == code
    assert capsys.readouterr().err == line


def test_a_program_may_have_a_code_of_its_own_but_an_option_and_a_loss_keep_theirs():
    errs = errors.RunError("a"), OSError("a"), errors.OptionError("a"), FloatingPointError("a")
    assert [ended(error, code=7) for error in errs] == [7, 7, errors.IMPOSSIBLE, errors.DIVERGED]


@pytest.mark.parametrize("error", [ValueError("a fault"), ZeroDivisionError()])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), errors.boundary():
        raise error


def test_in_development_mode_an_error_keeps_what_caused_it(monkeypatch):
    monkeypatch.setattr("sys.flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(errors.RunError) as found, errors.boundary():
        raise errors.RunError("damaged") from KeyError("a slip")
    assert isinstance(found.value.__cause__, KeyError)


def test_of_several_processes_the_first_reports_what_strikes_all(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert ended(FloatingPointError("nan")) == errors.DIVERGED
    assert ended(KeyboardInterrupt()) == 130
    assert ended(errors.ProcessError("lost")) == 1
    assert capsys.readouterr().err == "train.py: process 1: lost\n"


def test_a_module_is_called_as_in_its_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/lib/dlrt/__main__.py"])
    assert errors.program() == "python -m dlrt"


def test_any_text_fits_on_a_line():
    assert errors.one_line("a\n b\t\x07\ud800") == r"a b \x07\ud800"
