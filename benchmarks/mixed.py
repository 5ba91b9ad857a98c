"""How fast and how exact the mixed models are, next to gpboost and statsmodels.

Run: python benchmarks/mixed.py [--tasks education surgery ...] [--repeats 3] [--limit 300] [--out FILE]. Prints tables and writes them to
benchmarks/mixed_results.md. Needs gpboost, statsmodels, and Linux or macOS."""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_variable] = "1"                                   # read when numpy is loaded, so before it is

import numpy as np
from tables import markdown, power, show

from clusterweights.mixed import _RandomIntercept, fit_linear_mixed, fit_logistic_mixed
from clusterweights.simulate import education_data, surgery_data

HIDDEN = ["cluster", "treat", "outcome", "y0", "y1", "propensity", "u"]

# --- what is fitted, and by whom ----------------------------------------------------------------------------------


def arrays(data, columns):
    "Standardised covariates, treatment, outcome, starts."
    x = data.drop(columns=HIDDEN).to_numpy(float)
    x = np.column_stack([x, *(x[:, j] * x[:, k] for j in range(5) for k in (j + 1, j + 2))])[:, :columns]
    starts = np.r_[0, np.cumsum(data.groupby("cluster").size())]
    return (x - x.mean(axis=0)) / x.std(axis=0), data["treat"].to_numpy(bool), data["outcome"].to_numpy(float), starts


DATA = {
    "education": (lambda: arrays(education_data(1), 20), "9,862 children, 937 schools, 20 covariates (ten and their products)"),
    "surgery": (lambda: arrays(surgery_data(1, n_patients=35_000, n_hospitals=135), 48), "35,000 patients, 135 hospitals, 48 covariates"),
    "large": (lambda: arrays(surgery_data(1, n_patients=279_611, n_hospitals=1699), 45), "279,611 patients, 1,699 hospitals, 45 covariates"),
}


def clusters_of(starts):
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def certificate(found):
    return {"steps": found.convergence.iterations, "gradient": found.convergence.gradient}


def ours(**options):
    def fit(x, z, y, starts):
        found = fit_logistic_mixed(x, z, starts, **options)
        return {"coef": found.coef, "sd": found.sd[0], "boundary": found.boundary, **certificate(found)}
    return fit


def ours_linear(x, z, y, starts):
    found = fit_linear_mixed(x, y, starts)
    return {"coef": found.coef, "sd": found.between**0.5, **certificate(found)}


def gpboost_laplace(x, z, y, starts):
    import gpboost
    model = gpboost.GPModel(group_data=clusters_of(starts), likelihood="bernoulli_logit")
    model.fit(y=z.astype(float), X=np.column_stack([np.ones(len(x)), x]))
    variance = np.asarray(model.get_cov_pars()).ravel()[0]
    return {"coef": np.asarray(model.get_coef()).ravel(), "sd": variance**0.5}


def statsmodels_bayes(x, z, y, starts):
    from scipy.sparse import csr_matrix
    from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM
    n, k = len(x), len(starts) - 1
    dummies = csr_matrix((np.ones(n), (np.arange(n), clusters_of(starts))), (n, k))
    found = BinomialBayesMixedGLM(z.astype(float), np.column_stack([np.ones(n), x]), dummies, np.zeros(k, dtype=int)).fit_vb()
    return {"coef": found.fe_mean, "sd": float(np.exp(found.vcp_mean[0]))}


def statsmodels_linear(x, z, y, starts):
    from statsmodels.regression.mixed_linear_model import MixedLM
    found = MixedLM(y, np.column_stack([np.ones(len(x)), x]), clusters_of(starts)).fit()
    return {"coef": found.fe_params, "sd": float(found.cov_re[0, 0]) ** 0.5}


INTERCEPT = {"Laplace": ours(nodes=1), "25 nodes": ours(nodes=25), "gpboost, Laplace": gpboost_laplace}
BAYES = {"statsmodels BinomialBayesMixedGLM, variational": statsmodels_bayes}
TEN = range(10)
TASKS = {
    "education": ("education", "Random intercept", INTERCEPT | BAYES),
    "surgery": ("surgery", "Random intercept", INTERCEPT | BAYES),
    "large": ("large", "Random intercept", INTERCEPT),
    "coefficients": ("surgery", "Random intercept and ten random coefficients, Laplace", {
        "diagonal": ours(slopes=TEN), "diagonal, off the boundary": ours(slopes=TEN, off_boundary=True),
        "full": ours(slopes=TEN, covariance="full"), "full, off the boundary": ours(slopes=TEN, covariance="full", off_boundary=True)}),
    "linear": ("large", "Linear, random intercept, REML", {"profile likelihood": ours_linear, "statsmodels MixedLM": statsmodels_linear}),
}
GOALS = {("education", "25 nodes"): 0.6, ("surgery", "25 nodes"): 2.5, ("large", "Laplace"): 10, ("large", "25 nodes"): 20,
         ("coefficients", "diagonal"): 4, ("coefficients", "full"): 20, ("linear", "profile likelihood"): 2}

