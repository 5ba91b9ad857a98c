"""Writes README.md from nbs/index.ipynb: its prose, its code, and the text that the code prints when run.

Pictures and HTML are left out. `#| hide`, `#| echo: false`, `#| output: false` and `#| include: false` mean what they
mean on the site. A link to a file that does not exist is an error.
"""

import posixpath
import re
from pathlib import Path

import yaml
from notebook_runner import directives, run_whole, without_directives

FIRST_LINE = "<!-- Written from nbs/index.ipynb by make readme: edit that. -->"


def front_matter(source):
    "Quarto's front matter as a heading and a quotation."
    facts = yaml.safe_load(source.strip().strip("-"))
    subtitle = facts.get("subtitle") or facts.get("description")
    return f"# {facts['title']}" + (f"\n\n> {subtitle}" if subtitle else "")


def prose(source, root, folder):
    "A markdown cell, its links turned from the notebook's folder to the top level; labels for Quarto are taken off."

    def link(match):
        target, hash_sign, section = match[2].partition("#")
        if not target or re.match(r"[a-z]+:|/", target):
            return match[0]
        target = posixpath.normpath(f"{folder}/{target}")
        if not (root / target).exists():
            raise FileNotFoundError(f"the README would link to {target}, which does not exist")
        return f"{match[1]}{target}{hash_sign}{section}{match[3]}"

    source = re.sub(r"(?m)^(#+ .*?) *\{[^}]*\} *$", r"\1", source.strip())
    return re.sub(r"(\]\()([^)\s]+)((?: \"[^\"]*\")?\))", link, source)


def printed(outputs):
    "What a cell printed and the text of its value. A value like `<Axes: >` says nothing without its picture."
    texts = []
    for out in outputs:
        data = out.get("data", {})
        if out.output_type == "stream" and out.name == "stdout":
            texts.append(out.text)
        elif "text/plain" in data and not any(kind.startswith("image/") for kind in data):
            if not re.fullmatch(r"<.*>", data["text/plain"].strip(), flags=re.DOTALL):
                texts.append(data["text/plain"])
    lines = [line.rstrip() for line in "\n".join(text.strip("\n") for text in texts).splitlines()]
    return "\n".join(lines)


def to_markdown(written, ran, root, folder="nbs"):
    "The README as one string, from the notebook as written and as run."
    parts = [FIRST_LINE]
    for cell, result in zip(written.cells, ran.cells):
        marks = directives(cell.source) if cell.cell_type == "code" else {}
        if cell.cell_type == "raw":
            parts.append(front_matter(cell.source))
        elif cell.cell_type == "markdown":
            parts.append(prose(cell.source, root, folder))
        elif "hide" not in marks and "default_exp" not in marks and marks.get("include") != "false":
            code, text = without_directives(cell.source).strip(), printed(result.get("outputs", []))
            if code and marks.get("echo") != "false":
                parts.append(f"```python\n{code}\n```")
            if text and marks.get("output") != "false":
                parts.append(f"```\n{text}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def main():
    root = Path(__file__).resolve().parents[1]
    run = run_whole(root / "nbs" / "index.ipynb")
    readme = to_markdown(run.nb, run.ran, root)
    (root / "README.md").write_text(readme, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
