"""Has pytest collect the notebooks wherever they are; a conftest's own hooks would only see the files below it."""

import notebook_runner


def pytest_configure(config):
    if not config.pluginmanager.is_registered(notebook_runner):
        config.pluginmanager.register(notebook_runner, "notebook_runner")
