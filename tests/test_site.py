"""The site: its configuration, every page as a reader will see it, and the workflows that publish it."""

import ast
import configparser
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from make_site import Book, build, copy_sources, docstring, documented, listed, notebooks, prepare, tidy, to_markdown
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from notebook_runner import EXPORTS, called_names, directives, plain_python, run_whole

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path.relative_to(ROOT / "nbs").as_posix() for path in notebooks(ROOT / "nbs")]


def sources(page):
    "(kind, source) of each cell of a notebook as written."
    cells = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# --- configuration ------------------------------------------------------------------------------------------------


def test_configuration():
    link = ROOT / "nbs" / "_quarto.yml"
    if os.name != "nt":  # where a checkout may turn the link into a file
        assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"
    config, known = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")), settings()
    assert config["execute"]["enabled"] is False
    assert config["project"]["output-dir"] == known["doc_path"]
    assert config["website"]["repo-url"] == known["git_url"]
    assert config["website"]["site-url"] == known["doc_host"] + known["doc_baseurl"]
    assert sorted(listed(config["website"]["sidebar"]["contents"])) == PAGES, "every notebook has its place in the sidebar"
    assert (ROOT / "nbs" / config["bibliography"]).exists()


# --- what nbdev asks of a notebook --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_title_stands_alone(page):
    "nbdev takes title and subtitle from the first cell and throws the rest of that cell away."
    kind, source = sources(page)[0]
    assert kind == "raw" or re.fullmatch(r"# .+\n\n> .+", source), "the first cell must hold `# Title`, an empty line, `> one line`, and no more"


@pytest.mark.parametrize("page", PAGES)
def test_imports_stand_alone(page):
    "nbdev runs a cell that imports, and no cell before it that does not."
    cells = [source for kind, source in sources(page) if kind == "code"]
    if not any(EXPORTS & directives(source).keys() for source in cells):
        return
    mixed = []
    for source in cells:
        if EXPORTS & directives(source).keys() or directives(source).get("eval") == "false" or "nbdev_export" in called_names(source):
            continue
        tree = ast.parse(plain_python(source))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        if imports and not set(tree.body) <= set(imports):
            mixed.append(source.strip().splitlines()[0])
    assert mixed == [], "give the imports of these cells a cell of their own"


# --- the pages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "All pages as nbdev prepares them, without outputs."
    return Book(prepare(copy_sources(tmp_path_factory.mktemp("site"))))


@pytest.mark.parametrize("page", PAGES)
def test_page(book, page):
    text, problems, _ = book.settled(page)
    assert problems == []
    assert not re.search(r"<script|<link|src=\"http|url\(http", text), "a page needs nothing from a network"


def test_exported_code_is_on_the_page(book):
    text = to_markdown(book.pages["05_qp.ipynb"])
    assert "### ` certify` {.api}" in text and "def certify(" in text and "def _largest(" in text
    assert "default_exp" not in text and "nbdev_export" not in text and "#|" not in text


# --- made pages: each mistake is seen -----------------------------------------------------------------------------


BIBLIOGRAPHY = "@book{boole1854, author = {Boole, George}, title = {The Laws of Thought}, year = {1854}, publisher = {Walton}}"
CONFIGURATION = {"bibliography": "references.bib", "website": {
    "title": "Made", "site-url": "https://made.example/book", "page-footer": {"left": "The end"},
    "sidebar": {"contents": ["index.ipynb", {"section": "More", "contents": ["sub/02_next.ipynb"]}]}}}


def made(folder, text, *cells):
    "A book of two pages, as nbdev leaves them: the text on the first, a labelled section on the second."
    (folder / "sub").mkdir()
    (folder / "_quarto.yml").write_text(yaml.safe_dump(CONFIGURATION), encoding="utf-8")
    (folder / "references.bib").write_text(BIBLIOGRAPHY, encoding="utf-8")
    (folder / "here.txt").write_text("here", encoding="utf-8")
    other = [new_markdown_cell("## There {#sec-there}\n\nBack to [the start](../index.ipynb).")]
    for name, output, parts in (("index", "index", [new_markdown_cell(text), *cells]), ("sub/02_next", "next", other)):
        head = new_raw_cell(f"---\noutput-file: {output}.html\ntitle: Page `{output}`\n---\n\n")
        nbformat.write(new_notebook(cells=[head, *parts]), folder / f"{name}.ipynb")
    return Book(folder)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="

GOOD = r"""
## First {#sec-first}

$$x = \begin{cases} 1 \\ 2 \end{cases}$$ {#eq-one}

$$y$$ {#eq-two}

By @eq-two and [-@eq-one] as @boole1854 [chapter 2] and others [@boole1854, Eq. 6] have it, see @fig-dot, @tbl-small,
[above](#sec-first), [there](sub/02_next.ipynb#sec-there), [public](https://made.example/book/sub/next.html#gone),
[a file](here.txt) and [the world](https://example.org/page).

![A dot](here.txt){#fig-dot}

| a | b |
|---|---|
| 1 | 2 |

: Small {#tbl-small}

::: {.callout-note}
## Mind
the gap
:::
"""


