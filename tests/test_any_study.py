"""Over random data frames: the right answer, or an error of the package's own."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clusterweights as cw

OUTCOMES = {"answer": 0, "refusal": 0}


@st.composite
def frames(draw):
    "Data frames that a user might bring: small or lopsided clusters, odd scales, gaps, factors, copies of columns, constant columns."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, k = int(rng.integers(4, 300)), int(rng.integers(1, 12))      # not drawn: hypothesis favours the smallest, which all are refused
    data = pd.DataFrame({"g": rng.integers(0, k, n), "z": rng.uniform(size=n) < draw(st.sampled_from([0.1, 0.3, 0.6])),
                         "a": rng.normal(size=n) * 10.0 ** draw(st.integers(-8, 8)) + draw(st.sampled_from([0.0, 1e3])),
                         "b": np.round(rng.normal(size=n)), "y": rng.normal(size=n)})
    odd = draw(st.sampled_from(["none"] * 6 + ["gap", "text", "copy", "constant", "infinite", "by cluster", "treatment"]))
    data["c"] = {"gap": np.where(rng.uniform(size=n) < 0.1, np.nan, data["b"]), "text": rng.choice(["u", "v", "w"], n), "copy": 3 * data["a"],
                 "constant": np.ones(n), "infinite": np.where(np.arange(n) == 1, np.inf, data["b"]), "by cluster": data["g"] % 3,
                 "treatment": data["z"].astype(float)}.get(odd, rng.normal(size=n))
    return data


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=frames(), name=st.sampled_from(["balancing", "hierarchical", "mundlak"]), variant=st.sampled_from(["gb", "avto"]), estimand=st.sampled_from(["ATT", "ATC", "ATE"]),
       missing=st.sampled_from(["error", "drop", "indicator"]), tolerance=st.sampled_from([0.0, 0.1, "auto"]), lam=st.sampled_from([1e-3, 1.0, 1e3]))
def test_right_answer_or_typed_error(data, name, variant, estimand, missing, tolerance, lam):
    method = getattr(cw, f"{name}_weights")
    options = {"estimand": estimand, "tolerance": tolerance} | ({} if name == "balancing" else {"lam": lam}) | ({"variant": variant} if name == "mundlak" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", cw.ClusterWeightsWarning)
        try:
            study = cw.Study(data, treat="z", cluster="g", covs=["a", "b", "c"], outcome="y", missing=missing)
            weights = method(study, **options)
        except cw.ClusterWeightsError as error:
            OUTCOMES["refusal"] += 1
            assert len(str(error)) > 20
            return
    OUTCOMES["answer"] += 1
    w, kept = weights.in_order, weights.reason == ""
    assert np.isfinite(w).all() and (w >= 0).all() and (w[~kept] == 0).all()
    target = {"ATT": study.treat, "ATC": ~study.treat, "ATE": np.ones(study.n, dtype=bool)}[estimand] & kept
    allowed = max(s.tolerance for s in weights.solutions.values())
    for arm in (study.treat, ~study.treat):
        own = np.where(arm, w, 0.0)
        assert own.sum() == pytest.approx(target.sum(), rel=1e-8)
        if name == "hierarchical" or (name == "mundlak" and variant == "avto"):
            np.testing.assert_allclose(np.bincount(study.cluster, own, study.n_clusters), np.bincount(study.cluster[target], minlength=study.n_clusters),
                                       rtol=1e-7, atol=1e-7)
        x = study.x - study.x[0]                    # else a large offset costs the test its own precision
        miss = np.abs(np.average(x, weights=own, axis=0) - x[target].mean(axis=0)) / x.std(axis=0)
        assert miss.max() <= allowed + 1e-6


def test_refusing_everything_would_not_pass():
    assert OUTCOMES["answer"] > 0.3 * sum(OUTCOMES.values()) > 0
