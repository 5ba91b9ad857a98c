"""The command: what it reads, prints and writes, and its exit codes."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

import clusterweights as cw
from clusterweights import InputError, Study, cli, core
from clusterweights.datasets import late_entry_study, load_late_entry

COVS = ["female", "nonwhite", "free_lunch", "born"]
ROLES = ["--treat", "late", "--outcome", "math", "--cluster", "school", "--covs", *COVS]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "An empty folder to work in, with the late-entry data."
    monkeypatch.chdir(tmp_path)
    load_late_entry().to_csv("late.csv", index=False)
    return tmp_path


def data(name="data.csv", **changes):
    "The late-entry data with other columns."
    load_late_entry().assign(**changes).to_csv(name, index=False)
    return name


def study(**changes):
    return Study(load_late_entry(), **({"treat": "late", "outcome": "math", "cluster": "school", "covs": COVS} | changes))


def usage_error(*arguments):
    "Runs the command, which must end with code 2."
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2


def in_a_process(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "clusterweights", *arguments], capture_output=True, timeout=120, env={**os.environ, **environment})


# --- help ---------------------------------------------------------------------------------------------------------


def test_alone_it_shows_the_help(capsys):
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert "demo" in out
    assert "compare" in out
    assert err == ""


@pytest.mark.parametrize("command", [[], ["compare"]])
def test_the_example_of_the_help_runs(command, capsys, folder):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    lines = re.findall(r"^  (clusterweights (?:demo|compare) .*--(?:out|data) .*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(lines) == 2
    (folder / "late.csv").unlink()
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0
    assert sorted(os.listdir(folder)) == ["late.csv", "report.html"]
    assert capsys.readouterr().err == ""


def test_the_help_says_what_each_option_and_code_means(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    text = capsys.readouterr().out
    options = [action for group in cli._parser()._subparsers._group_actions for action in group.choices["compare"]._actions]
    assert all(option.help for option in options)
    assert all(re.search(rf"^  {code}  \w+", text, flags=re.MULTILINE) for code in (0, 1, 2))


def test_wrong_usage_exits_with_2(capsys):
    usage_error("dmo")
    usage_error("compare")
    usage_error("compare", "late.csv", "--treat", "late", "--outcome", "math", "--cluster", "school")
    assert "--treat, --cluster and --covs are needed" in capsys.readouterr().err
    usage_error("compare", "late.csv", *ROLES, "--formula", "late ~ female + (1 | school)")
    assert "leave out '--treat', '--cluster' and '--covs'" in capsys.readouterr().err
    usage_error("compare", "late.csv", *ROLES, "--out", "./late.csv")
    assert "must be different files" in capsys.readouterr().err


@pytest.mark.parametrize("option, value, why", [
    ("--lam", "0", "positive"), ("--lam", "atuo", "positive"), ("--lam", "nan", "positive"), ("--lam", "inf", "positive"),
    ("--tolerance", "-1", "0, a positive"), ("--level", "95", "between 0 and 1"), ("--missing", "keep", "invalid choice"),
    ("--estimand", "LATE", "invalid choice"), ("--methods", "unadjusted,hierarchicl", "Did you mean 'hierarchical'")])
def test_values_that_cannot_be_meant_exit_with_2(option, value, why, capsys):
    usage_error("compare", "late.csv", *ROLES, f"{option}={value}", "--out", "report.html")
    out, err = capsys.readouterr()
    assert why in err
    assert out == ""
    assert not os.path.exists("report.html")


# --- demonstration ------------------------------------------------------------------------------------------------


def test_the_demo_prints_what_the_methods_say(capsys):
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    expected = cw.compare(late_entry_study(), lam=1.0)
    for name in expected.table.index:
        assert f"{expected.table.loc[name, 'estimate']:.4f}" in out
        assert f" {expected.table.loc[name, 'ess_controls']:,.0f}" in out
    assert " 712\n" in out
    assert "Next: your own data." in out
    assert err == ""


def test_the_demo_writes_a_report_and_its_data(capsys):
    assert cli.main(["demo", "--out", "demo.html", "--data", "data.csv"]) == 0
    assert "Report written to demo.html" in capsys.readouterr().out
    assert open("demo.html", encoding="utf-8").read().startswith("<!DOCTYPE html>")
    pd.testing.assert_frame_equal(pd.read_csv("data.csv"), load_late_entry())


# --- comparing ----------------------------------------------------------------------------------------------------


def test_it_prints_the_study_the_table_and_the_reading(capsys):
    assert cli.main(["compare", "late.csv", *ROLES, "--lam", "1"]) == 0
    expected = cw.compare(study(), lam=1.0)
    assert capsys.readouterr() == (f"{study().describe().facts}\n\n{expected}\n", "")


def test_parquet_gzip_and_tabs_give_the_same(capsys):
    frame = load_late_entry()
    frame.to_parquet("late.parquet")
    frame.to_csv("late.csv.gz", index=False)
    frame.to_csv("late.tsv", index=False, sep="\t")
    printed = []
    for name in ("late.csv", "late.parquet", "late.csv.gz", "late.tsv"):
        assert cli.main(["compare", name, *ROLES, "--methods", "unadjusted,balancing"]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1


def test_a_formula_means_the_same_as_in_python(capsys):
    formula = "late ~ female + bs(born, df=3) + (1 | school)"
    assert cli.main(["compare", "late.csv", "--formula", formula, "--outcome", "math", "--methods", "balancing"]) == 0
    expected = cw.compare(Study.from_formula(formula, load_late_entry(), outcome="math"), ["balancing"])
    assert str(expected) in capsys.readouterr().out


@pytest.mark.parametrize("words, options", [
    (["--estimand", "atc"], {"estimand": "ATC"}), (["--lam", "2.5"], {"lam": 2.5}), (["--lam", "auto"], {}),
    (["--tolerance", "0.05"], {"tolerance": 0.05}), (["--tolerance", "auto"], {"tolerance": "auto"}), (["--level", "0.8"], {"level": 0.8}),
    (["--methods", "hierarchical unadjusted"], {"methods": ["hierarchical", "unadjusted"]})])
def test_options_of_the_comparison_arrive(words, options, capsys):
    assert cli.main(["compare", "late.csv", *ROLES, *words]) == 0
    assert str(cw.compare(study(), **options)) in capsys.readouterr().out


def test_options_of_the_study_arrive(capsys):
    frame = load_late_entry()
    people = 1 + frame["school"] % 3
    data(people=people, born=frame["born"].where(frame.index % 20 > 0))
    for missing in ("drop", "indicator"):
        assert cli.main(["compare", "data.csv", *ROLES, "--sampling-weights", "people", "--missing", missing, "--methods", "balancing"]) == 0
        out, err = capsys.readouterr()
        with pytest.warns(cw.DroppedUnitsWarning) if missing == "drop" else nullcontext():
            expected = cw.compare(Study(pd.read_csv("data.csv"), treat="late", outcome="math", cluster="school", covs=COVS, sampling_weights="people",
                                        missing=missing), ["balancing"])
        assert str(expected) in out
        assert ("Warning: 260 of 5,185 rows have missing values" in err) == (missing == "drop")
    assert cli.main(["compare", "data.csv", *ROLES]) == 1
    assert "'born' in 260" in capsys.readouterr().err


def test_columns_with_spaces_and_commas(capsys):
    frame = load_late_entry().rename(columns={"born": "born, year", "female": "is female", "math": "maths score", "school": "the school"})
    frame.to_csv("data.csv", index=False)
    command = ["compare", "data.csv", "--treat", "late", "--outcome", "maths score", "--cluster", "the school", "--methods", "balancing"]
    for covs in (["is female", "born, year", "nonwhite free_lunch"], ["is female,nonwhite, free_lunch", "born, year"]):
        assert cli.main([*command, "--covs", *covs]) == 0
        assert f"{cw.compare(study(), ['balancing']).table.loc['balancing', 'estimate']:.4f}" in capsys.readouterr().out
    assert cli.main([*command, "--covs", "is female", "--covs", "nonwhite", "--covs", "free_lunch", "born, year"]) == 0
    assert cli.main([*command, "--covs", "is femal"]) == 1
    assert "no column 'is femal'. Did you mean 'is female'" in capsys.readouterr().err


def test_treatments_in_words_need_to_be_told(capsys):
    late = load_late_entry()["late"]
    data(late=np.where(late == 1, "yes", "no"))
    assert cli.main(["compare", "data.csv", *ROLES]) == 1
    assert "--treated yes." in capsys.readouterr().err
    assert cli.main(["compare", "data.csv", *ROLES, "--treated", "yes", "--lam", "1"]) == 0
    out = capsys.readouterr().out
    assert "Effect of late (yes against no) on math (ATT)" in out
    assert str(cw.compare(study(), lam=1.0)).split("\n", 1)[1] in out
    data(late=late + 1)
    assert cli.main(["compare", "data.csv", *ROLES, "--treated", "2", "--methods", "unadjusted"]) == 0
    formula = ["--formula", "late ~ female + (1 | school)", "--outcome", "math"]
    assert cli.main(["compare", "data.csv", *formula, "--treated", "2", "--methods", "unadjusted"]) == 0
    assert capsys.readouterr().out.count("Unadjusted: -0.2463 (95% interval") == 2


# --- files --------------------------------------------------------------------------------------------------------


def test_weights_come_in_the_order_of_the_data():
    frame = load_late_entry().sample(frac=1, random_state=0)
    frame = frame.assign(born=frame["born"].where(np.arange(len(frame)) % 50 > 0))
    frame.to_csv("data.csv", index=False)
    with pytest.warns(cw.DroppedUnitsWarning):
        expected = cw.compare(Study(frame, treat="late", outcome="math", cluster="school", covs=COVS, missing="drop"), lam=1.0)
    assert cli.main(["compare", "data.csv", *ROLES, "--missing", "drop", "--lam", "1", "--weights", "weights.csv"]) == 0
    written = pd.read_csv("weights.csv", keep_default_na=False, dtype={"treated": str})
    assert written["row"].tolist() == list(range(1, 5186))
    for name, weights in expected.weights.items():
        assert_allclose(written[f"weight_{name}"], weights.weights, rtol=1e-9)
        assert (written[f"reason_{name}"] == np.where(weights.kept, "", "missing")).all()
    used = expected.weights["balancing"].kept
    assert (written["treated"][used] == np.where(frame["late"] == 1, "True", "False")[used]).all()
    assert (written["treated"][~used] == "").all()


def test_nothing_is_computed_if_the_report_has_no_place(monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_data", lambda path: pytest.fail("the data were read"))
    for option in ("--out", "--weights"):
        assert cli.main(["compare", "late.csv", *ROLES, option, "none/report.html"]) == 1
        assert capsys.readouterr() == ("", "InputError: There is no folder 'none'. Make it first, or write elsewhere.\n")
    assert cli.main(["demo", "--out", "."]) == 1


def test_files_that_cannot_be_read(capsys, monkeypatch):
    contents = {"bytes.csv": b"\xff\xfe\x00", "text.parquet": b"no", "text.csv.gz": b"no", "empty.csv": b"", "ragged.csv": b"a,b\n1,2\n1,2,3\n",
                "semi.csv": b"a;b\n1;2\n", "long.csv": b"a,b\n1,2,3\n", "twice.csv": b"late,math,late\n1,2,3\n", "data.xls": b"",
                "header.csv": b"late,math,school,female\n"}
    words = {"bytes.csv": "not utf-8", "semi.csv": "--sep", "long.csv": "more values", "twice.csv": "two columns of the name 'late'",
             "data.xls": "must end in", "header.csv": "no rows", "lat.csv": "Did you mean 'late.csv'", ".": "There is no file"}
    for name, content in contents.items():
        open(name, "wb").write(content)
    for name in [*contents, "lat.csv", "."]:
        assert cli.main(["compare", name, *ROLES[:-4], "female"]) == 1
        out, err = capsys.readouterr()
        assert err.startswith("InputError: ")
        assert err.count("\n") == 1
        assert words.get(name, "cannot be read") in err
        assert out == ""


def test_parquet_without_pyarrow(monkeypatch, capsys):
    load_late_entry().to_parquet("late.parquet")

    def none(*_, **__):
        raise ImportError("Unable to find a usable engine")
    monkeypatch.setattr(pd, "read_parquet", none)
    assert cli.main(["compare", "late.parquet", *ROLES]) == 1
    assert "need the package pyarrow" in capsys.readouterr().err


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_exits_with_1_and_says_why(monkeypatch, capsys):
    def fail(*_, **__):
        raise InputError("no luck")
    monkeypatch.setattr(cli, "compare", fail)
    assert cli.main(["compare", "late.csv", *ROLES]) == 1
    assert capsys.readouterr() == ("", "InputError: no luck\n")


@pytest.mark.parametrize("place, name, near", [(1, "lat", "late"), (3, "maths", "math"), (5, "schol", "school"), (7, "femal", "female")])
def test_a_misspelt_column_gets_a_suggestion(place, name, near, capsys):
    roles = [*ROLES[:place], name, *ROLES[place + 1:]]
    assert cli.main(["compare", "late.csv", *roles]) == 1
    assert f"no column {name!r}. Did you mean '{near}'" in capsys.readouterr().err


def test_some_failed_is_done_and_all_failed_is_not(monkeypatch, capsys):
    monkeypatch.setitem(core.TOLERANCES, "gap", -1.0)
    assert cli.main(["compare", "late.csv", *ROLES, "--out", "some.html"]) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"^(.*) gave no estimate: ", err, flags=re.MULTILINE) == ["Balancing, no clusters", "Hierarchical balancing"]
    assert "Unadjusted" in out
    assert cli.main(["compare", "late.csv", *ROLES, "--methods", "balancing", "--out", "none.html", "--weights", "none.csv"]) == 1
    assert sorted(os.listdir()) == ["late.csv", "none.html", "some.html"]


def test_warnings_are_lines_that_name_the_method(capsys):
    frame = load_late_entry()
    busy = frame[frame["late"] == 1]["school"].value_counts().index[:3]
    frame[~(frame["school"].isin(busy) & (frame["late"] == 0))].to_csv("data.csv", index=False)
    assert cli.main(["compare", "data.csv", *ROLES, "--lam", "1"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: Hierarchical balancing: 153 of 1,142 treated units were left out")


# --- as a process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_it_runs_whatever_the_terminal_can_show(encoding):
    data("data.csv", **{"größe": load_late_entry()["math"]})
    shown = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = in_a_process("compare", "data.csv", *ROLES[:3], "größe", *ROLES[4:], "--lam", "1", "--out", "report.html", **shown)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Effect of late on größe (ATT)".encode(encoding, "replace") in done.stdout
    assert b"Report written to report.html" in done.stdout
    missing = in_a_process("compare", "data.csv", *ROLES[:-4], "größer", **shown)
    assert missing.returncode == 1
    assert missing.stderr.startswith(b"InputError: The data have no column 'gr")
    assert in_a_process("compare", **shown).returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently there")
def test_a_reader_may_leave():
    "`clusterweights demo | head` must not end in a traceback."
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "clusterweights", "demo"], stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