def test_a_good_page(tmp_path):
    "Every feature at once: nothing is wrong, and it looks as it should."
    text, problems, files = made(tmp_path, GOOD).settled("index.ipynb")
    assert problems == [] and files == {"here.txt"}
    for part in ('id="eq-one"', '<span class="number">(2)</span>', 'href="#eq-two">Equation 2</a>', 'href="#eq-one">1</a>', "Figure 1: A dot",
                 'href="#fig-dot">Figure 1</a>', "Table 1: Small", 'href="#tbl-small">Table 1</a>', "<math", 'href="sub/next.html#sec-there"',
                 'href="sub/next.html">public', 'href="here.txt"', 'href="https://example.org/page"', "Walton", "chap. 2", "<strong>Mind</strong>",
                 '<a href="sub/next.html">Page <code>next</code></a>', "The end", 'class="here" aria-current="page" href="index.html"'):
        assert part in text.replace("\u00a0", " "), part


MISTAKES = {
    "equation": ("See @eq-none.", "@eq-none does not resolve"),
    "figure": ("See @fig-none.", "@fig-none does not resolve"),
    "table": ("See [@tbl-none].", "@tbl-none does not resolve"),
    "section by number": ("## A {#sec-a}\n\nSee @sec-a.", "write [text](#sec-a)"),
    "label twice": ("$$x$$ {#eq-a}\n\n$$y$$ {#eq-a}", "The label eq-a is given twice"),
    "label on its own line": ("$$x$$\n{#eq-a}", "left in the text: {#eq-a}"),
    "label without a formula": ("text {#eq-a}", "left in the text: {#eq-a}"),
    "section twice": ("## A {#sec-a}\n\n## B {#sec-a}", "the id sec-a"),
    "citation": ("As [@nobody1999] says.", "nobody1999 not found"),
    "formula": ("$\\frac{a}{$", "Could not convert TeX math"),
    "page": ("[there](missing.ipynb)", "no page or file for the link to missing.ipynb"),
    "page by its address": ("[there](https://made.example/book/missing.html)", "no page missing.html"),
    "picture": ("![picture](missing.png)", "no page or file for the link to missing.png"),
    "section of this page": ("[there](#nowhere)", "nothing on index.ipynb has the id"),
    "section of another page": ("[there](sub/02_next.ipynb#nowhere)", "nothing on sub/02_next.ipynb has the id"),
    "fence": ("::: {.callout-note}\n\nnever closed", "unclosed"),
}


