"""How the tests are run: the processes they are dealt out to, and in what order."""

import gc

SHARED = ("test_timings.py", "test_cams.py")  # files whose tests share what takes long to make


def pytest_configure(config):
    """Load the fixtures, but not where tests are only dealt out to other processes: that takes seconds."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared")


def pytest_collection_modifyitems(items):
    """Those files come first: a worker that runs out of tests takes over the last ones of another."""
    items.sort(key=lambda item: item.path.name not in SHARED)


def pytest_collection_finish():
    """What is imported stays: to search it for garbage again and again takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
