"""How fast and how exact the structured solver is, next to two general ones, PIQP and OSQP.

Run: python benchmarks/solvers.py [--sizes S M ...] [--repeats 5] [--limit 120] [--memory 8] [--scalings] [--out FILE]. Prints tables and writes
them to benchmarks/results.md. Needs Linux or macOS."""

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_variable] = "1"                                   # read when numpy is loaded, so before it is

import numpy as np
import tables
from libraries import SCALINGS, by_osqp, by_piqp, formulate
from problems import hierarchical, mundlak, whole_clusters

from clusterweights import __version__
from clusterweights.core import InfeasibleError, SolverError
from clusterweights.qp import Problem, certify, objective, path, solve

# --- what is solved, and by what ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A problem and how it is put to the libraries.

    piqp, osqp : the scaling given to each, see `libraries.formulate`: of all (option --scalings) the fastest among those whose weights came out
    right. limit : the share of the time limit that this problem gets. methods : who solves it."""
    words: str
    make: partial
    piqp: str = "sum"
    osqp: str = "mean"
    limit: float = 1.0
    methods: tuple[str, ...] = ("structured", "PIQP, polished", "PIQP", "OSQP", "OSQP, own polish", "OSQP, 1e-8")


FEW = ("structured", "PIQP", "OSQP", "OSQP, 1e-8")
SIZES = {
    "S": Size("Hierarchical weights: 6,217 controls in 821 clusters, 20 covariates; exact global balance and totals.",
              partial(hierarchical, 6217, 821, 20)),
    "S-tolerance": Size("As S, global balance within 0.01 standard deviations.", partial(hierarchical, 6217, 821, 20, tolerance=0.01)),
    "M": Size("Hierarchical weights: 36,898 controls in 533 clusters, 48 covariates.", partial(hierarchical, 36_898, 533, 48)),
    "XL": Size("Hierarchical weights: 1.3 million controls in 9,961 clusters, 20 covariates.", partial(hierarchical, 1_300_000, 9961, 20),
               methods=("structured", "PIQP")),
    "COS": Size("Whole clusters treated: 279,611 units in 1,699 clusters, 45 covariates, intracluster correlation 0.2.",
                partial(whole_clusters, 279_611, 1699, 45, icc=0.2), "mean, ridge", "mean, ridge"),
    "Mundlak": Size("1,200 products of 20 covariates with 60 cluster covariates balanced approximately, these 80 exactly; 6,217 controls.",
                    partial(mundlak, 6217, 821, 20, 60), "dense", limit=0.5, methods=FEW),
    "average-to-one": Size("As Mundlak, with an exact total in each of the 821 clusters.", partial(mundlak, 6217, 821, 20, 60, average_to_one=True),
                           "dense", limit=0.5, methods=FEW),
    "tiny": Size("Hierarchical weights: 400 controls in 20 clusters, 3 covariates.", partial(hierarchical, 400, 20, 3)),
}
PATHS = {"path": "M", "tiny-path": "tiny"}
RANGES = ((100, 0.01), (10, 0.1), (1, 0.01))
GROWTH = {"growth": {"n": (10_000, 20_000, 40_000, 80_000, 160_000), "K": (100, 200, 400, 800, 1600), "d": (5, 10, 20, 40, 60)},
          "tiny-growth": {"n": (400, 800), "K": (10, 20), "d": (2, 3)}}
DEFAULT = [name for name in (*SIZES, *PATHS, *GROWTH) if not name.startswith("tiny")]

# --- one job, in a process of its own -----------------------------------------------------------------------------


def memory() -> float:
    "The most this process has held so far, in MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def timed(limit: float, run: Callable) -> tuple[float, object]:
    "Seconds and result of run(). Much later than `limit` the process ends, even inside a library."
    signal.setitimer(signal.ITIMER_REAL, 1.1 * limit + 1)
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    signal.setitimer(signal.ITIMER_REAL, 0)
    return seconds, result


def prepared(method: str, scaling: str, problem: Problem, limit: float) -> Callable:
    "A function that solves the problem and returns weights, status, iterations, and a certificate or None."
    if method in ("structured", "PIQP, polished"):
        def ours():
            s = solve(problem, "structured" if method == "structured" else "piqp")
            return s.weights, s.status, s.iterations, s.certificate
        return ours
    matrices = formulate(problem, scaling)
    if method == "PIQP":
        return lambda: (*by_piqp(matrices), None)
    settings = {"OSQP": {}, "OSQP, own polish": {"polishing": True}, "OSQP, 1e-8": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 10**9}}[method]
    return lambda: (*by_osqp(matrices, time_limit=limit, **settings), None)


def time_method(job: dict) -> dict:
    "One method on one problem; its answer is held against the weights of the structured solver, which that leaves in the file `reference`."
    limit, reference = job["limit"], Path(job["reference"])
    prepared(job["method"], job["scaling"], SIZES["tiny"].make(), limit)()
    problem = SIZES[job["size"]].make()
    before, run = memory(), prepared(job["method"], job["scaling"], problem, limit)
    seconds, (weights, status, iterations, certificate) = timed(limit, run)
    times, peak = [seconds], memory()
    while len(times) < job["repeats"] and sum(times) < 10:
        times.append(timed(limit, run)[0])
    out = {"seconds": float(np.median(times)), "before": before, "peak": peak, "status": status, "iterations": iterations,
           "equality": certify(problem, weights, [np.zeros_like(c.value) for c in problem.constraints]).equality,
           "smallest": float(weights.min() / weights.mean())}
    if certificate is not None:
        out |= {"stationarity": certificate.stationarity, "gap": certificate.gap}
    if job["method"] == "structured":
        np.save(reference, weights)
    elif reference.exists():
        best = np.load(reference)
        out |= {"excess": objective(problem, weights) / objective(problem, best) - 1, "difference": float(np.abs(weights - best).max() / best.mean())}
    return out


def time_path(job: dict) -> dict:
    "The path over 20 values of lam, the same values one by one, and one solution at 1."
    problem, limit = SIZES[PATHS[job["size"]]].make(), job["limit"]
    def cold(lam): return timed(limit, lambda: solve(replace(problem, ridge=lam * problem.ridge), "structured"))
    cold(1.0)
    lams = np.geomspace(*job["range"], 20)
    total, warm = timed(limit, lambda: path(problem, lams))
    single = [cold(lam) for lam in lams]
    return {"lam": lams.tolist(), "total": total, "one": float(np.median([cold(1.0)[0] for _ in range(3)])),
            "apart": max(float(np.abs(a.weights - b.weights).max() / b.weights.mean()) for a, (_, b) in zip(warm, single)),
            "warm": [s.seconds for s in warm], "warm steps": [s.iterations for s in warm],
            "cold": [seconds for seconds, _ in single], "cold steps": [s.iterations for _, s in single]}


def time_growth(job: dict) -> dict:
    "Seconds and steps while one of n, K and d grows and the others stay at their middle value."
    sweeps = GROWTH[job["size"]]
    middle, rows = {name: values[len(values) // 2] for name, values in sweeps.items()}, []
    for value in sweeps[job["growing"]]:
        size = middle | {job["growing"]: value}
        problem = hierarchical(size["n"], size["K"], size["d"])
        runs = [timed(job["limit"], lambda: solve(problem, "structured")) for _ in range(4)][1:]
        rows.append({**size, "seconds": float(np.median([seconds for seconds, _ in runs])), "steps": runs[0][1].iterations})
    return {"rows": rows}


def child(job: dict) -> None:
    "Do one job and print what came out as JSON."
    if job["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (int(job["memory"] * 1e9),) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        out = {"method": time_method, "path": time_path, "growth": time_growth}[job["kind"]](job)
    except (InfeasibleError, SolverError, MemoryError) as error:
        out = {"failed": type(error).__name__}
    print(json.dumps(out))


def in_own_process(words: str, job: dict) -> dict:
    "What the job gives, or why it failed; announced while others are awaited."
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True)
    if done.returncode == -signal.SIGALRM:
        out = {"failed": f"stopped after {job['limit']:.0f} s", "stopped": job["limit"]}
    elif done.returncode < 0:
        out = {"failed": f"crashed, {signal.Signals(-done.returncode).name}"}
    elif done.returncode:
        raise RuntimeError(f"{words}: {done.stderr}")
    else:
        out = json.loads(done.stdout.splitlines()[-1])
    print(f"{words}: {out.get('failed') or tables.show(out.get('seconds', 'done'))}", file=sys.stderr, flush=True)
    return out


# --- all of them --------------------------------------------------------------------------------------------------

HOW = """Every solver runs in a process of its own, on one thread. The structured one is timed from the problem to certified weights, and so is PIQP with our
polishing (`solve(problem, "piqp")`). PIQP and OSQP alone are given matrices that are already built, in the scaling that suits them best; only
their setup and solution count, and the answer is taken as it comes. A first, tiny problem is solved before the clock starts. Time is the median of
several runs, fewer for what takes long. OSQP adapts its step by the clock, so that its answers differ from run to run.

