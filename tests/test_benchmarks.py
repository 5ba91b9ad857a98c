"""The benchmark of the solvers runs, and puts the same problem to everybody."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from numpy.testing import assert_allclose

from clusterweights.qp import objective, solve

pytest.importorskip("resource", reason="the benchmark measures memory as Unix does")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    before, variables = list(sys.path), dict(os.environ)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path[:] = before
    for name in os.environ.keys() - variables.keys():          # the script pins its threads
        del os.environ[name]


def test_the_script_runs(tmp_path):
    out = tmp_path / "results.md"
    command = [sys.executable, BENCHMARKS / "solvers.py", "--sizes", "tiny", "tiny-path", "tiny-growth", "--repeats", "2", "--out", out]
    subprocess.run(command, check=True)
    text = out.read_text(encoding="utf-8")
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines()) if len(cells) == 15}
    methods = ["structured", "PIQP, polished", "PIQP", "OSQP", "OSQP, own polish", "OSQP, 1e-8"]
    assert [name for name in rows if name in methods] == methods
    assert {rows[name][5] for name in methods} == {"solved"}
    difference = {name: float(rows[name][9]) for name in methods[1:]}
    assert difference["PIQP, polished"] < 1e-9 and difference["PIQP"] < 1e-3 and 1e-9 < difference["OSQP"] < 1
    assert text.count("20 values from") == 3 and "Fitted exponents: n:" in text and "1 of 1 sizes" in text


def kinds():
    from problems import hierarchical, mundlak, whole_clusters
    return {"hierarchical": partial(hierarchical, 300, 12, 3), "tolerance": partial(hierarchical, 300, 12, 3, tolerance=0.02),
            "Mundlak": partial(mundlak, 300, 12, 3, 6), "average-to-one": partial(mundlak, 300, 12, 3, 6, average_to_one=True),
            "whole clusters": partial(whole_clusters, 1000, 30, 4, icc=0.2)}


@pytest.mark.parametrize("kind", ["hierarchical", "tolerance", "Mundlak", "average-to-one", "whole clusters"])
@pytest.mark.parametrize("scaling", ["sum", "mean", "sum, ridge", "mean, ridge", "dense"])
def test_every_scaling_is_the_same_problem(kind, scaling):
    from libraries import by_osqp, by_piqp, formulate
    problem = kinds()[kind]()
    best = solve(problem, "structured").weights
    matrices = formulate(problem, scaling)
    settings = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "adaptive_rho_interval": 50}
    for (weights, status, _), off in ((by_piqp(matrices), 3e-2), (by_osqp(matrices, **settings), 1e-3)):
        assert status == "solved"
        assert_allclose(weights, best, atol=off * best.mean())
        assert_allclose(objective(problem, weights), objective(problem, best), rtol=1e-5)


def test_problems_are_the_same_in_every_run():
    for make in kinds().values():
        first, second = make(), make()
        assert (first.balance.x == second.balance.x).all() and (first.target == second.target).all()
        assert abs(first.balance.x.mean()) < 0.2 and 0.7 < first.balance.x.std() < 1.3


def test_what_takes_too_long_is_stopped():
    from solvers import in_own_process
    out = in_own_process("a hundredth of a second", {"kind": "method", "size": "S", "method": "PIQP, polished", "scaling": None, "limit": -0.9,
                                                     "repeats": 1, "memory": 0, "reference": "none"})
    assert out["failed"].startswith("stopped after")


def result(seconds, **more):
    "What a process reports."
    return {"seconds": seconds, "before": 100.0, "peak": 200.0, "status": "solved", "iterations": 5, "equality": 1e-12, "smallest": 0.0,
            "gap": 1e-12, **more}


def verdicts(results, paths):
    "Measurement and verdict by target."
    from tables import targets
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in targets(results, paths).splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def test_verdicts_on_the_targets():
    found = verdicts({"M": {"structured": result(2.0), "PIQP": result(2.9), "OSQP": {"failed": "stopped after 31 s", "stopped": 31}},
                      "XL": {"structured": result(7.0, peak=1001.0)},
                      "COS": {"structured": result(1.0, gap=1e-7), "OSQP": {"failed": "crashed, SIGSEGV"}}},
                     {"path": [{"lam": [1, 0.1], "cold": [4.0, 4.1], "total": 1.0}]})
    assert {name: verdict for name, (_, verdict) in found.items()} == {
        "every size: equality to 1e-10, no weight below 0, gap to 1e-8": "NO",
        "M: 15 times faster than OSQP at its defaults, best scaled": "yes",
        "M: 1.5 times faster than PIQP, best formulation": "NO",
        "COS: 10 times faster than OSQP at its defaults": "not measured",
        "XL: at most 8 s": "yes",
        "XL: at most 1,000 MB in all": "NO",
        "path, lam 1 to 0.1: a value 8 times cheaper than cold": "yes"}
    assert found["M: 15 times faster than OSQP at its defaults, best scaled"][0].startswith("more than 15.5 times")
    assert found["every size: equality to 1e-10, no weight below 0, gap to 1e-8"][0].startswith("2 of 3 sizes")
