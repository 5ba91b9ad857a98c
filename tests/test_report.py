"""The report of a comparison: what it says, that nothing in the data can break it, and how it looks in a browser."""

import json
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from helpers import browser, schools

import clusterweights as cw
from clusterweights import InputError, Study
from clusterweights.comparison import METHODS
from clusterweights.datasets import late_entry_study, load_late_entry

FRAME = schools(n_schools=6, size=15, seed=4)
ROLES = {"treat": "late", "outcome": "score", "cluster": "school", "covs": ["age", "income"]}
HOSTILE = {"late": "<script>document.title = 'taken'</script>", "score": 'a&b"', "age": r"$\nosuch$ $x$", "school": "</title></svg>$\\no$\x07",
           "income": "<img src=x onerror=\"document.title='taken'\">"}
LONG = {"late": "arrived after " + "a very " * 30 + "long time", "score": "s" * 200, "age": "age in " + "whole and finished " * 10 + "years"}


class Page(HTMLParser):
    "The elements of a page with their attributes, its words, and which elements were left open."
    VOID = {"meta", "br", "img", "link"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def unmatchable():
    "Late pupils whom no weights of others of their school can match in age."
    return FRAME.assign(age=np.where(FRAME["late"] == 1, 8.0, 5.0 + FRAME["school"] + 0.1 * FRAME["income"]))


def answered():
    return FRAME.assign(score=FRAME["score"].where(FRAME["age"] < 1))


def survey(**options):
    return Study.survey(answered(), outcome="score", cluster="school", covs=["age", "income"], **options)


def gaps():
    "Some ages missing, and a school without controls."
    frame = FRAME[(FRAME["school"] > 0) | (FRAME["late"] == 1)].reset_index(drop=True)
    return frame.assign(age=frame["age"].where(frame.index % 10 > 0))


def renamed(names):
    "The study of FRAME with other names of columns."
    roles = {role: [names.get(n, n) for n in columns] if role == "covs" else names.get(columns, columns) for role, columns in ROLES.items()}
    return Study(FRAME.rename(columns=names), **roles)


KINDS = {
    "late entry": lambda: cw.compare(late_entry_study(), lam=1.0),
    "failed": lambda: cw.compare(Study(unmatchable(), **ROLES), lam=1.0),
    "all failed": lambda: cw.compare(Study(unmatchable(), **ROLES), ["hierarchical"], lam=1.0),
    "left out": lambda: cw.compare(Study(gaps(), **ROLES, missing="drop"), lam=1.0),
    "gaps marked": lambda: cw.compare(Study(gaps(), **ROLES, missing="indicator"), lam=1.0),
    "everybody": lambda: cw.compare(Study(FRAME, **ROLES), estimand="ATE", lam=1.0),
    "overlap": lambda: cw.compare(Study(FRAME, **ROLES), ["balancing"], estimand="ATO"),
    "another population": lambda: cw.compare(Study(FRAME, **ROLES), estimand="ATE", target=FRAME[::2], lam=1.0),
    "survey": lambda: cw.compare(survey(), lam=1.0),
    "totals": lambda: cw.compare(survey(totals={"age": -300, "income": 500, "N": 1000}), estimand="total", tolerance="auto"),
    "hostile names": lambda: cw.compare(renamed(HOSTILE), lam=1.0),
    "long names": lambda: cw.compare(renamed(LONG), lam=1.0),
}


@pytest.fixture(scope="module")
def comparisons():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def reports(comparisons, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {kind: c.report(folder / f"{kind}.html") for kind, c in comparisons.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def text(reports, kind):
    return reports[kind].read_text(encoding="utf-8")


@pytest.fixture
def page(text):
    return Page(text)


# --- every report -------------------------------------------------------------------------------------------------


def test_the_page_is_whole(page):
    assert page.open == []
    assert page.all("html") == [{"lang": "en"}]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_headings_descend_one_by_one(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))


def test_tables_and_figures_can_be_read_out(page):
    assert len(page.all("table")) == len(page.all("caption")) > 2
    assert {attrs.get("scope") for attrs in page.all("th")} == {"row", "col"}
    assert len(page.all("svg")) == len(page.all("figure")) > 0
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-label"]) > 20
    assert not any("nan" in re.split(r"\W+", word) for word in page.words)


def test_nothing_is_fetched_and_nothing_runs(text, page):
    "No element that loads or runs anything, no address, no handler of events; and a policy that forbids them."
    body = page.elements[page.elements.index(("body", {})):]
    assert not {"script", "img", "link", "iframe", "object", "embed", "style"} & {tag for tag, _ in body}
    for _, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "src"]
        assert all(attrs[name].startswith(("#", "data:image/png")) for name in attrs if name == "href")
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    [policy] = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_references_within_figures_lead_somewhere(text, page):
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used
    assert used <= ids


def test_the_reading_comes_first_and_all_sections_follow(comparisons, kind, page):
    seen = " ".join(" ".join(page.words[page.words.index("In words"):]).split())
    assert seen.startswith("In words " + " ".join(comparisons[kind].reading().split())[:60])
    places = [seen.index(heading) for heading in ("In words", "The study", "Whom the estimates speak of", "The methods", "The estimates",
                                                  "Balance and weights", "What no data can check", "How to cite", "Versions")]
    assert places == sorted(places)


def test_figures_and_sources_of_every_method(comparisons, kind, page):
    c, words = comparisons[kind], "".join(page.words)
    for cell in c.summary().cells().to_numpy().ravel():
        assert cell in page.words
    for name in c.table.index:
        assert METHODS[name].source
        assert METHODS[name].source in words
    for name, weights in c.weights.items():
        assert f"{weights.target}" in page.words
        assert weights.summary().cells().loc["method", ""] in page.words
        assert str(weights.solution or weights.status) in page.words
    assert c.estimand in words.replace("Mean", "mean").replace("Total", "total")


# --- what each kind says ------------------------------------------------------------------------------------------


def words_of(reports, kind):
    return "".join(Page(reports[kind].read_text(encoding="utf-8")).words)


def test_a_failure_is_told_with_its_reason(comparisons, reports):
    [error] = comparisons["failed"].errors.values()
    words = words_of(reports, "failed")
    assert f"Hierarchical balancing gave no estimate: {error}" in words
    assert "It gave no estimate: infeasible." in words
    assert "nobody: no estimate" in words
    assert "nothing to draw" not in words
    assert "nothing to draw" in words_of(reports, "all failed")


def test_who_is_left_out_is_told(comparisons, reports):
    words, c = words_of(reports, "left out"), comparisons["left out"]
    assert f"{c.study.n_rows - c.study.n} of {c.study.n_rows} rows of the data have missing values and were left out" in words
    gone = (c.weights["hierarchical"].reason == "no controls in cluster").sum()
    assert gone > 0
    assert f"{gone} treated (no controls in cluster; school 0)" in words
    for label, text in (("Hierarchical balancing", text) for text in c.warnings["hierarchical"]):
        assert f"{label}: {text}" in words
    assert f"All {len(FRAME)} rows of the data are in the study." in words_of(reports, "everybody")
    assert "Gaps in covariates were filled and marked: 'age[missing]'." in words_of(reports, "gaps marked")


def test_the_question_is_that_of_the_estimand(reports):
    assert "What did “late” do to “math” among the units that had it?" in words_of(reports, "late entry")
    assert "What would “late” do to “score” among all units?" in words_of(reports, "everybody")
    assert "among the units of another population?" in words_of(reports, "another population")
    assert "What is the mean of “score”, had everybody answered?" in words_of(reports, "survey")
    assert "those who responded have on average the outcomes of those who did not" in words_of(reports, "survey")
    assert "treatment is as good as random" in words_of(reports, "everybody")


def test_balance_and_weights_are_drawn_where_weighting_changes_them(reports):
    drawn = [attrs["aria-label"] for attrs in Page(reports["late entry"].read_text(encoding="utf-8")).all("svg")]
    assert [alt.split(".")[0].split(":")[0] for alt in drawn] == [
        "One dot for each of 76 clusters", "Forest plot", "Love plot, Balancing, no clusters", "Histogram of weights, Balancing, no clusters",
        "Love plot, IPW, random intercept", "Histogram of weights, IPW, random intercept",
        "Love plot, Hierarchical balancing", "Histogram of weights, Hierarchical balancing"]
    assert "0.36 before, 0.00 after weighting" in drawn[2]


def test_names_are_shown_as_they_are(reports):
    page = Page(reports["hostile names"].read_text(encoding="utf-8"))
    words = "".join(page.words)
    assert "Effect of <script>document.title = 'taken'</script> on a&b\" (ATT)" in page.words
    for name in HOSTILE.values():
        assert name.replace("\x07", "") in words
    assert r"$\nosuch$ $x$" in page.words[page.words.index("Balance and weights"):]


def test_titles_and_messages_are_text(comparisons, tmp_path, monkeypatch):
    c = comparisons["failed"]
    monkeypatch.setitem(c.errors, "hierarchical", cw.InfeasibleError("<b>no</b> & never"))
    page = Page(c.report(tmp_path / "report.html", title="<i>Mine & yours</i>").read_text(encoding="utf-8"))
    assert page.words.count("<i>Mine & yours</i>") == 2      # the title of the window and of the page
    assert "Hierarchical balancing gave no estimate: <b>no</b> & never" in page.words
    assert page.all("b", "i") == []


# --- files and figures --------------------------------------------------------------------------------------------


def test_the_path_comes_back_and_a_file_is_replaced(comparisons, tmp_path):
    path = tmp_path / "über uns.html"
    path.write_text("old")
    assert comparisons["overlap"].report(str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("path, why", [("", "is a folder"), ("none/report.html", "There is no folder"),
                                       ("file.txt/report.html", "There is no folder")])
def test_where_nothing_can_be_written(comparisons, tmp_path, path, why):
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=why):
        comparisons["overlap"].report(tmp_path / path)
    assert os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(InputError, match="must be the name of a file"):
        comparisons["overlap"].report(None)


def test_a_write_that_fails_leaves_the_old_file(comparisons, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        comparisons["overlap"].report(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_figures_and_settings_of_the_caller_stay(comparisons, tmp_path):
    import matplotlib
    import matplotlib.pyplot as plt
    open_before, backend, settings = plt.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)
    comparisons["everybody"].report(tmp_path / "report.html")
    assert (plt.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)) == (open_before, backend, settings)


def test_a_style_of_the_caller_has_no_effect(comparisons, reports, tmp_path):
    import matplotlib.pyplot as plt
    with plt.style.context("dark_background"), plt.rc_context({"font.size": 30, "text.usetex": True}):
        again = comparisons["late entry"].report(tmp_path / "report.html")
    assert again.read_bytes() == reports["late entry"].read_bytes()


def test_no_display_and_no_pyplot_are_needed(tmp_path):
    code = ("import sys, clusterweights as cw; from clusterweights.datasets import late_entry_study; "
            f"cw.compare(late_entry_study(), ['unadjusted']).report({str(tmp_path / 'report.html')!r}); print('matplotlib.pyplot' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "tkagg"})
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_thousands_of_clusters_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    many = pd.DataFrame({"school": np.repeat(np.arange(5000), 4), "late": np.tile([1, 0, 0, 1], 5000), "age": rng.normal(size=20000),
                         "score": rng.normal(size=20000)})
    path = cw.compare(Study(many, treat="late", outcome="score", cluster="school", covs="age"), ["unadjusted"]).report(tmp_path / "report.html")
    assert path.stat().st_size < 300_000
    assert "data:image/png;base64" in path.read_text(encoding="utf-8")


def test_names_in_other_scripts(tmp_path):
    frame = FRAME.rename(columns={"age": "年齢", "income": "доход"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = cw.compare(Study(frame, **(ROLES | {"covs": ["年齢", "доход"]})), ["balancing"]).report(tmp_path / "report.html")
    assert {"年齢", "доход"} <= set(Page(path.read_text(encoding="utf-8")).words)


# --- in a browser -------------------------------------------------------------------------------------------------

PROBE = """<script>
const box = e => e.getBoundingClientRect(), all = s => [...document.querySelectorAll(s)];
const outside = (e, frame) => box(e).left < box(frame).left - 1 || box(e).right > box(frame).right + 1;
addEventListener("load", () => document.body.dataset.seen = JSON.stringify({
  title: document.title, width: innerWidth, content: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
  pictures: all("img").map(e => e.naturalWidth).concat(all("svg").map(e => Math.min(box(e).width, box(e).height))),
  spilt: all("svg text").filter(e => outside(e, e.closest("svg"))).length,
  requests: performance.getEntriesByType("resource").map(e => e.name).filter(name => !/^(file|data):/.test(name)),
  scripts: document.scripts.length, tables: all("table").length, figures: all("figure").length, headings: all("h1, h2, h3").length}));
</script>"""
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(browser() is None, reason="no Chromium, Chrome or Edge was found")


def browse(tmp_path, file, *flags):
    "What the browser prints for a file."
    done = subprocess.run([browser(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, file.as_uri()], capture_output=True, timeout=90)
    return done.stdout.decode("utf-8", "replace")


def look(tmp_path, text, width):
    "What the probe sees in a page with this text, in a window of that width. The page's own policy would forbid the probe to run."
    file = tmp_path / "copy.html"
    file.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = browse(tmp_path, file, f"--window-size={width},900", "--dump-dom")
    [body] = Page(dom[dom.index("<html"):]).all("body")
    return json.loads(body["data-seen"])


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["late entry", "failed", "everybody", "totals", "hostile names", "long names"])
def test_in_a_browser(reports, comparisons, kind, width, tmp_path):
    text = reports[kind].read_text(encoding="utf-8")
    seen, page = look(tmp_path, text, width), Page(text)
    assert abs(seen["width"] - width) <= 130          # some builds open no window as narrow as a phone
    assert seen["content"] <= seen["room"]
    assert min(seen["pictures"]) > 50
    assert seen["spilt"] == 0
    assert seen["requests"] == []
    assert seen["scripts"] == 1
    assert seen["title"] == comparisons[kind].summary().title
    assert (seen["tables"], seen["figures"]) == (len(page.all("table")), len(page.all("figure")))
    assert len(seen["pictures"]) == seen["figures"]
    assert seen["headings"] == len(page.all("h1", "h2", "h3"))


@needs_browser
def test_the_probe_notices(tmp_path):
    bad = '<div style="width: 3000px">x</div><img src="http://127.0.0.1:9/x.png"><svg viewBox="0 0 9 9" width="9"><text x="8">spilt</text></svg>'
    seen = look(tmp_path, f"<!DOCTYPE html><html><body>{bad}</body></html>", 1280)
    assert seen["content"] > seen["room"]
    assert seen["requests"] == ["http://127.0.0.1:9/x.png"]
    assert min(seen["pictures"]) == 0
    assert seen["spilt"] == 1


@needs_browser
def test_the_policy_forbids_scripts(reports, tmp_path):
    file = tmp_path / "copy.html"
    file.write_text(reports["late entry"].read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert "data-seen=" not in browse(tmp_path, file, "--dump-dom")


@needs_browser
def test_it_prints(reports, tmp_path):
    pdf = tmp_path / "report.pdf"
    browse(tmp_path, reports["late entry"], f"--print-to-pdf={pdf}")
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 12
