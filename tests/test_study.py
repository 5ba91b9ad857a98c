"""What a study refuses, reads, fills, leaves out and remembers."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
from helpers import PUPILS, anova_components, pupils, schools
from numpy.testing import assert_allclose, assert_array_equal

from clusterweights import DroppedUnitsWarning, InputError, Study
from clusterweights.study import variance_components

DATA = pd.DataFrame({"z": [0, 1, 0, 1], "g": [1, 1, 2, 2], "x": [1.0, 2.0, 3.0, 4.0], "y": [1, 2, 3, 4.0]})


def make(data=DATA, roles=None, **columns):
    return Study(data.assign(**columns), **({"treat": "z", "cluster": "g", "covs": ["x"]} | (roles or {})))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns, roles, message", [
    ({"x": [1j, 2, 3, 4]}, {}, "complex128"),
    ({"x": [np.inf, 2, 3, -np.inf]}, {}, "'x' has 2 infinite values"),
    ({"y": [np.inf, 2, 3, 4]}, {"outcome": "y"}, "outcome 'y' has 1 infinite value"),
    ({"x": [1e101, 2, 3, 4]}, {}, "larger units"),
    ({"y": [1e-150, 0, 2e-150, 0]}, {"outcome": "y"}, "outcome 'y' has no value beyond ±1e-100"),
    ({"z": ["a", "b", "a", "b"]}, {"treated": np.array(["b"])}, "must be a single value of 'z'"),
    ({"x": [1, "two", 3, 4]}, {}, "must be numeric, but holds"),
    ({"z": ["a", "b", "a", "b"]}, {"treated": "ja"}, "'ja' does not occur"),
    ({"z": ["a", "b", "a", "b"]}, {}, "Say which one means treated"),
    ({"z": ["a", "b", "c", "b"]}, {"treated": "a"}, "but has 3: .a., .b. and .c."),
    ({"z": [1, 1, 1, 1]}, {}, "one arm is empty"),
    ({"x": [np.nan, 2, 3, 4], "g": [None, 1, 2, 2]}, {}, "1 of 4 rows"),
    ({"g": ["a", "a", "b", None]}, {}, "'g' in 1"),
    ({"x": [np.nan, 2, np.nan, 4], "g": ["a", None, "b", "b"]}, {}, "3 of 4 rows have missing values: 'g' in 1, 'x' in 2"),
    ({}, {"cluster": "z"}, "treat and as cluster"),
    ({}, {"covs": []}, "covs is empty"),
    ({}, {"covs": ["x", "x"]}, "names 'x' twice"),
    ({"x": [0.3, 0.1 + 0.2, 0.3, 0.3]}, {}, "Constant covariates: 'x'"),
    ({"g": [1, 1, 1, 1]}, {}, "share one cluster"),
    ({"w": [1, 0, 1, 1]}, {"sampling_weights": "w"}, "must be positive; 'w' has 1"),
    ({}, {"missing": "ignore"}, "must be 'error', 'indicator' or 'drop'"),
    ({"x": [np.nan] * 4}, {"missing": "indicator"}, "missing in every row"),
    ({"x": [np.nan] * 4}, {"missing": "drop"}, "Every one of the 4 rows"),
])
def test_a_study_refuses(columns, roles, message):
    with pytest.raises(InputError, match=message):
        make(roles=roles, **columns)


def test_text_with_a_value_for_nearly_each_row_is_an_identifier():
    names = [f"p{i // 2 if i < 80 else i}" for i in range(100)]
    wide = pd.DataFrame({"z": [0, 1] * 50, "g": np.arange(100) // 10, "x": names})
    with pytest.raises(InputError, match="identifier"):
        make(wide)


def test_a_misspelt_column_gets_an_offer():
    with pytest.raises(InputError, match="no column 'scool'. Did you mean 'school'"):
        pupils(cluster="scool")


# --- arrays -------------------------------------------------------------------------------------------------------


def test_arrays_are_in_cluster_order_and_go_back():
    order = np.array([3, 0, 2, 1])
    study = make(DATA.iloc[order], {"outcome": "y"}, g=["b", "a", "b", "a"])
    assert_array_equal(study.x[:, 0], [1, 2, 4, 3])
    assert_array_equal(study.starts, [0, 2, 4])
    assert list(study.labels) == ["a", "b"]
    assert_array_equal(study.to_rows(study.outcome), [4, 1, 3, 2])
    assert_array_equal(study.from_rows([4, 1, 3, 2]), study.outcome)
    with pytest.raises(InputError, match="one value for each of the 4 rows"):
        study.from_rows([1, 2, 3])


def test_factors_become_columns_without_their_first_level():
    study = make(x=["red", "blue", "green", "blue"])
    assert study.names == ("x[green]", "x[red]")
    assert_array_equal(study.x, [[0, 1], [0, 0], [1, 0], [0, 0]])
    assert dict(study.terms) == {"x": (0, 1)}


def test_one_unit_between_two_values_is_not_constant_within():
    assert make(x=[100.0, 101.0, 200.0, 200.0]).constant_within == ()
    assert make(x=[100.0, 100.0, 200.0, 200.0]).constant_within == ("x",)


def test_levels_of_treatment():
    assert make().level == "unit"
    assert make(z=[0, 0, 1, 1]).level == "cluster"


def test_the_treated_value_can_be_named():
    assert_array_equal(make(roles={"treated": "no"}, z=["yes", "no", "yes", "no"]).treat, [False, True, False, True])


def test_missing_values_of_polars_are_missing():
    with pytest.raises(InputError, match="1 of 4 rows have missing values: 'x' in 1"):
        Study(pl.DataFrame({"z": [0, 1, 0, 1], "g": [1, 1, 2, 2], "x": [1.0, None, 3.0, 4.0]}), treat="z", cluster="g", covs="x")


# --- missing values -----------------------------------------------------------------------------------------------


def test_dropping_rows_is_the_study_of_the_other_rows():
    gaps = DATA.iloc[[0, 1, 2, 3, 0, 1]].reset_index(drop=True).assign(y=[1, 2, 3, 4, np.nan, 6.0], x=[1.0, 2, 3, 4, 9, np.nan])
    with pytest.warns(DroppedUnitsWarning, match="2 of 6 rows have missing values and were left out") as caught:
        study = make(gaps, {"outcome": "y", "missing": "drop"})
    assert caught[0].filename == __file__
    assert (study.n, study.n_rows) == (4, 6)
    assert_array_equal(study.x[:, 0], DATA["x"])
    assert_array_equal(study.to_rows(study.outcome, np.nan), [1, 2, 3, 4, np.nan, np.nan])
    assert_array_equal(study.from_rows([1, 2, 3, 4, 5, 6]), [1, 2, 3, 4])


def test_nothing_to_drop_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(roles={"missing": "drop"})


def test_an_indicator_fills_with_the_mean_and_marks_the_gap():
    study = make(roles={"missing": "indicator"}, x=[1.0, 2, np.nan, 6])
    assert study.names == ("x", "x[missing]")
    assert_array_equal(study.x, [[1, 0], [2, 0], [3, 1], [6, 0]])
    assert dict(study.terms) == {"x": (0,), "x[missing]": (1,)}


def test_a_gap_in_a_factor_is_a_level():
    study = make(roles={"missing": "indicator"}, x=["b", "a", None, "b"])
    assert study.names == ("x[b]", "x[missing]")
    assert_array_equal(study.x, [[1, 0], [0, 0], [0, 1], [1, 0]])


# --- sampling weights, outcomes, formulas -------------------------------------------------------------------------


def test_sampling_weights_have_mean_one():
    study = make(roles={"sampling_weights": "w"}, w=[2, 4, 6, 8])
    assert_allclose(study.sampling_weights, [0.4, 0.8, 1.2, 1.6])
    assert study.weight_scale == pytest.approx(5)


def test_several_outcomes_are_kept_by_name():
    study = make(roles={"outcome": ["y", "y2"]}, y2=[5.0, 6, 7, 9])
    assert list(study.outcomes) == ["y", "y2"]
    assert_array_equal(study.outcome, DATA["y"])
    assert_array_equal(study.outcomes["y2"], [5, 6, 7, 9])


def test_a_formula_of_columns_is_the_same_study():
    frame = schools(seed=4)
    plain = Study(frame, treat="late", outcome="score", cluster="school", covs=["age", "income"])
    read = Study.from_formula("late ~ age + income + (1 | school)", frame, outcome="score")
    assert read.names == plain.names
    assert_array_equal(read.x, plain.x)
    assert_array_equal(read.treat, plain.treat)
    assert_array_equal(read.starts, plain.starts)


def test_a_formula_makes_terms():
    frame = schools(seed=4).assign(wealth=lambda f: np.exp(f["income"]), town=lambda f: np.where(f["age"] > 0, "north", "south"))
    study = Study.from_formula("late ~ age:income + log(wealth) + town + (1 | school)", frame)
    by_name = dict(zip(study.names, study.x.T))
    assert_allclose(by_name["age:income"], frame["age"] * frame["income"])
    assert_allclose(by_name["log(wealth)"], frame["income"])
    [town] = [x for name, x in by_name.items() if "town" in name]
    assert_array_equal(town, frame["age"] <= 0)
    assert sorted(j for columns in study.terms.values() for j in columns) == list(range(len(study.names)))


@pytest.mark.parametrize("formula, message", [
    ("late + age", "must read"),
    ("late ~ age", "name the cluster once"),
    ("late ~ age + (age | school)", "name the cluster once"),
    ("late ~ (1 | school)", "names no covariates"),
    ("late ~ agee + (1 | school)", "agee"),
])
def test_a_formula_that_cannot_be_read(formula, message):
    with pytest.raises(InputError, match=message):
        Study.from_formula(formula, schools())


# --- description and permanence -----------------------------------------------------------------------------------


def test_single_units_have_no_variance_within():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        between, within = variance_components(np.array([1.0, 2.0, 4.0]), np.arange(4))
    assert np.isnan(within)
    assert np.isnan(between)


def test_components_are_those_of_an_analysis_of_variance():
    rng, cluster = np.random.default_rng(2), np.repeat(np.arange(4), [3, 5, 2, 6])
    y = rng.normal(size=16) + cluster
    expected = anova_components(y, np.zeros((16, 0)), cluster)
    assert_allclose(variance_components(y, np.searchsorted(cluster, np.arange(5))), expected, rtol=1e-10)


def test_a_description_by_hand():
    d = pupils().describe()
    facts = d.facts.frame[""]
    assert facts["units"] == "15"
    assert facts["clusters with both arms"] == "2"
    assert facts["clusters without treated"] == "1, 3 controls in them"
    assert facts["clusters without controls"] == "1, 3 treated in them"
    assert list(d.clusters["share_treated"]) == [0.5, 0, 1, 2 / 5]
    by_arm = PUPILS.groupby("late")["age"].mean()
    row = d.variables.frame.loc["age", ["mean treated", "mean control", "sd"]]
    assert_allclose(row.to_numpy(float), [by_arm[1], by_arm[0], PUPILS["age"].std()])


def test_a_cluster_constant_has_an_icc_of_one():
    assert make(x=[1, 1, 5, 5.0]).describe().variables.frame.loc["x", "ICC"] == pytest.approx(1)


def test_a_study_prints_its_size():
    assert "15 units in 4 clusters (school), 7 treated (late = 1)" in repr(pupils())


@pytest.mark.parametrize("twin", [lambda s: s, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["itself", "copied", "pickled"])
def test_a_study_stays_closed(twin):
    study = twin(pupils())
    with pytest.raises(AttributeError):
        study.n = 7
    with pytest.raises(AttributeError):
        del study.n
    with pytest.raises(ValueError, match="read-only"):
        study.x[0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        study.outcome[0] = 1.0
    with pytest.raises(TypeError):
        study.outcomes["score"] = 0
    assert_array_equal(study.x, pupils().x)
