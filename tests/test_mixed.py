"""Mixed models: parity with lme4 and statsmodels, derivatives, invariance, edges, and what is said about fits that fail."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.optimize import minimize

from clusterweights import mixed
from clusterweights.core import EstimationError, InputError, NotConvergedWarning
from clusterweights.mixed import Convergence, fit_linear_mixed, fit_logistic_mixed

REFERENCE = Path(__file__).parent / "reference"


def starts_of(cluster):
    cluster = np.asarray(cluster)
    return np.r_[0, np.flatnonzero(cluster[1:] != cluster[:-1]) + 1, len(cluster)]


def clustered(seed=0, sizes=(1, 1, 2, 7, 12, 9, 30, 4, 5, 16), d=2, sd=1.0):
    "x, z, y, starts: clusters of various sizes, with a cluster effect on both outcomes."
    rng = np.random.default_rng(seed)
    starts = np.r_[0, np.cumsum(sizes)]
    level = np.repeat(sd * rng.normal(size=len(sizes)), sizes)
    x = rng.normal(size=(starts[-1], d))
    eta = x @ np.linspace(1, -0.5, d) + level
    return x, rng.random(len(eta)) < 1 / (1 + np.exp(-eta)), eta + rng.normal(size=len(eta)), starts


# --- parity with lme4 ---------------------------------------------------------------------------------------------

GLMER = {"hsb_minority": ("school", "minority", ["ses", "female"]), "sim001_rho025": ("cluster", "z", [f"x{j}" for j in range(1, 8)]),
         "zero_variance": ("cluster", "z", ["x1", "x2"])}


@pytest.mark.parametrize("nodes", [1, 25])
@pytest.mark.parametrize("case", GLMER)
def test_glmer(case, nodes):
    folder, (cluster, treat, covs) = REFERENCE / "glmer" / case, GLMER[case]
    data = pd.read_csv(folder / "data.csv.gz").assign(fitted=pd.read_csv(folder / "fitted.csv.gz")[f"fitted_nAGQ{nodes}"])
    data = data.sort_values(cluster, kind="stable")
    effects = pd.read_csv(folder / "ranef.csv").set_index("cluster").loc[data[cluster].unique()]
    expected = json.loads((folder / "expected.json").read_text())["fits"][f"nAGQ{nodes}"]
    fit = fit_logistic_mixed(data[covs], data[treat], starts_of(data[cluster]), nodes=nodes, names=covs)
    sd = expected["ranef_sd"]["(Intercept)"]
    assert fit.loglik >= expected["logLik"] - 1e-6
    assert_allclose(fit.coef, list(expected["fixef"].values()), atol=1e-5)
    assert_allclose(fit.std_error, list(expected["vcov_fixef_se"].values()), rtol=2e-3 if nodes == 1 else 1e-4)
    assert_allclose(fit.sd, sd, atol=1e-5)
    assert fit.boundary == (sd < 1e-4)
    assert_allclose(fit.effects[:, 0], effects[f"mode_Intercept_nAGQ{nodes}"], atol=1e-5)
    assert_allclose(fit.fitted, data["fitted"], atol=1e-5)
    if nodes == 1:
        assert_allclose(np.sqrt(fit.effect_variances[:, 0]), effects["condsd_nAGQ1"], atol=1e-5)
    assert fit.convergence.ok and fit.convergence.gradient <= 1e-5


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("model", ["null", "ri"])
def test_lmer(model, method):
    data, folder = pd.read_csv(REFERENCE / "lmer" / "data.csv.gz"), REFERENCE / "lmer"
    expected = json.loads((folder / "expected.json").read_text())["fits"][f"{model}_{method}"]
    covs = [] if model == "null" else ["ses", "ses_mean", "sector", "female", "minority"]
    fit = fit_linear_mixed(data[covs], data["mathach"], starts_of(data["school"]), method=method.lower(), names=covs)
    assert_allclose(fit.loglik, expected["logLik"], rtol=1e-12)
    assert_allclose(fit.coef, list(expected["fixef"].values()), rtol=1e-7)
    assert_allclose(fit.std_error, list(expected["se"].values()), rtol=1e-6)
    assert_allclose([fit.between, fit.within], [expected["ranef_var"][0][0], expected["sigma2"]], rtol=1e-6)
    assert_allclose(fit.icc, expected["icc_intercept"], rtol=1e-6)
    assert_allclose(fit.effects, pd.read_csv(folder / "blups.csv")[f"blup_Intercept_{model}_{method}"], atol=1e-6)


# --- parity with statsmodels and with brute force -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_mixedlm(method):
    x, _, y, starts = clustered(3)
    fit = fit_linear_mixed(x, y, starts, method=method)
    other = sm.MixedLM(y, sm.add_constant(x), np.repeat(np.arange(len(starts) - 1), np.diff(starts))).fit(reml=method == "reml")
    assert_allclose(fit.coef, other.fe_params, rtol=1e-4, atol=1e-5)
    assert_allclose(fit.std_error, other.bse_fe, rtol=1e-3)
    assert_allclose([fit.between, fit.within], [other.cov_re[0, 0], other.scale], rtol=1e-3)
    assert_allclose(fit.loglik, other.llf, atol=1e-5)
    assert_allclose(fit.effects, [v.iloc[0] for v in other.random_effects.values()], atol=1e-3)


def dense_loglik(theta, x, y, starts, q, d, reml):
    "The log-likelihood with the covariance matrix written out; theta: the two variances."
    member, design = np.repeat(np.eye(len(starts) - 1), np.diff(starts), axis=0), sm.add_constant(x)
    v = theta[1] * np.diag(1 / q) + theta[0] * (member * d) @ member.T
    xvx = design.T @ np.linalg.solve(v, design)
    beta = np.linalg.solve(xvx, design.T @ np.linalg.solve(v, y))
    e = y - design @ beta
    nu = len(y) - reml * design.shape[1]
    value = nu * np.log(2 * np.pi) + np.linalg.slogdet(v)[1] + e @ np.linalg.solve(v, e) + reml * np.linalg.slogdet(xvx)[1]
    return -value / 2, beta, np.linalg.inv(xvx)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_linear_with_precisions_against_the_definition(method):
    x, _, y, starts = clustered(4)
    rng = np.random.default_rng(0)
    q, d = rng.uniform(0.3, 3, len(y)), rng.uniform(0.3, 3, len(starts) - 1)
    fit = fit_linear_mixed(x, y, starts, method=method, precision=q, relative_variance=d)
    best, beta, cov = dense_loglik([fit.between, fit.within], x, y, starts, q, d, method == "reml")
    assert_allclose(fit.loglik, best, rtol=1e-12)
    assert_allclose(fit.coef, beta, rtol=1e-9)
    assert_allclose(fit.cov, cov, rtol=1e-8)
    for factor in ([1.02, 1], [0.98, 1], [1, 1.02], [1, 0.98]):
        assert dense_loglik(np.array([fit.between, fit.within]) * factor, x, y, starts, q, d, method == "reml")[0] < best
    given = fit_linear_mixed(x, y, starts, method=method, precision=q, relative_variance=d, ratio=fit.between / fit.within)
    assert_allclose(given.effects, fit.effects, rtol=1e-9)
    assert given.convergence is None and "given" in str(given)
    both = np.column_stack([np.ones(len(y)), x, np.repeat(np.eye(len(d)), np.diff(starts), axis=0)])
    system = both.T @ (q[:, None] * both) + np.diag(np.r_[np.zeros(3), fit.within / (fit.between * d)])       # the mixed model equations
    assert_allclose(np.r_[fit.coef, fit.effects], np.linalg.solve(system, both.T @ (q * y)), rtol=1e-8)
    assert_allclose(fit.effect_variances, fit.within / np.diag(system)[3:], rtol=1e-9)
    assert not np.allclose(fit_linear_mixed(x, y, starts, method=method).coef, fit.coef)


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_linear_finds_the_higher_of_several_maxima(method):
    "With uneven relative variances the likelihood may fall from zero and rise again later."
    rises = 0
    for seed in range(16):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(2, 9, size=5)
        starts, d = np.r_[0, np.cumsum(sizes)], np.exp(2 * rng.normal(size=5))
        y = rng.standard_t(2, size=starts[-1]) + np.repeat(rng.standard_t(1, size=5), sizes) * rng.random()
        x = rng.normal(size=(len(y), 1))
        options = {"method": method, "relative_variance": d}
        fit = fit_linear_mixed(x, y, starts, **options)
        profile = [fit_linear_mixed(x, y, starts, **options, ratio=r).loglik for r in np.r_[0, 1e-4, np.logspace(-5, 6, 45)]]
        assert fit.loglik >= max(profile) - 1e-9
        rises += profile[1] < profile[0] < max(profile) - 0.01
    assert rises > 0


def brute_loglik(coef, sd, x, z, starts):
    eta, sign, total = coef[0] + x @ coef[1:], np.where(z, 1, -1), 0.0
    for a, b in zip(starts[:-1], starts[1:]):
        def density(v):
            return np.prod(1 / (1 + np.exp(-sign[a:b] * (eta[a:b] + sd * v)))) * np.exp(-v**2 / 2) / np.sqrt(2 * np.pi)
        total += np.log(quad(density, -10, 10, epsabs=1e-15, epsrel=1e-11, limit=200)[0])
    return total


def test_logistic_maximises_the_integrated_likelihood():
    x, z, _, starts = clustered(1, sd=1.5)
    fit = fit_logistic_mixed(x, z, starts, nodes=51)
    best = brute_loglik(fit.coef, fit.sd[0], x, z, starts)
    assert_allclose(fit.loglik, best, atol=1e-8)
    for j in range(4):
        for shift in (-0.02, 0.02):
            moved = np.r_[fit.coef, fit.sd]
            moved[j] += shift
            assert brute_loglik(moved[:3], moved[3], x, z, starts) < best


def test_standard_errors_are_those_of_the_integrated_likelihood():
    x, z, _, starts = clustered(1, sd=1.5)
    fit, h = fit_logistic_mixed(x, z, starts), 1e-3
    at, unit = np.r_[fit.coef, fit.sd], np.eye(4) * h
    def loglik(p): return brute_loglik(p[:3], p[3], x, z, starts)
    hessian = [[(loglik(at + a + b) - loglik(at + a - b) - loglik(at - a + b) + loglik(at - a - b)) / (4 * h**2) for a in unit] for b in unit]
    assert_allclose(fit.cov, np.linalg.inv(-np.array(hessian))[:3, :3], rtol=1e-3, atol=1e-6)


# --- random coefficients ------------------------------------------------------------------------------------------


def varying(seed=0, k=60, size=25):
    rng = np.random.default_rng(seed)
    starts, x = np.arange(0, k * size + 1, size), rng.normal(size=(k * size, 3))
    u = rng.normal(size=(k, 2)) @ np.array([[0.8, 0.4], [0, 0.5]])
    eta = x @ [1, -0.5, 0.3] + np.repeat(u[:, 0], size) + x[:, 1] * np.repeat(u[:, 1], size)
    return x, rng.random(len(eta)) < 1 / (1 + np.exp(-eta)), starts


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_gradient_of_random_coefficients(full, prior):
    x, z, starts = varying(k=12)
    design = np.column_stack([np.ones(len(x)), x])
    model = mixed._RandomCoefficients(design, z, starts, np.array([0, 2, 3]), full, prior)
    theta = np.r_[0.1, 0.8, -0.4, 0.2, np.where(model.row == model.column, 0.7, 0.2)]
    numeric = [(model.value(theta + e)[0] - model.value(theta - e)[0]) / 2e-5 for e in 1e-5 * np.eye(len(theta))]
    assert_allclose(model.value(theta)[1], numeric, atol=2e-6)


def test_random_coefficients_recover_what_varies():
    x, z, starts = varying(k=300)
    fit = fit_logistic_mixed(x, z, starts, slopes=["b"], covariance="full", names=["a", "b", "c"])
    assert fit.random == ("(intercept)", "b") and fit.convergence.ok and not fit.boundary
    assert_allclose(fit.coef, [0, 1, -0.5, 0.3], atol=0.15)
    assert_allclose(fit.covariance, [[0.64, 0.32], [0.32, 0.41]], atol=0.15)
    assert fit.loglik > fit_logistic_mixed(x, z, starts, slopes=[1]).loglik > fit_logistic_mixed(x, z, starts, nodes=1).loglik


def test_laplace_of_several_effects_against_two_dimensional_integrals():
    "Large clusters: Laplace is close to the truth, which the product rule gives."
    x, z, starts = varying(k=8, size=60)
    model = mixed._RandomCoefficients(np.column_stack([np.ones(len(x)), x]), z, starts, np.array([0, 2]), True)
    theta = np.array([0.1, 0.9, -0.4, 0.2, 0.8, 0.2, 0.6])
    factor, grid, total = model.factor(theta), np.linspace(-7, 7, 141), 0.0
    v = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    for a, b in zip(starts[:-1], starts[1:]):
        eta = (theta[0] + x[a:b] @ theta[1:4])[:, None] + np.column_stack([np.ones(b - a), x[a:b, 1]]) @ factor @ v.T
        logs = -np.log1p(np.exp(-np.where(z[a:b], 1, -1)[:, None] * eta)).sum(axis=0) - (v**2).sum(axis=1) / 2
        total += np.log(np.exp(logs).sum() * (grid[1] - grid[0]) ** 2 / (2 * np.pi))
    assert abs(model.value(theta)[0] - total) < 0.02 * 8


def test_what_does_not_vary_is_exactly_zero_and_said():
    x, z, starts = varying(k=60)
    fit = fit_logistic_mixed(x, z, starts, slopes=[0, 1, 2])
    zero = [name for name, sd in zip(fit.random, fit.sd) if sd == 0]
    assert zero and set(zero) <= {"x1", "x3"} and fit.boundary and fit.convergence.ok
    assert "exactly zero" in str(fit) and all(name in str(fit) for name in zero)
    assert (fit.effects[:, [fit.random.index(name) for name in zero]] == 0).all()
    kept = fit_logistic_mixed(x, z, starts, slopes=[0, 1, 2], off_boundary=True)
    assert (kept.sd > 0.01).all() and not kept.boundary and kept.loglik < fit.loglik
    model = mixed._RandomCoefficients(np.column_stack([np.ones(len(x)), x]), z, starts, np.arange(4), False)
    model.s = np.column_stack([np.ones(len(x)), x - x.mean(axis=0)])
    at = np.r_[kept.coef, kept.sd]
    assert_allclose(model.value(at)[0], kept.loglik, rtol=1e-10)                  # without the prior


def test_a_search_that_starts_at_zero_leaves_it(monkeypatch):
    "Zero is a stationary point whether it is a maximum or not."
    x, z, _, starts = clustered(1, sd=1.5)
    found = fit_logistic_mixed(x, z, starts).sd
    monkeypatch.setattr(mixed, "_start_sd", lambda data, beta: 0.0)
    assert_allclose(fit_logistic_mixed(x, z, starts).sd, found, rtol=1e-6)


def haphazard(seed):
    "Few clusters of any size, sparse or dense covariates, weak or strong effects."
    rng = np.random.default_rng(seed)
    k = int(rng.integers(3, 60))
    sizes = rng.integers(1, rng.integers(2, 40), k)
    n, d = sizes.sum(), int(rng.integers(1, 5))
    x = rng.normal(size=(n, d)) if rng.random() < 0.6 else (rng.random((n, d)) < 0.2).astype(float)
    level = rng.choice([0, 0.05, 0.5, 1.5, 4]) * rng.normal(size=k)
    eta = rng.normal() + x @ (rng.normal(size=d) * rng.choice([0.3, 1, 3])) + np.repeat(level, sizes)
    return x, rng.random(n) < 1 / (1 + np.exp(-eta)), np.r_[0, np.cumsum(sizes)]


@pytest.mark.parametrize("seed", range(24))
def test_haphazard_data_give_a_maximum_or_an_error(seed):
    x, z, starts = haphazard(seed)
    kinds = [{}, {"nodes": 1}, {"off_boundary": True}, {"slopes": [0]}, {"slopes": [0], "covariance": "full"},
             {"slopes": [0], "covariance": "full", "off_boundary": True}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in kinds:
            try:
                fit = fit_logistic_mixed(x, z, starts, **options)
            except (InputError, EstimationError):
                continue
            assert fit.convergence.ok
            if options.get("slopes") is None and not options.get("off_boundary"):
                assert fit.loglik >= by_library(x, z, starts, fit.nodes) - 1e-6


def by_library(x, z, starts, nodes):
    "The highest log-likelihood that a general optimiser finds from two starting points."
    design = np.column_stack([np.ones(len(x)), (x - x.mean(axis=0)) / x.std(axis=0)])
    model = mixed._RandomIntercept(design, z, starts)
    def negative(theta): return [-v for v in model.value(theta, nodes)]
    return max(-minimize(negative, np.r_[np.zeros(design.shape[1]), sd], jac=True, method="BFGS").fun for sd in (0.3, 2.0))


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slopes", [None, [1]])
def test_predictions_repeat_the_fit(slopes):
    x, z, starts = varying(k=20)
    starts = np.r_[0, 60, 70, 71, starts[4:]]
    fit = fit_logistic_mixed(x, z, starts, slopes=slopes)
    assert_allclose(fit.predict(x, np.repeat(np.arange(20), np.diff(starts))), fit.fitted, rtol=1e-10)
    assert_allclose(fit.predict(x), fit.averaged, rtol=1e-10)
    s = np.array([1.0, *(x[0, slopes] - x[:, slopes].mean(axis=0) if slopes else [])])
    eta, sd = fit.coef[0] + x[0] @ fit.coef[1:], np.sqrt(s @ fit.covariance @ s)
    expected = quad(lambda v: np.exp(-v**2 / 2) / np.sqrt(2 * np.pi) / (1 + np.exp(-eta - sd * v)), -10, 10)[0]
    assert_allclose(fit.averaged[0], expected, atol=1e-8)
    with pytest.raises(InputError, match="0 to 19"):
        fit.predict(x[:2], np.array([0, 20]))
    with pytest.raises(InputError, match="shape"):
        fit.predict(x[:, :2])


def test_linear_predictions_repeat_the_fit():
    x, _, y, starts = clustered(3)
    fit = fit_linear_mixed(x, y, starts)
    assert_allclose(fit.predict(x, np.repeat(np.arange(10), np.diff(starts))), fit.fitted, rtol=1e-12)
    assert_allclose(fit.predict(x), fit.coef[0] + x @ fit.coef[1:], rtol=1e-12)


# --- invariance ---------------------------------------------------------------------------------------------------

KINDS = [{}, {"nodes": 1}, {"slopes": [0, 1]}, {"slopes": [1], "covariance": "full"}, {"slopes": [0, 1], "off_boundary": True}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_order_of_rows_and_clusters_does_not_matter(options):
    x, z, starts = varying(k=25)
    fit, rng = fit_logistic_mixed(x, z, starts, **options), np.random.default_rng(1)
    clusters = rng.permutation(25)
    rows = np.concatenate([rng.permutation(np.arange(starts[g], starts[g + 1])) for g in clusters])
    other = fit_logistic_mixed(x[rows], z[rows], starts, **options)
    assert_allclose(other.coef, fit.coef, atol=1e-6)
    assert_allclose(other.covariance, fit.covariance, atol=1e-5)
    assert_allclose(other.effects, fit.effects[clusters], atol=1e-5)
    assert_allclose(other.fitted, fit.fitted[rows], atol=1e-6)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_units_of_measurement_do_not_matter(options):
    x, z, starts = varying(k=25)
    scale, shift = np.array([1e5, 1e-4, 3.0]), np.array([1e6, 2e-3, -5.0])
    fit, other = (fit_logistic_mixed(v, z, starts, **options) for v in (x, x * scale + shift))
    assert_allclose(other.coef[1:] * scale, fit.coef[1:], rtol=1e-4, atol=1e-6)
    assert_allclose(other.std_error[1:] * scale, fit.std_error[1:], rtol=1e-4)
    assert_allclose(other.fitted, fit.fitted, atol=1e-6)
    assert_allclose(other.averaged, fit.averaged, atol=1e-6)
    assert_allclose(other.loglik, fit.loglik, rtol=1e-10)
    units = np.r_[1, scale[options.get("slopes", [])]]
    assert_allclose(other.effects * units, fit.effects, atol=1e-5)
    assert_allclose(other.effect_variances * units**2, fit.effect_variances, rtol=1e-4, atol=1e-9)
    assert_allclose(other.covariance * np.outer(units, units), fit.covariance, rtol=1e-4, atol=1e-7)


def test_linear_is_invariant():
    x, _, y, starts = clustered(3)
    fit, other = fit_linear_mixed(x, y, starts), fit_linear_mixed(x * [1e4, 1e-3] + [1e6, 3], 1e6 + 10 * y, starts)
    assert_allclose(other.coef[1:] * [1e4, 1e-3], 10 * fit.coef[1:], rtol=1e-7)
    assert_allclose([other.between, other.within], [100 * fit.between, 100 * fit.within], rtol=1e-6)
    backwards = fit_linear_mixed(x[::-1], y[::-1], starts[-1] - starts[::-1])
    assert_allclose(backwards.coef, fit.coef, rtol=1e-10)
    assert_allclose(backwards.effects, fit.effects[::-1], rtol=1e-8)


# --- edges --------------------------------------------------------------------------------------------------------


def test_no_covariates():
    _, z, y, starts = clustered(1)
    nothing = np.empty((len(z), 0))
    logistic, linear = fit_logistic_mixed(nothing, z, starts), fit_linear_mixed(nothing, y, starts)
    assert logistic.coef.shape == linear.coef.shape == (1,) and logistic.convergence.ok
    assert logistic.predict(np.empty((2, 0)), np.array([0, -1])).shape == (2,)


def test_small_and_one_armed_clusters_are_counted():
    x, z, _, starts = clustered(1)
    z[starts[3]:starts[4]] = True
    fit, treated = fit_logistic_mixed(x, z, starts), np.add.reduceat(z, starts[:-1], dtype=int)
    assert fit.singletons == 2 and fit.one_arm == ((treated == 0) | (treated == np.diff(starts))).sum() >= 3
    assert np.isfinite(fit.effects).all() and (fit.fitted > 0).all() and (fit.fitted < 1).all()


def test_results_pickle_and_print():
    x, z, y, starts = clustered(1)
    for fit in (fit_logistic_mixed(x, z, starts), fit_linear_mixed(x, y, starts)):
        copy = pickle.loads(pickle.dumps(fit))
        assert repr(copy) == repr(fit) == str(fit.summary()) and "<table" in fit._repr_html_()
        assert list(fit.summary().frame.index) == ["(intercept)", "x1", "x2"]


def test_inputs_are_not_changed_and_frames_are_read():
    x, z, y, starts = clustered(1)
    before = [v.copy() for v in (x, z, y, starts)]
    fit = fit_logistic_mixed(pd.DataFrame(x), pd.Series(z), list(starts))
    fit_linear_mixed(x, y, starts)
    assert all((a == b).all() for a, b in zip(before, (x, z, y, starts)))
    assert_allclose(fit.coef, fit_logistic_mixed(x, z.astype(int), starts).coef, rtol=1e-12)


WRONG = {
    "missing": (lambda x, z, s: fit_logistic_mixed(np.where(x > 2, np.nan, x), z, s), InputError, "missing or infinite"),
    "text": (lambda x, z, s: fit_logistic_mixed(x, np.repeat("a", len(x)), s), InputError, "z must hold numbers"),
    "not 0/1": (lambda x, z, s: fit_logistic_mixed(x, 2 * z, s), InputError, "0 and 1 only"),
    "short": (lambda x, z, s: fit_logistic_mixed(x, z[:-1], s), InputError, "shape"),
    "starts": (lambda x, z, s: fit_logistic_mixed(x, z, s[1:]), InputError, "begin with 0"),
    "empty cluster": (lambda x, z, s: fit_logistic_mixed(x, z, np.r_[0, 0, s[1:]]), InputError, "none empty"),
    "one cluster": (lambda x, z, s: fit_logistic_mixed(x, z, s[[0, -1]]), EstimationError, "one cluster"),
    "all treated": (lambda x, z, s: fit_logistic_mixed(x, z | True, s), EstimationError, "1 for everybody"),
    "whole clusters": (lambda x, z, s: fit_logistic_mixed(x, np.repeat(np.arange(10) % 2, np.diff(s)), s), EstimationError, "No cluster has both"),
    "constant": (lambda x, z, s: fit_logistic_mixed(np.c_[x, 0 * x[:, 0] + 3], z, s), InputError, "Constant: 'x3'"),
    "collinear": (lambda x, z, s: fit_logistic_mixed(np.c_[x, x[:, 0] - 2 * x[:, 1] + 1], z, s),
                  InputError, "'x3' is a combination of 'x1' and 'x2'"),
    "names": (lambda x, z, s: fit_logistic_mixed(x, z, s, names=["a"]), InputError, "1 name for 2 columns"),
    "unknown slope": (lambda x, z, s: fit_logistic_mixed(x, z, s, slopes=["x7"]), InputError, "no column 'x7'"),
    "slope twice": (lambda x, z, s: fit_logistic_mixed(x, z, s, slopes=["x1", 0]), InputError, "each once"),
    "nodes": (lambda x, z, s: fit_logistic_mixed(x, z, s, nodes=0), InputError, "nodes=0"),
    "nodes with slopes": (lambda x, z, s: fit_logistic_mixed(x, z, s, slopes=[0], nodes=25), InputError, "Laplace"),
    "covariance alone": (lambda x, z, s: fit_logistic_mixed(x, z, s, covariance="full"), InputError, "slopes="),
    "covariance": (lambda x, z, s: fit_logistic_mixed(x, z, s, slopes=[0], covariance="ful"), InputError, "'full'"),
    "too many effects": (lambda x, z, s: fit_logistic_mixed(np.c_[x, x**2], z, s, slopes=range(4), covariance="full"),
                         EstimationError, "10 clusters are too few for the 15"),
    "too few units": (lambda x, z, s: fit_logistic_mixed(x[:4], [1, 0, 1, 0], [0, 2, 4]), EstimationError, "4 units are too few"),
    "separated": (lambda x, z, s: fit_logistic_mixed(np.c_[x, (x[:, 0] > 1) & z], z, s, names=["a", "b", "refugee"]),
                  EstimationError, "'refugee' predicts"),
    "method": (lambda x, z, s: fit_linear_mixed(x, x[:, 0] + z, s, method="rml"), InputError, "'reml'"),
    "precision": (lambda x, z, s: fit_linear_mixed(x, x[:, 0] + z, s, precision=np.zeros(len(x))), InputError, "must be positive"),
    "ratio": (lambda x, z, s: fit_linear_mixed(x, x[:, 0] + z, s, ratio=-1.0), InputError, "ratio=-1.0"),
    "constant y": (lambda x, z, s: fit_linear_mixed(x, np.ones(len(x)), s), EstimationError, "y is constant"),
    "explained": (lambda x, z, s: fit_linear_mixed(x, x @ [1, 2], s), EstimationError, "completely"),
    "nothing within": (lambda x, z, s: fit_linear_mixed(x[:, :0], np.repeat(np.arange(10.0) ** 2, np.diff(s)), s),
                       EstimationError, "Nothing varies within"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, kind, words = WRONG[case]
    x, z, _, starts = clustered(1)
    with pytest.raises(kind, match=words):
        call(x, z, starts)


def test_quasi_separation_by_a_combination():
    "Everybody at the baseline of a factor is treated: a combination of its dummies."
    x, z, starts = varying(k=20)
    level = np.random.default_rng(0).integers(0, 4, len(z))
    dummies = (level[:, None] == np.arange(1, 4)).astype(float)
    with pytest.raises(EstimationError, match=f"combination of .* for {(level == 0).sum()} units") as error:
        fit_logistic_mixed(np.c_[x, dummies], z | (level == 0), starts, names=["a", "b", "c", "north", "east", "south"])
    assert all(name in str(error.value) for name in ("north", "east", "south")) and "'a'" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"nodes": 1}, {"slopes": [0]}], ids=str)
def test_separation_within_clusters(options):
    x, _, starts = varying(k=50, size=8)
    heights = np.repeat(2 * np.random.default_rng(0).normal(size=50), 8)
    with pytest.raises(EstimationError, match="grow without limit.*those of 'marks'"):
        fit_logistic_mixed(x, x[:, 0] > heights, starts, names=["marks", "b", "c"], **options)


def test_near_collinearity_and_outliers_are_no_separation():
    x, z, starts = varying(k=50)
    rng = np.random.default_rng(2)
    nearly = fit_logistic_mixed(np.c_[x, x[:, 0] + 1e-3 * rng.normal(size=len(x))], z, starts)
    wild = fit_logistic_mixed(np.c_[x, rng.standard_cauchy(len(x)) ** 3], z, starts)
    assert nearly.convergence.ok and wild.convergence.ok
    assert_allclose(wild.coef[1:4], fit_logistic_mixed(x, z, starts).coef[1:], atol=0.05)


def test_a_search_that_is_cut_short_warns(monkeypatch):
    x, z, starts = varying(k=25)
    monkeypatch.setattr(mixed, "_MOST_STEPS", 2)
    with pytest.warns(NotConvergedWarning, match="NOT converged.*Try off_boundary=True") as caught:
        fit = fit_logistic_mixed(x, z, starts, slopes=[0, 1])
    assert not fit.convergence.ok and caught[0].filename == __file__


def test_no_warnings_otherwise():
    x, z, y, starts = clustered(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_logistic_mixed(x, z, starts)
        fit_logistic_mixed(x, z, starts, slopes=[0], off_boundary=True)
        fit_linear_mixed(x, y, starts)


def test_certificate():
    assert Convergence(1e-6, 0.1, 3).ok and Convergence(0.0, np.nan, 0).ok
    assert not Convergence(1e-4, 0.1, 3).ok and not Convergence(1e-6, -0.1, 3).ok and not Convergence(np.nan, 0.1, 3).ok
    assert "NOT converged" in str(Convergence(1e-4, 0.1, 3))


def test_linear_algebra_runs_on_one_thread(monkeypatch):
    from threadpoolctl import threadpool_info
    seen, value = [], mixed._RandomIntercept.value

    def watched(self, theta, nodes):
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return value(self, theta, nodes)
    monkeypatch.setattr(mixed._RandomIntercept, "value", watched)
    x, z, _, starts = clustered(1)
    fit_logistic_mixed(x, z, starts)
    assert set(seen) == {1}


@pytest.mark.parametrize("options", [{}, {"nodes": 1}, {"slopes": [0, 1], "covariance": "full", "off_boundary": True}])
def test_a_weight_of_three_is_three_copies(options):
    rng = np.random.default_rng(12)
    cluster = np.repeat(np.arange(25), 14)
    x = rng.normal(size=(350, 2))
    z = rng.random(350) < 1 / (1 + np.exp(-x[:, 0] - rng.normal(size=25)[cluster] - 0.8 * rng.normal(size=25)[cluster] * x[:, 0]))
    times = rng.integers(1, 4, size=350)
    copied = np.repeat(np.arange(350), times)
    names = ("a", "b")
    standard = (x - np.average(x, axis=0, weights=times)) / np.sqrt(np.average((x - np.average(x, axis=0, weights=times)) ** 2, axis=0, weights=times))
    once = mixed.fit_logistic_mixed(standard, z, np.searchsorted(cluster, np.arange(26)), weights=times, names=names, **options)
    each = mixed.fit_logistic_mixed(standard[copied], z[copied], np.searchsorted(cluster[copied], np.arange(26)), names=names, **options)
    assert_allclose(once.loglik, each.loglik, rtol=1e-9)
    assert_allclose(once.coef, each.coef, rtol=2e-4, atol=2e-5)
    assert_allclose(once.fitted[copied], each.fitted, atol=2e-4)
    if "slopes" not in options:
        assert_allclose(once.sd, each.sd, rtol=1e-5)
        assert_allclose(once.std_error, each.std_error, rtol=1e-4)
