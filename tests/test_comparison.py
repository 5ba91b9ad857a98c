"""The comparison's figures, sentences and warnings, and the shipped data."""

import pickle
import warnings
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import PUPILS, residuals_by_refitting, schools
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

import clusterweights as cw
import clusterweights.comparison as comparing
from clusterweights import InputError, Study, core, framework
from clusterweights.comparison import Comparison, difference
from clusterweights.datasets import late_entry_study, load_hsb, load_late_entry, load_star

FRAME = schools(seed=2)


def study(frame=FRAME, **changes):
    return Study(frame, **({"treat": "late", "outcome": "score", "cluster": "school", "covs": ["age", "income"]} | changes))


def too_old():
    "Late pupils whom no weights of others can match in age; within schools not even nearly."
    frame = load_late_entry()
    age = np.where(frame["late"] == 1, 8.0, 5.0 + frame["school"] % 5)
    return Study(frame.assign(age=age), treat="late", outcome="math", cluster="school", covs=["female", "age"])


def by_hand(method, in_order, left_out=()):
    "Weights of a method, made up."
    reason = np.full(len(FRAME), "", dtype=object)
    reason[list(left_out)] = "no controls in cluster"
    return cw.Weights(study(), method, "ATT", {}, np.where(reason == "", in_order, 0.0), reason, {})


def comparison(weights, errors=None, l2_local=None):
    "A comparison of made-up weights, with made-up local imbalance if given."
    weights = {w.method: w for w in weights}
    balances = {name: w.balance() for name, w in weights.items()}
    rows = {}
    for name, w in weights.items():
        e, low_high = w.estimate(), w.estimate().conf_int()
        rows[name] = {"label": w.label, "estimate": e.estimate, "std_error": e.std_error, "conf_low": low_high[0], "conf_high": low_high[1],
                      "df": e.df, "corrected": e.estimate, "vcov": e.vcov,
                      "l2_local": balances[name].l2.loc["local", "after"], "local_reduction": 50.0, "units": w.target.units, "clusters": w.target.clusters}
    table = pd.DataFrame.from_dict(rows, orient="index")
    if l2_local is not None:
        table["l2_local"] = l2_local
    return Comparison(study(), table, weights, balances, errors or {}, 0.95, "ATT", change=comparing._change(weights))


def favouring(values, strength):
    "Weights that favour controls with large values, with a total of the treated."
    late = FRAME["late"].to_numpy() == 1
    w = np.exp(strength * np.asarray(values))
    return np.where(late, 1.0, w * late.sum() / w[~late].sum())


# --- figures ------------------------------------------------------------------------------------------------------


def test_level_columns_and_picture():
    late = late_entry_study()
    c = cw.compare(late, ["unadjusted"], level=0.9)
    row = c.table.loc["unadjusted"]
    assert row["conf_high"] - row["conf_low"] == pytest.approx(2 * 1.6448536269514722 * row["std_error"], rel=1e-12)
    assert "90% low" in str(c)
    assert "90% interval" in c.reading()
    [bar] = c.plot(Figure().subplots()).collections
    assert_allclose(bar.get_segments()[0][:, 0], [row["conf_low"], row["conf_high"]])


def test_the_table_is_that_of_each_method_alone():
    c = cw.compare(study(), lam=0.7)
    assert list(c.table.index) == ["unadjusted", "balancing", "ipw", "hierarchical", "mundlak gb", "mundlak avto"]
    for name, w in {"unadjusted": cw.unadjusted_weights(study()), "balancing": cw.balancing_weights(study()), "ipw": cw.ipw_weights(study()),
                    "hierarchical": cw.hierarchical_weights(study(), lam=0.7)}.items():
        row, e, l2 = c.table.loc[name], w.estimate(), w.balance().l2
        expected = [e.estimate, e.std_error, w.ess["treated"], w.ess["controls"], *l2["after"], *l2["reduction"]]
        columns = ["estimate", "std_error", "ess_treated", "ess_controls", "l2_global", "l2_local", "global_reduction", "local_reduction"]
        assert_allclose(row[columns].astype(float), expected, rtol=1e-9, atol=1e-12)


