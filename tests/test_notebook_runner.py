"""The collector of notebooks is tested on small projects made for the purpose."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from make_readme import FIRST_LINE, to_markdown
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from notebook_runner import bound_names, directives, holds_assertion, label

HERE = Path(__file__).resolve().parent
HEADER = "#| default_exp shapes"
CLOSING = "#| hide\nimport nbdev; nbdev.nbdev_export()"


@pytest.fixture
def project(tmp_path):
    "A function that writes a project of one module and some notebooks, runs pytest in it and returns the result."

    def run(module, notebooks, *args):
        for folder in ("nbs", "tests", "pkg"):
            (tmp_path / folder).mkdir()
        (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_path = pkg\nnbs_path = nbs\n")
        (tmp_path / "setup.py").write_text("")  # by this pytest knows the top level
        (tmp_path / "pkg/__init__.py").write_text("")
        (tmp_path / "pkg/shapes.py").write_text(module)
        for name in ("conftest.py", "notebook_runner.py"):
            shutil.copy(HERE / name, tmp_path / "tests" / name)
        shutil.copy(HERE.parent / "nbs/conftest.py", tmp_path / "nbs/conftest.py")
        for name, sources in notebooks.items():
            cells = [(new_markdown_cell if s.startswith("##") else new_code_cell)(s) for s in sources]
            path = tmp_path / "nbs" / name
            path.parent.mkdir(exist_ok=True)
            nbformat.write(new_notebook(cells=cells), path)
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout

    return run


def outcome(output, test):
    "The word that pytest -v prints after a test's name."
    return re.search(rf"(?m)^nbs/.*::{re.escape(test)} (\w+)", output)[1]


def last_line(output):
    return output.splitlines()[-1]


def test_failing_assertion_blocks_what_follows(project):
    code, out = project("def area(a): return a * a\n", {"00_shapes.ipynb": [
        HEADER,
        "## Squares",
        "#| export\ndef area(a): return a * a",
        "assert area(3) == 9",
        "print('just before')\nassert area(3) == 10",
        "assert area(1) == 1",
        CLOSING,
    ]})
    assert code == 1
    assert outcome(out, "cell 3: Squares") == "PASSED"
    assert outcome(out, "cell 4: Squares") == "FAILED"
    assert outcome(out, "cell 5: Squares") == "FAILED"
    assert outcome(out, "runs to the end") == "FAILED"
    assert out.count("blocked by the error in cell 4: AssertionError") >= 2
    report = out.split("short test summary info")[0]  # the summary below it is longer where CI is set
    assert report.count("assert area(3) == 10") == 1, "the traceback is shown, and shown once"
    assert "just before" in out
    assert "\x1b" not in out
    assert last_line(out) == "1 passed, 3 failed, 0 skipped"


def test_the_module_is_what_is_tested(project):
    "The cells say one thing, a module that was not exported again says another, private helper included."
    code, out = project("def area(a): return _twice(a)\ndef _twice(a): return 2 * a\n", {"00_shapes.ipynb": [
        HEADER,
        "#| export\ndef area(a): return a * a",
        "assert area(3) == 6",
        "def area(a): return 'naive'\nassert area(3) == 'naive'",
        "#| export\ndef area(a): return a * a\ndef missing(): pass",
        "assert area(4) == 8 and _twice(1) == 2\nassert area.__module__ == 'pkg.shapes'",
        "assert 'missing' not in globals()",
    ]})
    assert code == 0, out
    assert last_line(out) == "5 passed, 0 failed, 0 skipped"


def test_errors_outside_assertions(project):
    code, out = project("x = 1\n", {
        "00_shapes.ipynb": [HEADER, "#| export\nx = 1", "assert x == 1", "x / 0", CLOSING],
        "01_absent.ipynb": ["#| default_exp absent", "#| export\ny = 1", "assert y == 1"],
        "lessons/02_dead.ipynb": ["from pathlib import Path\nassert Path.cwd().name == 'lessons'",
                                  "import os\nos._exit(1)"],
        "_draft.ipynb": ["assert False"],
    })
    assert code == 1
    assert outcome(out, "cell 2: assert x == 1") == "PASSED"
    assert "ZeroDivisionError" in out
    assert outcome(out, "cell 2: assert y == 1") == "FAILED"
    assert "blocked by the error in cell 1: ModuleNotFoundError: No module named 'pkg.absent'" in out
    assert outcome(out, "cell 0: from pathlib import Path") == "PASSED"
    assert "Kernel died" in out
    assert "_draft" not in out
    assert last_line(out) == "2 passed, 4 failed, 0 skipped"


def test_cells_that_do_not_run(project):
    "`eval: false` is reported as skipped, and nothing is exported. One notebook can be named on the command line."
    code, out = project("x = 1\n", {
        "00_shapes.ipynb": [HEADER, "#| export\nx = 1", "#| eval: false\nassert x == 2", CLOSING],
        "01_other.ipynb": ["assert False"],
    }, "nbs/00_shapes.ipynb")
    assert code == 0, out
    assert last_line(out) == "1 passed, 0 failed, 1 skipped"


def test_broken_notebook_counts_as_failed(project):
    code, out = project("", {"00_shapes.ipynb": ["#| export\nx = 1"]})
    assert code != 0
    assert "no default_exp" in out
    assert last_line(out) == "0 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize("source, found", [
    ("assert x", True),
    ("for i in y:\n    test_eq(i, 1)", True),
    ("np.testing.assert_allclose(a, b)", True),
    ("with expect_error(ValueError):\n    f()", True),
    ("with pytest.raises(ValueError): f()", True),
    ("%matplotlib inline\nassert x", True),
    ("x = 1  # assert nothing", False),
    ("'assert x'", False),
    ("def test_it(): pass", False),
    ("assertion_table(x)", False),
    ("not python at all", False),
])
def test_what_counts_as_an_assertion(source, found):
    assert holds_assertion(source) is found


def test_reading_cells():
    assert directives("#| export\n#|eval: false\n# | fig-cap: a: b\nx = 1\n#| hide") == {
        "export": "", "eval": "false", "fig-cap": "a: b"}
    assert bound_names("import a.b as c\nfrom d import e\nx, y = 1, 2\ndef f(): z = 1\nclass G: w = 1\nprint(h)") == [
        "G", "c", "e", "f", "x", "y"]
    nb = new_notebook(cells=[new_code_cell("#| hide\n# why\nx = 1"), new_markdown_cell("# Title\n\n## The `qp` [1] {#sec-qp}"),
                             new_code_cell("x = 2"), new_markdown_cell("prose\n\n```\n## no heading\n```"), new_code_cell("x = 3")])
    assert [label(nb, n) for n in (0, 2, 4)] == ["x = 1", "The qp [1]", "The qp [1]"]


def test_readme_from_a_notebook(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/05_qp.ipynb").write_text("")
    (tmp_path / "LICENSE").write_text("")
    stream, value = [new_output("stream", text="printed  \n")], [new_output("execute_result", {"text/plain": "42"})]
    errors = [new_output("stream", name="stderr", text="noise")]
    axes = [new_output("execute_result", {"text/plain": "<Axes: >"}),
            new_output("display_data", {"text/plain": "<Figure>", "image/png": "AA=="})]
    nb = new_notebook(cells=[
        new_raw_cell("---\ntitle: Weights\nsubtitle: honest ones\n---"),
        new_markdown_cell("## Start {#sec-start}\nRead [it](05_qp.ipynb#sec-a), [the licence](../LICENSE), [this](#sec-start) "
                          "or [that](https://example.org/a.ipynb)."),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| label: x\nprint('printed')\n42", outputs=stream + errors + value),
        new_code_cell("#| echo: false\n42", outputs=value),
        new_code_cell("#| output: false\nplot()", outputs=value),
        new_code_cell("plot()", outputs=axes),
    ])
    assert to_markdown(nb, nb, tmp_path) == FIRST_LINE + """

# Weights

> honest ones

## Start
Read [it](nbs/05_qp.ipynb#sec-a), [the licence](LICENSE), [this](#sec-start) or [that](https://example.org/a.ipynb).

```python
print('printed')
42
```

```
printed
42
```

```
42
```

```python
plot()
```

```python
plot()
```
"""
    nb.cells = [new_markdown_cell("[gone](09_gone.ipynb)")]
    with pytest.raises(FileNotFoundError, match="nbs/09_gone.ipynb"):
        to_markdown(nb, nb, tmp_path)
