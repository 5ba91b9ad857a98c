"""Notebooks as tests, run against the generated modules.

A notebook is run once, in a kernel of the Python that runs pytest. Its exported cells are not run: the names they
define are taken from the generated module, so that what is tested is what users install. Each remaining code cell that
holds an assertion is one test, and so is "runs to the end". Nothing after the first error is run; the tests it
blocks fail and say so.

Cells are numbered as in the file: cell 12 is `nb.cells[12]`.
"""

import ast
import configparser
import os
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from symtable import symtable

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_TIMEOUT = 120  # seconds
EXPORTS = {"export", "exporti", "exports"}


# --- reading a notebook -------------------------------------------------------------------------------------------


def directives(source):
    "The `#| name value` and `#| name: value` lines that open a cell, as a dict."
    found = {}
    for line in source.splitlines():
        match = re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)", line)
        if match:
            found[match[1]] = match[2].strip()
        elif line.strip():
            break
    return found


def without_directives(source):
    "The cell without the lines that `directives` reads."
    lines = source.splitlines()
    while lines and (not lines[0].strip() or re.match(r"\s*#\s*\|", lines[0])):
        lines.pop(0)
    return "\n".join(lines)


def plain_python(source):
    "The cell with IPython's magics turned into calls, so that Python can parse it."
    return TransformerManager().transform_cell(source)


def called_names(source):
    "The last part of the name of everything a cell calls; empty when it does not parse (it will fail when run)."
    try:
        tree = ast.parse(plain_python(source))
    except SyntaxError:
        return set()
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {getattr(f, "attr", getattr(f, "id", "")) for f in calls}
    return names | ({"assert"} if any(isinstance(node, ast.Assert) for node in ast.walk(tree)) else set())


def holds_assertion(source):
    "`assert`, fastcore's `test_...`, numpy's `assert_...`, our `expect_error` and `expect_warning`, `pytest.raises` and `pytest.warns`."
    return any(re.match(r"assert_|test_|(assert|expect_error|expect_warning|raises|warns)$", name) for name in called_names(source))


def bound_names(source):
    "The names a cell binds at its top level: by assignment, import, def or class."
    table = symtable(plain_python(source), "cell", "exec")
    return sorted(s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace())


def project_root(path):
    "The nearest folder above `path` that holds settings.ini."
    for folder in Path(path).resolve().parents:
        if (folder / "settings.ini").exists():
            return folder
    raise FileNotFoundError(f"no settings.ini above {path}")


def package_name(root):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / "settings.ini", encoding="utf-8")
    return Path(parser["DEFAULT"]["lib_path"]).name


def import_whole(module):
    "Code that puts every name of a module, private helpers included, among the notebook's globals."
    space = f'vars(__import__("importlib").import_module({module!r}))'
    return f'globals().update({{k: v for k, v in {space}.items() if not k.startswith("__")}})'


def import_again(module, names):
    "Code that takes these names from the module again: a chapter may have shown a naive version under the same name."
    space = f'vars(__import__("sys").modules[{module!r}])'
    return f"globals().update({{k: {space}[k] for k in {names!r} if k in {space}}})"


def code_to_run(nb, package):
    "For each cell the code that is run in its place; empty for prose and for cells that are not to run."
    default, seen, plan = None, set(), []
    for number, cell in enumerate(nb.cells):
        marks = directives(cell.source) if cell.cell_type == "code" else {}
        default = marks.get("default_exp", default)
        exported = EXPORTS & marks.keys()
        if cell.cell_type != "code" or marks.get("eval") == "false" or "nbdev_export" in called_names(cell.source):
            plan.append("")
        elif exported:
            target = marks[exported.pop()] or default
            if not target:
                raise ValueError(f"cell {number} is exported but the notebook has no default_exp")
            module = f"{package}.{target}"
            first = module not in seen
            seen.add(module)
            plan.append(import_whole(module) if first else import_again(module, bound_names(cell.source)))
        else:
            plan.append(cell.source)
    return plan


def label(nb, number):
    "The heading a cell stands under, else its first line of code."
    heading = ""
    for cell in nb.cells[:number]:
        if cell.cell_type == "markdown":
            text = re.sub(r"(?ms)^```.*?^```", "", cell.source)
            found = re.findall(r"(?m)^##+ +(.*?)(?: *\{[^}]*\})? *$", text)
            heading = re.sub(r"[`*]", "", found[-1]) if found else heading
    code = without_directives(nb.cells[number].source).splitlines()
    first = next((line.strip() for line in code if not line.strip().startswith("#")), "")
    text = (heading or first).replace("::", ":")  # pytest splits a test's address at double colons
    return text if len(text) <= 60 else text[:59] + "…"


# --- running a notebook -------------------------------------------------------------------------------------------


class ThisPython(KernelSpecManager):
    "Knows one kernel, the running Python, whatever kernels a machine or a user has registered."

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python", language="python")


@dataclass
class CellError:
    number: int
    summary: str
    traceback: str