def test_one_method_with_several_options():
    methods = [("hierarchical", {"lam": 1}), ("hierarchical", {"lam": 10}), ("hierarchical", {"bounds": (0, 50), "lam": 10})]
    c = cw.compare(study(), methods)
    labels = [f"Hierarchical balancing, {said}" for said in ("lam=1", "lam=10", "bounds=(0, 50), lam=10")]
    assert list(c.table["label"]) == labels and [w.params["lam"] for w in c.weights.values()] == [1, 10, 10]
    assert all(f"{label}: " in c.reading() for label in labels) and "lam=10" in str(c)

    same_values = cw.compare(study(), [("ipw", {"trim": 0.05}), ("ipw", {"truncate": 0.05})], same_clusters=False)
    assert list(same_values.table["label"]) == ["IPW, random intercept, trim=0.05", "IPW, random intercept, truncate=0.05"]
    for w, option in zip(same_values.weights.values(), ("trim", "truncate")):
        assert_allclose(w.weights, cw.ipw_weights(study(), **{option: 0.05}).weights)


def test_the_reading_rounds_as_the_table_does():
    c = cw.compare(study(), lam=0.7)
    c = replace(c, table=c.table.assign(std_error=[0.02, 1.7, *[0.02] * 4], estimate=12.34567))
    assert c.reading().count(": 12.3457 (95% interval") == len(c.table) and str(c).count("12.3457") == 2 * len(c.table)


