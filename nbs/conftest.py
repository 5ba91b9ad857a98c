"""Lets `pytest nbs/05_qp.ipynb` find the collector of notebooks, which lives in tests/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def pytest_configure(config):
    import notebook_runner

    if not config.pluginmanager.is_registered(notebook_runner):
        config.pluginmanager.register(notebook_runner, "notebook_runner")