- MB before, MB at most: the largest resident size of the process before the solver starts (the problem, and what making it took), and after.
- equality: the largest violation of a constraint, relative to the size of what is summed.
- smallest: the smallest weight over the mean weight; below 0 if weights are.
- excess: the objective over the optimum, minus 1; below 0 if constraints or bounds are violated for it.
- difference: the largest difference of a weight from that of the structured solver, over the mean weight.
- stationarity, gap: the residuals of the certificate, for answers that come with multipliers."""


def measure_methods(name: str, common: dict, scalings: bool, reference: Path) -> dict[str, dict]:
    "One size by all its methods. scalings : the libraries in every scaling that is not full matrices, not only the best."
    size, out = SIZES[name], {}
    for method in size.methods:
        best = None if method in ("structured", "PIQP, polished") else size.piqp if method == "PIQP" else size.osqp
        for scaling in [s for s in SCALINGS if s != "dense"] if scalings and best else [best]:
            label = f"{method} ({scaling})" if scalings and best else method
            out[label] = in_own_process(f"{name}, {label}", {**common, "kind": "method", "limit": common["limit"] * size.limit, "method": method,
                                                             "scaling": scaling, "reference": str(reference)})
    return out


def measure(options: argparse.Namespace) -> str:
    "All that was asked for, as text."
    begin, load = time.perf_counter(), os.getloadavg()[0]
    results, paths, growth = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes:
            common = {"size": name, "limit": options.limit, "repeats": options.repeats, "memory": options.memory}
            if name in PATHS:
                paths[name] = [in_own_process(f"{name} {ends}", {**common, "kind": "path", "range": ends}) for ends in RANGES]
            elif name in GROWTH:
                growth[name] = {key: in_own_process(f"{name} of {key}", {**common, "kind": "growth", "growing": key}) for key in GROWTH[name]}
            else:
                results[name] = measure_methods(name, common, options.scalings, Path(folder) / f"{name}.npy")
    parts = ["# The solvers compared", about(load, (time.perf_counter() - begin) / 60), "## Targets", tables.targets(results, paths),
             "## Times and accuracies", HOW]
    for name, found in results.items():
        parts += [f"### {name}", f"{SIZES[name].words} At most {options.limit * SIZES[name].limit:g} s for a solution.", tables.methods(found)]
    for name, several in paths.items():
        parts += [f"## Many values of lam, size {PATHS[name]}", *(part for r in several for part in tables.path(r))]
    for found in growth.values():
        parts += ["## Growth", *tables.growth(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(load: float, minutes: float) -> str:
    "Date, machine, versions and command."
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "osqp", "piqp"))
    command = shlex.join(["python", "benchmarks/solvers.py", *sys.argv[1:]])
    return (f"{datetime.date.today()}. {[*models, platform.processor()][0]}, {os.cpu_count()} cores, {platform.system()}; Python "
            f"{platform.python_version()}, clusterweights {__version__}, {versions}.\n\n`{command}` took {minutes:.1f} minutes. The load average of the machine was "
            f"{load:.1f} when it began.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*SIZES, *PATHS, *GROWTH]
    parser.add_argument("--sizes", nargs="+", default=DEFAULT, choices=names, metavar="SIZE",
                        help=f"some of {', '.join(names)}; default: all but the tiny ones")
    parser.add_argument("--repeats", type=int, default=5, help="most runs of which the median is taken; what takes 10 seconds is run once")
    parser.add_argument("--limit", type=float, default=120, help="seconds that one solution may take")
    parser.add_argument("--memory", type=float, default=0, help="address space in GB that one process may use; 0 for no limit")
    parser.add_argument("--scalings", action="store_true", help="give the libraries the problem in every scaling, not only in the best")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.md"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(json.loads(options.child))
    text = measure(options)
    print(text)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