def test_global_imbalance_by_hand():
    late = late_entry_study()
    differences = []
    for j in range(late.x.shape[1]):
        a, b = late.x[late.treat, j], late.x[~late.treat, j]
        differences.append((a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    row = cw.compare(late, ["unadjusted"]).table.loc["unadjusted"]
    assert row["l2_global"] == pytest.approx(np.sqrt(np.mean(np.square(differences))), rel=1e-10)


@pytest.mark.parametrize("cluster", [True, False])
def test_the_error_of_a_difference_is_a_sum_over_units(cluster):
    first = by_hand("unadjusted", favouring(FRAME["age"], 0.2))
    second = by_hand("hierarchical" if cluster else "balancing", favouring(FRAME["income"], 0.9))
    late, y, residuals = FRAME["late"] == 1, FRAME["score"], residuals_by_refitting(FRAME, cluster=cluster)
    change, variance = 0.0, 0.0
    for i in FRAME.index:
        same = late == late[i]
        share = second.weights[i] / second.weights[same].sum() - first.weights[i] / first.weights[same].sum()
        change += (share if late[i] else -share) * y[i]
        variance += share**2 * residuals[i] ** 2
    assert_allclose(difference(first, second), [change, np.sqrt(variance)], rtol=1e-8)
    assert change == pytest.approx(second.estimate().estimate - first.estimate().estimate)


def test_a_comparison_can_be_pickled():
    c = cw.compare(study())
    twin = pickle.loads(pickle.dumps(c))
    pd.testing.assert_frame_equal(twin.table, c.table)
    assert twin.reading() == c.reading()


def test_a_dollar_sign_in_a_name_is_no_formula():
    "Such labels would be set as TeX, or fail to."
    odd = study(FRAME.rename(columns={"score": r"$\foo$", "age": r"$\bar$"}), outcome=r"$\foo$", covs=[r"$\bar$", "income"])
    c = cw.compare(odd, ["balancing"])
    for ax in (c.plot(Figure().subplots()), c.balances["balancing"].plot(Figure().subplots(1, 3))[0]):
        ax.figure.savefig(BytesIO())
    assert r"$\foo$" in c.plot(Figure().subplots()).get_xlabel()


def test_only_effects_have_a_line_of_no_effect():
    frame = FRAME.assign(score=FRAME["score"].where(FRAME.index % 3 > 0))
    survey = Study.survey(frame, outcome="score", cluster="school", covs=["age", "income"])
    lines = [[line.get_linestyle() for line in cw.compare(s, ["unadjusted"]).plot(Figure().subplots()).lines] for s in (study(), survey)]
    assert [("--" in styles) for styles in lines] == [True, False]


# --- refusals and failures ----------------------------------------------------------------------------------------


def test_compare_refuses():
    with pytest.raises(InputError, match="takes a Study, not DataFrame"):
        cw.compare(PUPILS)
    with pytest.raises(InputError, match="has no outcome"):
        cw.compare(study(outcome=None))
    with pytest.raises(InputError, match="must be a list of names"):
        cw.compare(study(), "balancing")
    with pytest.raises(InputError, match="Unknown method 'balance'. Did you mean 'balancing'"):
        cw.compare(study(), ["balance"])
    with pytest.raises(InputError, match="has an option 'lamm'. Did you mean 'lam'"):
        cw.compare(study(), lamm=1.0)
    with pytest.raises(InputError, match="must be a positive number"):
        cw.compare(study(), lam=-1.0)
    with pytest.raises(InputError, match="answer one question: give estimand to all, not to 'hierarchical' by itself"):
        cw.compare(study(), ["unadjusted", ("hierarchical", {"estimand": "ATE"})])


def test_options_reach_the_methods_that_have_them():
    c = cw.compare(study(), ["unadjusted", "hierarchical"], lam=7.0, estimand="ATC")
    assert c.weights["hierarchical"].params["lam"] == 7.0
    assert {w.estimand for w in c.weights.values()} == {"ATC"}
    assert c.estimand == "ATC"


def test_an_infeasible_method_stays_with_its_reason():
    c = cw.compare(too_old(), ["hierarchical", "unadjusted"])
    assert list(c.table["status"]) == ["infeasible", "closed form"]
    assert np.isnan(c.table.loc["hierarchical", "estimate"])
    assert isinstance(c.errors["hierarchical"], cw.InfeasibleError)
    assert list(c.weights) == ["unadjusted"]
    assert any("impossible" in note for note in c.summary().notes)
    assert "Hierarchical balancing gave no estimate" in c.reading()


def test_a_method_without_certified_answer_stays_with_its_reason(monkeypatch):
    monkeypatch.setitem(core.TOLERANCES, "gap", -1.0)
    c = cw.compare(study(), ["unadjusted", "balancing"])
    assert list(c.table["status"]) == ["closed form", "no certified answer"]
    assert isinstance(c.errors["balancing"], cw.SolverError)


def test_a_method_that_cannot_estimate_stays_with_its_reason():
    exact = study(FRAME.assign(score=2 * FRAME["age"]))
    c = cw.compare(exact, ["unadjusted", "hierarchical"])
    assert list(c.table["status"]) == ["closed form", "not estimable"]
    assert "predict it perfectly" in c.reading()


def test_a_comparison_in_which_all_fails_still_prints():
    c = cw.compare(too_old(), ["hierarchical"])
    assert "gave no estimate" in str(c)
    assert c.plot(Figure().subplots()) is not None


# --- warnings -----------------------------------------------------------------------------------------------------


def one_sided():
    "The pupils of FRAME, without the controls of school 0."
    return study(FRAME[(FRAME["school"] > 0) | (FRAME["late"] == 1)])


def test_warnings_are_kept_and_say_which_method_they_are_about():
    with pytest.warns(cw.ClusterWeightsWarning) as caught:
        c = cw.compare(one_sided(), ["balancing", "hierarchical"])
    kept = [f"{label}: {text}" for name, label in (("balancing", "Balancing, no clusters"), ("hierarchical", "Hierarchical balancing"))
            for text in c.warnings.get(name, [])]
    assert [str(w.message) for w in caught] == kept
    assert any("Hierarchical balancing: 4 of 20 treated units were left out" in text for text in kept)
    assert {w.filename for w in caught} == {__file__}


def test_warnings_are_kept_where_they_are_not_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "hierarchical" in cw.compare(one_sided()).warnings
    with warnings.catch_warnings(), pytest.raises(cw.DroppedUnitsWarning, match="Hierarchical balancing: 4 of 20"):
        warnings.simplefilter("error")
        cw.compare(one_sided())


def test_no_warning_no_entry():
    assert cw.compare(late_entry_study(), ["unadjusted"]).warnings == {}


# --- reading ------------------------------------------------------------------------------------------------------


def made_up(strength, by=FRAME["score"]):
    "Balancing weights that favour nobody, and hierarchical weights that favour controls with large values."
    return by_hand("balancing", favouring(by, 0.0)), by_hand("hierarchical", favouring(by, strength))


@pytest.mark.parametrize("strength, by, more", [(0.5, FRAME["score"], True), (-0.5, FRAME["score"], True),
                                                (0.5, np.arange(len(FRAME)) % 2, False)], ids=["up", "down", "by the way"])
def test_the_change_is_judged_by_its_own_error(strength, by, more):
    weights = made_up(strength, by)
    change, error = difference(*weights)
    assert (abs(change) > 1.96 * error) == more
    reading = comparison(weights).reading()
    assert (": more than chance would. Either clusters differ" in reading) == more
    assert (": no more than chance would, so these data do not show" in reading) != more
    assert f"moves the estimate by {'+' if change > 0 else '-'}" in reading


def test_where_targets_differ_the_change_is_among_the_units_of_both():
    balancing, _ = made_up(0.0)
    narrower = by_hand("hierarchical", favouring(FRAME["score"], 0.5), left_out=range(12))
    c = comparison([balancing, narrower])
    part = cw.Study(FRAME[12:], treat="late", outcome="score", cluster="school", covs=list(study().names))
    again = cw.balancing_weights(part).estimate().estimate
    assert c.change[0] == pytest.approx(again, rel=1e-9)
    assert c.change[1] == pytest.approx(narrower.estimate().estimate - again, rel=1e-9)
    reading = c.reading()
    assert "within clusters instead of across" not in reading
    assert f"Among the 16 units that Hierarchical balancing speaks of, Balancing, no clusters gives {again:.3f}" in reading
    assert "smallest" not in reading
    assert "Hierarchical balancing speaks only of 16 of 20 treated units" in reading


def test_little_success_within_clusters_is_no_success():
    c = comparison(made_up(0.1), l2_local=[0.9, 0.8])
    c.table["local_reduction"] = [3.0, 24.0]
    assert "Within clusters large differences remain, whatever the method (0.800 standard deviations with Hierarchical balancing)" in c.reading()
    assert "smallest" not in c.reading()
    c.table["local_reduction"] = [3.0, 26.0]
    assert "smallest with Hierarchical balancing" in c.reading()


def test_a_change_needs_both_methods():
    _, hierarchical = made_up(0.5)
    assert "chance" not in comparison([by_hand("unadjusted", np.ones(len(FRAME))), hierarchical]).reading()


def test_smallest_needs_two_methods():
    balancing, hierarchical = made_up(0.1)
    assert "smallest" not in comparison([hierarchical]).reading()
    assert "smallest with Hierarchical balancing (0.200)." in comparison([balancing, hierarchical], l2_local=[0.3, 0.2]).reading()
    unadjusted = by_hand("unadjusted", np.ones(len(FRAME)))
    reading = comparison([unadjusted, balancing, hierarchical], l2_local=[0.5, 0.3, 0.2]).reading()
    assert "smallest with Hierarchical balancing (0.200, against 0.500 unadjusted)." in reading


def test_undefined_local_imbalance_is_said():
    assert "Local imbalance is not defined" in comparison(made_up(0.1), l2_local=np.nan).reading()


@pytest.mark.parametrize("smd, named", [(0.11, True), (-0.11, True), (0.09, False), (-0.09, False)])
def test_global_differences_are_named_whatever_their_sign(smd, named):
    c = comparison(made_up(0.1))
    left = pd.DataFrame({"SMD, weighted": [0.0, smd]}, index=["age", "income"])
    c = Comparison(c.study, c.table, c.weights, dict.fromkeys(c.balances, SimpleNamespace(table=left)), {}, 0.95, "ATT")
    assert ("Hierarchical balancing: global differences above 0.1 standard deviations remain in 'income'." in c.reading()) == named
    assert "'age'" not in c.reading()


def test_html_is_escaped():
    c = cw.compare(study(FRAME.rename(columns={"score": "<b>score"}), outcome="<b>score"), ["unadjusted"])
    assert "<b>" not in c._repr_html_()


# --- data ---------------------------------------------------------------------------------------------------------


def test_late_entry_is_what_its_description_says():
    late, star = load_late_entry(), load_star()
    star = star[star[["star1", "math1", "lunch1", "ethnicity", "gender", "schoolid1"]].notna().all(axis=1)]
    star = star[star["birth"].isin(["1979 Q4", "1980 Q1", "1980 Q2", "1980 Q3"])]
    counts = {column: star[column].value_counts() for column in ("gender", "ethnicity", "lunch1", "star1")}
    assert (len(late), late["late"].sum(), late["school"].nunique()) == (5185, 1142, 76)
    assert late["female"].sum() == counts["gender"]["female"]
    assert late["nonwhite"].sum() == len(star) - counts["ethnicity"]["cauc"]
    assert late["free_lunch"].sum() == counts["lunch1"]["free"]
    assert late["small_class"].sum() == counts["star1"]["small"]
    assert late["aide_class"].sum() == counts["star1"]["regular+aide"]
    assert sorted(late["born"].unique()) == [1979.75, 1980.0, 1980.25, 1980.5]
    assert_allclose([late["math"].mean(), late["math"].std()], [0, 1], atol=1e-12)


def test_the_sizes_of_the_shipped_data():
    hsb = load_hsb()
    assert len(load_star()) == 11598
    assert len(hsb) == 7185


# --- agreement ----------------------------------------------------------------------------------------------------


def agreeing(**options):
    c = cw.compare(study(), ["balancing", "hierarchical"], lam=1.0, tolerance="auto")
    return c.weights["balancing"], c.weights["hierarchical"], dict(replicates=30, seed=3, progress=False) | options


@pytest.mark.filterwarnings("ignore::clusterweights.core.ClusterWeightsWarning")
def test_agreement_draws_both_methods_on_the_same_clusters():
    first, second, options = agreeing()
    found = cw.agreement(first, second, **options)
    alone = [w.bootstrap(resample="clusters", **options).draws for w in (first, second)]
    both = found.replicates.draws
    rows = both.index.intersection(alone[0].index).intersection(alone[1].index)
    for column, own in zip((first.label, second.label), alone):
        assert_allclose(both.loc[rows, column], own.loc[rows, "ATT"], rtol=1e-9)
    assert_allclose(found.difference, second.estimate().estimate - first.estimate().estimate, rtol=1e-10)
    assert 0 < found.p_value <= 1 and found.std_error > 0
    same = cw.agreement(first, second, **options | {"workers": 2})
    pd.testing.assert_frame_equal(same.replicates.draws, both)


@pytest.mark.filterwarnings("ignore::clusterweights.core.ClusterWeightsWarning")
def test_what_the_agreement_says():
    first, second, options = agreeing()
    found = cw.agreement(first, second, **options)
    draws = found.replicates.draws.assign(difference=found.difference + np.linspace(-1e-3, 1e-3, len(found.replicates.draws)) * abs(found.difference))
    apart = replace(found, replicates=replace(found.replicates, draws=draws))
    assert apart.p_value == pytest.approx(1 / (1 + len(draws))) and "cannot both be right" in apart.reading()
    wide = replace(found, replicates=replace(found.replicates, draws=draws.assign(difference=np.linspace(-9, 9, len(draws)))))
    assert wide.p_value > 0.5 and "no proof of either assumption" in wide.reading()


def test_agreement_is_for_one_study_and_one_estimand():
    first, second, options = agreeing()
    with pytest.raises(InputError, match="one study, for one estimand"):
        cw.agreement(first, cw.hierarchical_weights(study(), lam=1.0), **options)
    with pytest.raises(InputError, match="Did you mean 'score'|no outcome 'scor'"):
        cw.agreement(first, second, outcome="scor", **options)
    with pytest.raises(InputError, match="agreement takes Weights.* not Study"):
        cw.agreement(first, first.study, **options)


@pytest.mark.filterwarnings("ignore::clusterweights.core.ClusterWeightsWarning")
def test_effects_and_sensitivity_are_told_where_asked(tmp_path):
    c = cw.compare(late_entry_study(), ["unadjusted", "hierarchical"], lam=1.0, by_cluster=True, sensitivity=True)
    text = c.report(tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Effects by cluster", "Sensitivity"):
        assert f">{heading}</h2>" in text
    assert "the effect in each cluster, raw and shrunken" in text and "bounds of the estimate for every factor" in text
    assert c.sensitivities["hierarchical"].sentence() in c.reading()
    assert "effects of clusters vary by a standard deviation" in c.reading()
    plain = cw.compare(late_entry_study(), ["unadjusted"])
    assert not plain.effects and not plain.sensitivities and ">Sensitivity</h2>" not in plain.report(tmp_path / "plain.html").read_text(encoding="utf-8")


def test_what_an_analysis_refuses_is_told():
    c = cw.compare(study(), ["balancing"], estimand="ATO", by_cluster=True, sensitivity=True)
    assert not c.effects and not c.sensitivities
    assert [line.split(":")[0] for line in c.refused] == ["Balancing, no clusters, no effects by cluster", "Balancing, no clusters, no sensitivity"]
    assert all(line in c.reading() for line in c.refused)


def test_more_than_chance_depends_on_the_level():
    c = cw.compare(study(), ["balancing", "hierarchical"], lam=1.0, tolerance="auto", same_clusters=False)
    error = abs(c.change[1]) / 1.8                              # between the quantiles of 90% and of 95%
    for level, words in ((0.95, "no more than chance"), (0.9, "more than chance would. Either")):
        assert words in replace(c, change=(*c.change[:2], error), level=level).reading()


def only_in_one_armed_clusters():
    "A study in which one covariate varies in clusters that lack an arm, and is constant in all others."
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"place": np.repeat(np.arange(40), 20), "x": rng.normal(size=800), "score": rng.normal(size=800)})
    apart = data["place"] >= 34
    data["z"] = np.where(apart, data["place"] >= 37, rng.random(800) < 0.4)
    data["moved"] = (apart & (rng.random(800) < 0.5)).astype(float)
    return Study(data, treat="z", cluster="place", covs=["x", "moved"], outcome="score")


@pytest.mark.filterwarnings("ignore::clusterweights.ClusterWeightsWarning")
def test_the_same_clusters_may_hold_a_constant_covariate():
    study = only_in_one_armed_clusters()
    part = study.restrict(study.cluster < 34)
    plain = Study(pd.DataFrame({"place": part.cluster, "z": part.treat, "x": part.x[:, 0], "score": part.outcome}), treat="z", cluster="place",
                  covs="x", outcome="score")
    again = cw.compare(study, ["balancing", "hierarchical"], estimand="ATE", lam=1.0).table.loc["balancing, same clusters"]
    assert again["units"] == 680
    assert_allclose(again["estimate"], cw.balancing_weights(plain, estimand="ATE").estimate().estimate, atol=1e-9)
    first, second = cw.balancing_weights(study, estimand="ATE"), cw.hierarchical_weights(study, lam=1.0, estimand="ATE")
    assert cw.agreement(first, second, replicates=20, progress=False).units == 680
    assert all(np.isfinite(side).all() for side in framework.treatment_chances(part))


@pytest.mark.parametrize("lacking", ["an arm", "both arms in any cluster"])
def test_no_same_clusters_where_the_part_in_common_is_no_such_study(lacking):
    study = only_in_one_armed_clusters()
    kept = study.treat if lacking == "an arm" else study.treat == (study.cluster < 17)
    every = cw.unadjusted_weights(study)
    fewer = replace(every, reason=np.where(kept, "", "left out").astype(object))
    assert comparing._again_where(study, {"all": every, "fewer": fewer}) == (None, [])


def test_failures_within_an_analysis_are_heard(monkeypatch):
    def analyse(weights, **options):
        warnings.warn(cw.ClusterWeightsWarning("3 of 199 replicates failed"))
        return cw.sensitivity_analysis(weights, replicates=0)
    monkeypatch.setattr(comparing, "sensitivity_analysis", analyse)
    with pytest.warns(cw.ClusterWeightsWarning, match="3 of 199 replicates failed"):
        cw.compare(study(), ["hierarchical"], sensitivity=True)