class NotebookRun:
    "One run of one notebook, cell by cell, only as far as asked. The kernel starts with the first cell that needs it."

    def __init__(self, path):
        self.path = Path(path)
        self.root = project_root(self.path)
        self.nb = nbformat.read(self.path, as_version=4)  # as written
        self.ran = nbformat.read(self.path, as_version=4)  # as run, with outputs
        for cell, code in zip(self.ran.cells, code_to_run(self.nb, package_name(self.root))):
            if cell.cell_type == "code":
                cell.source = code
        self.done, self.error, self.client, self.open = 0, None, None, ExitStack()

    def start(self):
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
        client = NotebookClient(self.ran, km=manager, timeout=CELL_TIMEOUT, force_raise_errors=True,
                                coalesce_streams=True, extra_arguments=["--log-level=ERROR"],  # not on every start
                                resources={"metadata": {"path": str(self.path.parent)}})
        # The modules next to this notebook come first, wherever the package may be installed as well.
        paths = [str(self.root), os.environ.get("PYTHONPATH")]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
        self.open.enter_context(client.setup_kernel(env=env, cleanup_kc=True))
        self.client = client

    def run_to(self, number):
        "Run the cells up to and including `number` that have not been run, unless one has failed."
        while self.done <= number and self.error is None:
            cell = self.ran.cells[self.done]
            if cell.cell_type == "code" and cell.source.strip():
                self.run_cell(cell)
            self.done += 1

    def run_cell(self, cell):
        try:
            if self.client is None:
                self.start()
            self.client.execute_cell(cell, self.done)
        except CellExecutionError as error:
            trace = "\n".join(line for out in cell.outputs for line in out.get("traceback", []))
            self.fail(f"{error.ename}: {error.evalue}", trace or str(error))
        except Exception as error:  # a cell out of time, a dead kernel
            if self.client:
                self.client.shutdown_kernel = "immediate"  # it may be busy and not hear a polite request
            self.fail(f"{type(error).__name__}: {error}", str(error))

    def fail(self, summary, trace):
        summary, trace = (re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text) for text in (summary, trace))
        first = summary.splitlines()[0]
        self.error = CellError(self.done, first if len(first) <= 100 else first[:99] + "…", trace)

    def printed(self, number):
        "What a cell wrote, as (stream, text) pairs."
        return [(out.name, out.text) for out in self.ran.cells[number].get("outputs", []) if out.output_type == "stream"]

    def close(self):
        self.open.close()


def run_whole(path):
    "The run of a whole notebook, finished. A cell that fails ends the program with its traceback."
    run = NotebookRun(path)
    try:
        run.run_to(len(run.nb.cells) - 1)
    finally:
        run.close()
    if run.error:
        raise SystemExit(f"{run.path.name}, cell {run.error.number}:\n{run.error.traceback}")
    return run


# --- the tests of a notebook --------------------------------------------------------------------------------------


class NotebookFailure(Exception):
    "Its message is the whole report of a failed test."


class NotebookFile(pytest.File):
    def collect(self):
        self.run = NotebookRun(self.path)
        tested = set()
        for number, cell in enumerate(self.run.nb.cells):
            marks = directives(cell.source) if cell.cell_type == "code" else {}
            if cell.cell_type == "code" and not EXPORTS & marks.keys() and holds_assertion(cell.source):
                tested.add(number)
                name = f"cell {number}: {label(self.run.nb, number)}"
                yield NotebookTest.from_parent(self, name=name, number=number, off=marks.get("eval") == "false")
        last = len(self.run.nb.cells) - 1
        yield NotebookTest.from_parent(self, name="runs to the end", number=last, end=True, tested=tested)

    def teardown(self):
        self.run.close()


class NotebookTest(pytest.Item):
    def __init__(self, *, number, off=False, end=False, tested=(), **kw):
        super().__init__(**kw)
        self.number, self.off, self.end, self.tested = number, off, end, tested

    def runtest(self):
        if self.off:
            pytest.skip("the cell is marked eval: false")
        run = self.parent.run
        run.run_to(self.number)
        if run.error is None:
            return
        # The traceback is shown once: by the test of the cell itself, or at the end if that cell has none.
        failed = run.error.number
        if failed not in self.tested if self.end else failed == self.number:
            for stream, text in run.printed(failed):
                self.add_report_section("call", stream, text)
            raise NotebookFailure(f"{self.path.name}, cell {failed}:\n{run.error.traceback}")
        if failed <= self.number:
            raise NotebookFailure(f"blocked by the error in cell {failed}: {run.error.summary}")

    def repr_failure(self, excinfo):
        return str(excinfo.value) if excinfo.errisinstance(NotebookFailure) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, self.name


# --- pytest's hooks -----------------------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path):
    "Copies that the site's tools make are no notebooks of ours."
    return True if collection_path.name in {"_proc", "_docs", ".ipynb_checkpoints"} else None


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and not file_path.name.startswith(("_", ".")):
        return NotebookFile.from_parent(parent, path=file_path)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    "Close with the counts alone on the last line. An error in a fixture or while collecting counts as a failure."
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and not session.config.option.collectonly:
        count = {outcome: len(reports) for outcome, reports in terminal.stats.items()}
        passed = count.get("passed", 0) + count.get("xpassed", 0)
        failed = count.get("failed", 0) + count.get("error", 0)
        skipped = count.get("skipped", 0) + count.get("xfailed", 0)
        terminal.write_line(f"{passed} passed, {failed} failed, {skipped} skipped")
    return result
