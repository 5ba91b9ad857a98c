"""An option that is accepted must do something; what must not matter, must not."""

import numpy as np
import pandas as pd
import pytest

import clusterweights as cw
from clusterweights.weights import METHODS

# For each option, another value and what it must change by more than rounding.
OTHER = {
    "lam": (5.0, lambda w: w.weights),
    "estimand": ("ATC", lambda w: w.weights),
    "tolerance": (0.02, lambda w: w.weights),
    "bounds": ({"balancing": (0.1, np.inf), "hierarchical": (0.1, np.inf), "mundlak": (0.1, np.inf), "softcal": (0.6, np.inf)}, lambda w: w.weights),
    "max_share": ({"balancing": 0.009, "hierarchical": 0.3, "mundlak": 0.02}, lambda w: w.weights),
    "cluster_weight": ("clusters", lambda w: w.weights),
    "target": (lambda frame: frame[::2], lambda w: w.weights),
    "variant": ("avto", lambda w: w.weights),
    "statistics": (["means", "treated", "treated means"], lambda w: w.weights),
    "standardize": (False, lambda w: w.weights),
    "solver": ("osqp", lambda w: w.solution.solver == "osqp"),
    "model": ("none", lambda w: w.weights),
    "normalize": ("cluster", lambda w: w.weights),
    "trim": (0.4, lambda w: w.weights),
    "truncate": (0.3, lambda w: w.weights),
    "penalty": (1.0, lambda w: w.weights),
    "slopes": (["age"], lambda w: w.weights),
    "nodes": (1, lambda w: w.weights),
    "loss": ("squared", lambda w: w.weights),
    "form": ("adjusted", lambda w: w.weights),
}
TOGETHER_WITH = {"target": {"estimand": "ATE"}, "penalty": {"model": "fixed"}, "slopes": {"model": "random coefficients"}}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(7)
    school = np.repeat(np.arange(12), rng.integers(15, 30, 12))
    n, level = len(school), rng.normal(size=12)
    age, income = rng.normal(size=n) + level[school], rng.lognormal(size=n) * 1000
    late = rng.uniform(size=n) < 1 / (1 + np.exp(1.0 - 0.3 * age - 0.8 * rng.normal(size=12)[school]))
    score = 3 * age + income / 1000 + 2 * level[school] + rng.normal(size=n) - late
    town = rng.choice(["north", "south", "west"], n)
    return pd.DataFrame({"school": school, "late": late, "age": age, "income": income, "town": town, "score": score})


def study(frame, **changes):
    return cw.Study(frame, **({"treat": "late", "outcome": "score", "cluster": "school", "covs": ["age", "income", "town"]} | changes))


@pytest.mark.filterwarnings("ignore::clusterweights.core.DroppedUnitsWarning")
@pytest.mark.parametrize("name, option", [(n, o) for n, m in METHODS.items() if "unit" in m.levels for o in m.options
                                          if o != "infeasible"])            # for data that have no weights: see test_softcal
def test_every_option_changes_the_result(frame, name, option):
    value, effect = OTHER[option]
    method, others = METHODS[name].function, TOGETHER_WITH.get(option, {})
    value = value[name] if isinstance(value, dict) else value(frame) if callable(value) else value
    before, after = effect(method(study(frame), **others)), effect(method(study(frame), **(others | {option: value})))
    assert np.max(np.abs(np.subtract(after, before, dtype=float))) > 1e-6


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "unit" in m.levels])
def test_what_must_not_matter(frame, name):
    method = METHODS[name].function
    base = method(study(frame)).weights
    order = np.random.default_rng(1).permutation(len(frame))
    renamed = frame.assign(school=[f"school {997 * s % 13}" for s in frame["school"]])
    changed = {
        "order of rows": (method(study(frame.iloc[order])).weights, base[order]),
        "cluster labels": (method(study(renamed)).weights, base),
        "scale and shift": (method(study(frame.assign(age=1e-5 * frame["age"] + 40, income=-1e6 * frame["income"]))).weights, base),
        "units of the outcome": (method(study(frame.assign(score=10 * frame["score"] + 500))).weights, base),
    }
    for what, (ours, expected) in changed.items():
        np.testing.assert_allclose(ours, expected, atol=1e-8, err_msg=what)


def test_a_redundant_covariate_does_no_harm(frame):
    redundant = study(frame.assign(months=12 * frame["age"]), covs=["age", "income", "town", "months"])
    np.testing.assert_allclose(cw.balancing_weights(redundant).weights, cw.balancing_weights(study(frame)).weights, atol=1e-8)
    assert cw.hierarchical_weights(redundant, lam=1.0).solution.certificate.ok


def test_weights_without_an_outcome_are_the_same(frame):
    with_outcome = cw.hierarchical_weights(study(frame), lam=1.0)
    without = cw.hierarchical_weights(study(frame, outcome=None), lam=1.0)
    np.testing.assert_array_equal(with_outcome.weights, without.weights)
