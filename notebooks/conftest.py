"""The notebooks as tests (nbval): small scale, one thread, and nothing more of a notebook after a cell has failed."""

import os

import pytest

ENVIRONMENT = {
    "RLHF_EDU_SCALE": os.environ.get("RLHF_EDU_SCALE") or "smoke",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1",
    "MPLBACKEND": "agg",
    "HF_HUB_OFFLINE": "1",  # nothing in a notebook needs the network
}


def is_cell(item) -> bool:
    return type(item).__name__ == "IPyNbCell"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """The first cell's set-up starts the kernel, which inherits this environment; the other tests do not."""
    if is_cell(item) and getattr(item.parent, "failed", None):
        pytest.skip(f"{item.parent.failed} failed")
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT if is_cell(item) else {})
    try:
        return (yield)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if is_cell(item) and report.failed:
        item.parent.failed = item.name
    return report