@pytest.mark.parametrize(("text", "problem"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_seen(tmp_path, text, problem):
    _, problems, _ = made(tmp_path, text).settled("index.ipynb")
    assert any(problem in found for found in problems), problems


def test_a_missing_page_of_the_sidebar_is_seen(tmp_path):
    book = made(tmp_path, "text")
    book.website["sidebar"]["contents"].append("missing.ipynb")
    assert "no page or file for the link to missing.ipynb" in book.settled("index.ipynb")[1]


def test_build(tmp_path):
    "Pages and the files they need, links between folders, pages before and after; a mistake ends the build."
    book, docs = tmp_path / "book", tmp_path / "docs"
    book.mkdir()
    docs.mkdir()
    (docs / "old.html").write_text("from an earlier build", encoding="utf-8")
    made(book, GOOD)
    build(book, docs)
    assert sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*") if p.is_file()) == ["here.txt", "index.html", "sub/next.html"]
    after = (docs / "sub" / "next.html").read_text(encoding="utf-8")
    assert 'the start</a>' in after and '← <a href="../index.html">' in after and 'href="#sec-there"' in after
    cell = nbformat.read(book / "index.ipynb", as_version=4)
    cell.cells.append(new_markdown_cell("@eq-none"))
    nbformat.write(cell, book / "index.ipynb")
    with pytest.raises(SystemExit, match="eq-none"):
        build(book, docs)


# --- code and outputs ---------------------------------------------------------------------------------------------


def test_outputs_on_a_page(tmp_path):
    "The richest form of each output, and what Quarto's options ask."
    html, text = {"text/html": "<b>bold</b>", "text/plain": "plain"}, new_output("stream", name="stdout", text="a & b\n```\n")
    cells = [
        new_code_cell("one = 1", outputs=[new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"}), text]),
        new_code_cell("#| echo: false\ntwo = 2", outputs=[new_output("execute_result", html)]),
        new_code_cell("#| output: false\nthree = 3", outputs=[new_output("stream", name="stdout", text="not shown")]),
        new_code_cell("#| include: false\nfour = 4"),
        new_code_cell("#| label: fig-a\n#| fig-cap: \"A dot\"\nfive = 5", outputs=[new_output("display_data", {"image/png": PNG})]),
        new_code_cell("six = 6", outputs=[new_output("execute_result", {"text/plain": "a  b\n1  2"})]),
        new_code_cell("#| output: asis\nseven = 7", outputs=[new_output("stream", name="stdout", text="*set* @fig-a")]),
    ]
    page, problems, _ = made(tmp_path, "Text", *cells).settled("index.ipynb")
    assert problems == []
    shown = re.sub(r"<[^>]+>", "", page)
    assert all(name in shown for name in ("one = 1", "three = 3", "five = 5")) and not any(name in shown for name in ("two = 2", "four = 4"))
    assert f"data:image/png;base64,{PNG}" in page and "<b>bold</b>" in page and "a &amp; b\n```" in page
    assert "plain" not in shown and "not shown" not in page and "Figure 1: A dot" in shown
    assert 'class="text columns"' in page and "<em>set</em>" in page and 'href="#fig-a"' in page


def test_outputs_are_tidied():
    bar = "\r 50%|█████     | 1/2 [00:00<00:00]\r100%|██████████| 2/2 [00:00<00:00]\n"
    warning = "/somewhere/ipykernel_12/345.py:3: OverlapWarning: few units\n  warn()\n"
    kept = tidy([new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m"), new_output("stream", name="stderr", text=bar + warning),
                 new_output("stream", name="stderr", text=bar), new_output("display_data", {"image/png": PNG}),
                 new_output("execute_result", {"text/plain": "<Axes: xlabel='age'>"}),
                 new_output("execute_result", {"text/plain": "array([<Axes: >,\n <Axes: >])"})])
    assert [out.get("text") for out in kept] == ["red", "OverlapWarning: few units\n  warn()\n", None]
    assert len(tidy([new_output("execute_result", {"text/plain": "<Axes: >"})])) == 1     # nothing was drawn: the name is all there is


def test_a_failing_notebook_ends_the_build(tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_path = made\n", encoding="utf-8")
    nbformat.write(new_notebook(cells=[new_code_cell("good = 1"), new_code_cell("1 / 0")]), tmp_path / "bad.ipynb")
    with pytest.raises(SystemExit, match=r"(?s)bad.ipynb, cell 1:.*ZeroDivisionError"):
        run_whole(tmp_path / "bad.ipynb")


CODE = '''
import os

LIMIT = 3


# Kept together with what follows.
@decorated
def first(x, many=2):
    """What it does.

    x : (n,) *raw* input. many : how many_of [these].
    other_one : starts a line.

    Notes
    -----
    Said at the end."""
    return x


def _helper(): return 1


class Second:
    "Only words."
'''


def test_exported_code_with_its_documentation():
    head, text, body, second, last = list(documented(CODE.strip()))
    assert head == ("code", "import os\n\nLIMIT = 3")
    assert text[1].startswith("### ` first` {.api}\n\nWhat it does.") and "**Notes**\n" in text[1]
    assert "`x` : (n,) \\*raw\\* input. `many` : how many\\_of \\[these\\].  \n`other_one` : starts" in text[1]
    assert body == ("code", "# Kept together with what follows.\n@decorated\ndef first(x, many=2):\n    return x\n\n\ndef _helper(): return 1")
    assert second == ("markdown", "### ` Second` {.api}\n\nOnly words.") and last == ("code", 'class Second:\n    "Only words."')
    assert list(documented("import os\nfrom sys import path")) == []
    assert docstring("a `b_c` \"d\" γ_i ≥ 0") == "a `b_c` \\\"d\\\" γ\\_i ≥ 0"


# --- workflows ----------------------------------------------------------------------------------------------------


def workflows():
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in workflow["jobs"].values():
            yield path.name, workflow, job


def test_workflows_call_what_exists():
    "The commands of the workflows, one by one; an unknown one fails here rather than on a server."
    seen = set()
    for name, _, job in workflows():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", step["uses"]), step
            for line in step.get("run", "").splitlines():
                command, *words = line.split()
                if words[:1] == ["-m"]:
                    assert command == "python" and importlib.util.find_spec(words[1]), line
                elif command == "python":
                    options = subprocess.run([sys.executable, ROOT / words[0], "--help"], capture_output=True, text=True, check=True).stdout
                    assert all(word in options for word in words[1:]), line
                else:
                    assert command in {"git", "quarto"}, line
                seen.add((name, command, *words[:2]))
    assert {("test.yml", "python", "-m", "pytest"), ("docs.yml", "python", "tests/make_site.py", "--for-quarto"),
            ("docs.yml", "quarto", "render", "_proc")} <= seen


def test_workflow_publishes_what_quarto_writes():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    [(workflow, build, deploy)] = [(w, w["jobs"]["build"], w["jobs"]["deploy"]) for name, w, job in workflows() if "deploy-pages" in str(job)]
    assert workflow[True] == {"push": {"branches": ["main"]}, "workflow_dispatch": None}     # YAML reads the key `on` as true
    [upload] = [step for step in build["steps"] if "upload-pages-artifact" in step.get("uses", "")]
    assert upload["with"]["path"] == f"_proc/{config['project']['output-dir']}"
    steps = [step.get("uses", step.get("run")) for step in build["steps"]]
    assert steps[-3].startswith("quarto-dev/quarto-actions/setup") and steps[-2] == "quarto render _proc"
    assert deploy["needs"] == "build" and deploy["permissions"] == {"pages": "write", "id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
