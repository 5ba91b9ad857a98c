"""Builds the book in _docs, to be read from the file system, without Quarto and without a network.

In a copy of the sources every notebook is run and its outputs are kept; nbdev prepares the pages (as it does for Quarto,
which renders the public site from the same pages); pandoc renders them. What a reader would stumble over is an error: a
reference, citation or link that leads nowhere, a formula that cannot be shown.
"""

import argparse
import ast
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, cached_property
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pypandoc
import yaml
from nbdev.doclinks import patch_name
from nbformat.v4 import new_code_cell, new_markdown_cell
from notebook_runner import EXPORTS, directives, run_whole, without_directives

ROOT = Path(__file__).resolve().parents[1]
PARTS = Path(__file__).resolve().parent / "site"


# --- the notebooks, prepared by nbdev -----------------------------------------------------------------------------


def copy_sources(to):
    "What the book is made of. The configuration is copied by name, since its link in nbs/ may be broken on Windows."
    for folder in ("nbs", "clusterweights"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy2(ROOT / "settings.ini", to)
    for place in (to, to / "nbs"):
        shutil.copy2(ROOT / "_quarto.yml", place)
    return to


def notebooks(folder):
    "Paths of the notebooks that are pages."
    return sorted(p for p in folder.rglob("*.ipynb") if not any(part[0] in "_." for part in p.relative_to(folder).parts))


def run_and_save(path):
    "Run a notebook and keep its outputs in it."
    run = run_whole(path)
    for cell, ran in zip(run.nb.cells, run.ran.cells):
        if cell.cell_type == "code":
            cell.outputs = tidy(ran.get("outputs", []))
    nbformat.write(run.nb, path)


def tidy(outputs):
    "Outputs without terminal colours, progress bars, paths of temporary files, and names of objects that are drawn anyway."
    drawn = any("image/png" in out.get("data", {}) for out in outputs)
    kept = []
    for out in outputs:
        if out.output_type == "stream":
            text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", out.text)
            if out.name == "stderr":
                text = re.sub(r"(?m)^.*\d+%\|.*\|.*\[.*\].*\n?|^.*\r", "", text)
                text = re.sub(r"(?m)^\S*ipykernel\S*:\d+: ", "", text)
            out.text = text
            if not text.strip():
                continue
        elif drawn and set(out.data) == {"text/plain"} and re.fullmatch(r"(array)?\W*<.*>\W*", out.data["text/plain"], re.DOTALL):
            continue
        kept.append(out)
    return kept


def show_code(path):
    """Put after each exported cell its code, each public name under a heading with its docstring.

    Left to itself nbdev hides the code, which is half of the book, and its own documentation of a name drops sections of
    the docstring and misstates the signature."""
    nb, cells = nbformat.read(path, as_version=4), []
    for cell in nb.cells:
        cells.append(cell)
        if cell.cell_type == "code" and EXPORTS & directives(cell.source).keys():
            cells += [new_markdown_cell(text) if kind == "markdown" else new_code_cell(f"#| eval: false\n{text}")
                      for kind, text in documented(without_directives(cell.source))]
            cell.source = "#| hide\n" + cell.source
    nb.cells = cells
    nbformat.write(nb, path)


def documented(code):
    "The parts of an exported cell: for each public function or class its docstring as markdown, then the rest of its code."
    tree, lines = ast.parse(code).body, code.splitlines()
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree):
        return
    gone, starts = set(), [0]
    public = [node for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    for node in public:
        start = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno - 1
        while start and lines[start - 1].startswith("#"):
            start -= 1
        starts.append(start)
        if ast.get_docstring(node) and len(node.body) > 1:
            gone.update(range(node.body[0].lineno - 1, node.body[0].end_lineno))
    for node, first, last in zip([None, *public], starts, [*starts[1:], len(lines)]):
        if node:      # the space before the name keeps nbdev from turning the heading into a link
            yield "markdown", f"### ` {patch_name(node)}` {{.api}}\n\n{docstring(ast.get_docstring(node) or '')}"
        text = "\n".join(line for k, line in enumerate(lines[first:last], first) if k not in gone).strip("\n")
        if text:
            yield "code", text


def docstring(text):
    "A docstring as markdown: only its backticks mean something, and arguments (`name : what it is`) are set as code."
    text = re.sub(r"(?<![\w`])([a-z]\w*(?:, [a-z]\w*)*) : ", r"`\1` : ", text)
    text = re.sub(r"\n(?=`\w[\w, ]*` : )", r"  \n", text)                # an argument that begins a line does so on the page
    parts = re.split("(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_\[\]<>@#|$^~\"'{}])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(?m)^(.+)\n-+$", r"**\1**\n", "".join(parts))        # "Parameters", underlined


def prepare(copy, run=False):
    "The pages as nbdev hands them to Quarto; returns their folder. `run`: with outputs."
    paths = notebooks(copy / "nbs")
    if run:
        with ProcessPoolExecutor(2) as pool:
            list(pool.map(run_and_save, sorted(paths, key=lambda p: -p.stat().st_size)))
    for path in paths:
        show_code(path)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(copy)}
    command = [sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(force=True)"]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"nbdev cannot prepare the pages:\n{done.stderr}")
    return copy / "_proc"


# --- a page as markdown -------------------------------------------------------------------------------------------


def fenced(text, kind):
    "A code block that the text cannot close."
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{ticks} {kind}\n{text}\n{ticks}"


def plain(text):
    "Printed text. Long lines are wrapped, unless words stand in columns."
    return fenced(text.strip("\n"), "{.text .columns}" if re.search(r"\S {2,}\S", text) else "{.text}")


def shown(out):
    "One output as markdown: the richest form that a page can hold."
    if out.output_type == "stream":
        return plain(out.text)
    data = out.data
    if "image/png" in data:
        return f"![](data:image/png;base64,{data['image/png'].replace(chr(10), '')})"
    for kind in ("image/svg+xml", "text/html"):
        if kind in data:
            return fenced(data[kind], "{=html}")
    return data["text/markdown"] if "text/markdown" in data else plain(data.get("text/plain", ""))


def code_cell(cell):
    "A code cell with its outputs, as its Quarto options ask."
    marks, parts = directives(cell.source), []
    if marks.get("include") == "false":
        return ""
    code = without_directives(cell.source).strip("\n")
    if code and marks.get("echo") != "false":
        parts.append(fenced(code, "{.python}"))
    if marks.get("output") == "asis":
        parts += [out.text if out.output_type == "stream" else shown(out) for out in cell.outputs]
    elif marks.get("output") != "false":
        for out in cell.outputs:
            figure = shown(out)
            if "fig-cap" in marks and figure.startswith("!["):
                label, text = marks.get("label", ""), marks["fig-cap"].strip("\"'")
                figure = figure.replace("![]", f"![{text}]") + (f"{{#{label}}}" if label else "")
            parts += ["::: {.output}", figure, ":::"]
    return "\n\n".join(parts)


def to_markdown(nb):
    "A prepared notebook as one markdown text; its first cell is the front matter."
    return "\n\n".join(code_cell(cell) if cell.cell_type == "code" else cell.source for cell in nb.cells) + "\n"


# --- the book as HTML ---------------------------------------------------------------------------------------------


class DeadLink(Exception):
    "A link that leads nowhere."


class Reader(HTMLParser):
    "Collects from a page its ids, and its text outside code and formulas."

    SILENT = {"pre", "code", "script", "style", "math"}

    def __init__(self, text):
        super().__init__()
        self.ids, self.prose, self.silent = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.silent += tag in self.SILENT
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        self.silent -= tag in self.SILENT

    def handle_data(self, data):
        if not self.silent:
            self.prose.append(data)


def listed(entries):
    "The pages of a sidebar in order."
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            yield from [entry["href"]] if "href" in entry else []
            yield from listed(entry.get("contents", []))


class Book:
    "The pages that nbdev has prepared in `folder`, rendered when asked for. A page is named by its path, such as `05_qp.ipynb`."

    def __init__(self, folder):
        self.folder = folder
        self.website = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))["website"]
        self.order = list(listed(self.website["sidebar"]["contents"]))
        self.pages = {path.relative_to(folder).as_posix(): nbformat.read(path, as_version=4) for path in notebooks(folder)}
        self.rendered = cache(self._rendered)

    @cached_property
    def facts(self):
        "The front matter of each page."
        return {name: yaml.safe_load(nb.cells[0].source.strip().strip("-")) for name, nb in self.pages.items()}

    def output(self, name):
        "Where the page goes: nbdev takes the leading number off."
        return posixpath.join(posixpath.dirname(name), self.facts[name]["output-file"])

    def _rendered(self, name):
        "A page as HTML whose links still lead to notebooks, its ids, and what pandoc warned of."
        options = {"css": (PARTS / "site.css").read_text(encoding="utf-8"), "site": html.escape(self.website["title"]),
                   "home": self.towards(name, "index.ipynb"), "footer": html.escape(self.website["page-footer"]["left"]),
                   "sidebar": self.sidebar(name, self.website["sidebar"]["contents"]), "turn": self.turn(name)}
        command = [pypandoc.get_pandoc_path(), "--from=markdown", "--to=html5", "--standalone", "--wrap=none", f"--template={PARTS / 'page.html'}",
                   "--mathml", "--toc", "--toc-depth=3", f"--lua-filter={PARTS / 'quarto.lua'}",
                   "--citeproc", f"--bibliography={self.folder / 'references.bib'}", "--metadata=link-citations",
                   "--metadata=reference-section-title:Sources", *(f"--variable={key}:{value}" for key, value in options.items())]
        done = subprocess.run(command, input=to_markdown(self.pages[name]), capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        warnings = re.split(r"(?m)^\[WARNING\] ", done.stderr)[1:]
        page = Reader(done.stdout)
        twice = sorted({name for name in page.ids if page.ids.count(name) > 1})
        left = re.findall(r"\{#[^}]*\}|[?@]@?(?:eq|fig|tbl|sec)-[\w-]+|^:::.*", "".join(page.prose), re.MULTILINE)
        return done.stdout, set(page.ids), [" ".join(text.split()) for text in warnings] + [
            f"two parts of the page have the id {text}" for text in twice] + [f"left in the text: {text}" for text in left]

    def settled(self, name):
        "A page as HTML whose links lead to pages and files of the book, and what is wrong with it."
        text, _, problems = self.rendered(name)
        problems, files = list(problems), set()

        def settle(match):
            try:
                target, file = self.target(name, html.unescape(match[2]))
            except DeadLink as error:
                problems.append(error.args[0])
                return match[0]
            files.update(file)
            return f'{match[1]}="{html.escape(target)}"'

        head, body = text.split("<body>", 1)
        return head + "<body>" + re.sub(r'\b(href|src)="([^"]*)"', settle, body), problems, files

    def target(self, name, link):
        "Where a link on a page leads in the built book, and the files it needs; raises DeadLink if nowhere."
        # nbdev links names of the package to the public site.
        public = link.startswith(self.website["site-url"] + "/")
        if public:
            outputs = {self.output(page): page for page in self.pages}
            path, _, anchor = link.removeprefix(self.website["site-url"] + "/").partition("#")
            if path not in outputs:
                raise DeadLink(f"no page {path} for the link to {link}")
            path = outputs[path]
        elif re.match(r"[a-z]+:", link):
            return link, []
        else:
            path, _, anchor = link.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        if path not in self.pages:
            if (self.folder / path).is_file():
                return link, [path]
            raise DeadLink(f"no page or file for the link to {link}")
        if anchor and anchor not in self.rendered(path)[1]:
            if not public:
                raise DeadLink(f"nothing on {path} has the id of the link to {link}")
            anchor = ""                                # a method of a class: described in its class, without a heading of its own
        here = path == name and anchor
        return ("" if here else self.towards(name, self.output(path))) + (f"#{anchor}" if anchor else ""), []

    def towards(self, name, path):
        "The way from a page to a path in the book."
        return posixpath.relpath(path, posixpath.dirname(name) or ".")

    def link(self, name, page, text=None, kind=""):
        "A link from one page to another, by its title."
        title = html.escape(text or (self.facts[page]["title"] if page in self.facts else page))
        title = re.sub("`([^`]*)`", r"<code>\1</code>", title)
        return f'<a{kind} href="{self.towards(name, page)}">{title}</a>'

    def sidebar(self, name, entries):
        "The book's contents as nested lists, the current page marked."
        items = []
        for entry in entries:
            entry = {"href": entry} if isinstance(entry, str) else entry
            page, below = entry.get("href"), entry.get("contents")
            head = f"<p>{html.escape(entry['section'])}</p>" if "section" in entry else ""
            if page:
                head = self.link(name, page, entry.get("text"), ' class="here" aria-current="page"' if page == name else "")
            items.append(f"<li>{head}{self.sidebar(name, below) if below else ''}</li>")
        return f"<ul>{''.join(items)}</ul>"

    def turn(self, name):
        "Links to the pages before and after."
        place = self.order.index(name) if name in self.order else None
        before = self.order[place - 1] if place else None
        after = self.order[place + 1] if place is not None and place + 1 < len(self.order) else None
        return "".join(f"<span>{mark[0]}{self.link(name, page)}{mark[1]}</span>" if page else "<span></span>"
                       for page, mark in ((before, ("← ", "")), (after, ("", " →"))))


def build(folder, to):
    "Render the pages in `folder` to `to`."
    book, wrong = Book(folder), {}
    if to.exists():
        shutil.rmtree(to)
    for name in book.pages:
        text, problems, files = book.settled(name)
        wrong |= {name: problems} if problems else {}
        for file in files:
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / file, to / file)
        path = to / book.output(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if wrong:
        raise SystemExit(json.dumps(wrong, indent=1, ensure_ascii=False))


def main():
    parser = argparse.ArgumentParser(description="Build the book.")
    parser.add_argument("--for-quarto", action="store_true", help="stop at the prepared pages and leave them in _proc for quarto render")
    for_quarto = parser.parse_args().for_quarto
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(copy_sources(Path(folder)), run=True)
        if for_quarto:
            shutil.rmtree(ROOT / "_proc", ignore_errors=True)
            shutil.copytree(prepared, ROOT / "_proc")
        else:
            build(prepared, ROOT / "_docs")
            print(f"open {ROOT / '_docs' / 'index.html'}")


if __name__ == "__main__":
    main()