# --- measuring: each fit in a process of its own ------------------------------------------------------------------


def one(task, method, repeats):
    "Fit `repeats` times; the median of the seconds, the peak of memory, and the Laplace likelihood and its gradient at the estimate."
    source, _, methods = TASKS[task]
    x, z, y, starts = DATA[source][0]()
    fit_logistic_mixed(x[:, :1], z, starts, nodes=1)              # nothing is imported or looked up for the first time while the clock runs
    seconds, busy = [], []
    for _ in range(repeats):
        begin, used = time.perf_counter(), time.process_time()
        found = methods[method](x, z, y, starts)
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    out = {"seconds": float(np.median(seconds)), "busy": float(np.median(busy)), "peak": peak}
    if methods is not TASKS["linear"][2] and "ten random" not in TASKS[task][1]:
        value, gradient = _RandomIntercept(np.column_stack([np.ones(len(x)), x]), z, starts).value(np.r_[found["coef"], found["sd"]], 1)
        out |= {"loglik": float(value), "laplace_gradient": float(np.abs(gradient).max())}
    return out | {key: (value.tolist() if isinstance(value, np.ndarray) else value) for key, value in found.items()}


def measured(task, method, repeats, limit):
    command = [sys.executable, __file__, "--one", task, method, "--repeats", str(repeats)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- telling ------------------------------------------------------------------------------------------------------


def table(task, results):
    reference = next(iter(results.values()))
    rows = []
    for method, r in results.items():
        ratio = r["seconds"] / reference["seconds"] if "seconds" in r and "seconds" in reference else None
        gradient = r.get("gradient", r.get("laplace_gradient"))
        below = reference["loglik"] - r["loglik"] if "loglik" in r and "loglik" in reference else None
        goal = GOALS.get((task, method))
        verdict = "" if goal is None else f"{goal:g} s: {'met' if r.get('seconds', np.inf) <= goal else 'MISSED'}"
        numbers = [show(ratio), *(show(r.get(key)) for key in ("busy", "peak", "steps", "sd")), power(gradient), show(below)]
        rows.append([method, r.get("failed") or show(r["seconds"]), *numbers, verdict])
    head = ["", "seconds", "times the first", "CPU seconds", "MB at most", "steps", "sd", "gradient", "log-likelihood below", "target"]
    return markdown(head, rows)


def against_gpboost(results):
    "One line for each task that both did; the targets are for the two shapes of the papers."
    lines = []
    for task, found in results.items():
        mine, other = found.get("Laplace", {}), found.get("gpboost, Laplace", {})
        if "seconds" in mine and "seconds" in other:
            speed, exact = other["seconds"] / mine["seconds"], other["laplace_gradient"] / mine["laplace_gradient"]
            verdicts = [f" (target {goal:,}: {'met' if ratio >= goal else 'MISSED'})" if task != "large" else ""
                        for goal, ratio in ((4, speed), (1000, exact))]
            lines.append(f"- {task}: {speed:.1f} times faster than gpboost, {other['busy'] / mine['busy']:.1f} times in CPU seconds, Laplace "
                         f"against Laplace{verdicts[0]}, at a gradient {exact:.0e} times smaller{verdicts[1]}")
    return "\n".join(lines)


def load():
    return ", ".join(f"{v:.1f}" for v in os.getloadavg())


def installed(name):
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def main(arguments):
    before, results, parts = load(), {}, []
    for task in arguments.tasks:
        source, words, methods = TASKS[task]
        results[task] = {}
        for method, fit in methods.items():
            foreign = method.startswith(("gpboost", "statsmodels"))
            results[task][method] = measured(task, method, 1 if foreign else arguments.repeats, arguments.limit)
            print(task, method, {k: v for k, v in results[task][method].items() if k != "coef"}, file=sys.stderr)
        parts += [f"## {task}: {words}", DATA[source][1] + ".", table(task, results[task])]
    libraries = ", ".join(map(installed, ("numpy", "scipy", "gpboost", "statsmodels")))
    text = "\n\n".join([
        "# Mixed models: time and accuracy",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}; one thread each. "
        f"Average load before {before}, after {load()}: on a busy machine seconds are too many; CPU seconds are not. Own figures are "
        f"medians of {arguments.repeats} fits, others one fit at their defaults.",
        "Gradient: the largest slope of the log-likelihood at the estimate, per standard deviation of a covariate; own ones as certified, those "
        "of others by the exact gradient of Laplace's approximation at what they returned. Log-likelihood below: by Laplace, how far below the "
        "first row. Quadrature and the variational estimate of statsmodels maximise something else, so neither can reach it.",
        *parts, against_gpboost(results)])
    print(text)
    Path(arguments.out).write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one fit with its data")
    parser.add_argument("--out", default=Path(__file__).with_name("mixed_results.md"))
    parser.add_argument("--one", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(*chosen.one, chosen.repeats)))
    else:
        main(chosen)
