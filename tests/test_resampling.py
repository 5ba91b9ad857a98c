"""Studies drawn from a study, the bootstrap on them, and the wild cluster test."""

import pickle
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from helpers import pupils, schools
from numpy.testing import assert_allclose, assert_array_equal

from clusterweights import (ClusterWeightsWarning, DroppedUnitsWarning, EstimationError, InfeasibleError, InputError, OverlapWarning, Study,
                            balancing_weights, compare, hierarchical_weights, unadjusted_weights)
from clusterweights.core import seeded_map
from clusterweights.resampling import Bootstrap, bootstrap, wild_cluster_test
from clusterweights.weights import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:A single unit carries")
ROLES = {"treat": "late", "cluster": "school", "covs": ["age", "income"], "outcome": "score"}
DATA = schools().assign(people=1 + np.arange(60) % 4 + np.arange(60) // 12)
quiet = partial(bootstrap, progress=False)


def study(data=DATA, **changes):
    return Study(data, **(ROLES | changes))


def mean(s):
    return np.average(s.outcome, weights=s.sampling_weights)


# --- drawn studies ------------------------------------------------------------------------------------------------


def assert_same(one, other):
    for name in ("treat", "x", "starts", "cluster", "n_treated", "n_controls"):
        assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("sampling_weights", "weight_scale"):
        assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-13)
    assert one.outcomes.keys() == other.outcomes.keys()
    for name in one.outcomes:
        assert_array_equal(one.outcomes[name], other.outcomes[name])
    for name in ("n", "n_rows", "n_clusters", "level", "constant_within", "names", "terms", "columns", "arm_values"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("clusters", [[0, 1, 2, 3, 4], [4, 4, 1], [2, 0, 2, 2, 3, 1, 0]])
@pytest.mark.parametrize("kind", ["plain", "weighted", "survey"])
def test_drawn_clusters_are_what_their_rows_would_have_given(clusters, kind):
    data = DATA.sample(frac=1, random_state=3)
    if kind == "survey":
        data["score"] = data["score"].where(data["late"] == 0)

        def make(frame):
            return Study.survey(frame, outcome="score", cluster="school", covs=["age", "income"], sampling_weights="people")
    else:
        make = partial(study, sampling_weights="people" if kind == "weighted" else None)
    by_hand = make(pd.concat([data[data["school"] == g].assign(school=k) for k, g in enumerate(clusters)]))
    drawn = make(data).resample(np.array(clusters))
    assert_same(drawn, by_hand)
    assert len(set(drawn.labels)) == len(clusters) and [label[0] for label in drawn.labels] == clusters
    if kind != "survey":
        weights = [hierarchical_weights(s, lam=1.0, tolerance="auto") for s in (drawn, by_hand)]
        assert_allclose(weights[0].in_order, weights[1].in_order, atol=1e-9)
        assert_allclose(weights[0].estimate().std_error, weights[1].estimate().std_error, rtol=1e-8)


def test_every_method_and_report_takes_a_drawn_study():
    drawn = [study().resample(np.array([0, 0, 3, 2, 4])), study().reweight(np.array([0.1, 2, 1, 1, 3])),
             study().resample_units(np.repeat(np.arange(0, 60, 12), 12) + np.random.default_rng(0).integers(12, size=60))]
    for s in drawn:
        assert f"{s.n} units" in repr(s) and "60" in str(s.describe())
        for method in (m for m in METHODS.values() if "unit" in m.levels):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ClusterWeightsWarning)
                w = method.function(s)
            assert np.isfinite(w.estimate().std_error) and len(w.balance().table) == 2
            assert len(w.to_frame()) == len(w.weights) == s.n
            assert_array_equal(s.from_rows(w.weights), w.in_order)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClusterWeightsWarning)
            assert len(compare(s, ["unadjusted", "hierarchical"]).table) == 2
        again = pickle.loads(pickle.dumps(s))
        assert_same(again, s)
        assert not again.x.flags.writeable and not s.starts.flags.writeable
        with pytest.raises(AttributeError, match="does not change"):
            s.n = 3


def test_the_study_drawn_from_stays_as_it_was():
    s = study(sampling_weights="people")
    before = {name: np.copy(getattr(s, name)) for name in ("x", "treat", "starts", "sampling_weights", "drawn")}
    s.resample(np.array([1, 1, 2])), s.reweight(np.arange(1.0, 6)), s.resample_units(np.arange(60))
    for name, value in before.items():
        assert_array_equal(getattr(s, name), value)


def test_drawn_points_into_the_first_study():
    s = study()
    twice = s.resample(np.array([3, 1, 3])).resample(np.array([2, 1]))
    assert_array_equal(twice.outcome, s.outcome[twice.drawn])
    part = s.restrict(s.cluster >= 2)
    assert_array_equal(part.resample(np.array([2, 2, 0])).outcome, s.outcome[part.resample(np.array([2, 2, 0])).drawn])


def test_level_and_constant_columns_are_found_anew():
    data = pd.DataFrame({"school": list("aabbcc"), "late": [1, 1, 0, 0, 1, 0], "age": [1.0, 1, 2, 2, 4, 3]})
    s = Study(data, treat="late", cluster="school", covs="age")
    drawn = s.resample(np.array([0, 1, 1]))
    assert (s.level, drawn.level, s.constant_within, drawn.constant_within) == ("unit", "cluster", (), ("age",))


@pytest.mark.parametrize("call, message", [
    (lambda s: s.resample(np.array([0])), "at least two"),
    (lambda s: s.resample(np.array([0.0, 1.0])), "whole numbers"),
    (lambda s: s.resample(np.array([0, 5])), "from 0 to 4"),
    (lambda s: s.resample(np.array([-1, 2])), "from 0 to 4"),
    (lambda s: s.resample(np.array([True, False])), "whole numbers"),
    (lambda s: s.resample(np.array([], dtype=int)), "whole numbers"),
    (lambda s: s.resample_units(np.arange(59)), "one position for each unit"),
    (lambda s: s.resample_units(np.roll(np.arange(60), 12)), "in the same cluster"),
    (lambda s: s.reweight(np.ones(4)), "5 positive numbers"),
    (lambda s: s.reweight(np.array([1, 1, 1, 1, np.nan])), "5 positive numbers"),
])
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(study())


# --- bootstrap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["clusters", "units", "fractional"])
def test_replicates_do_not_depend_on_the_number_of_processes(way):
    w = hierarchical_weights(study(), lam=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClusterWeightsWarning)
        one, two = (w.bootstrap(resample=way, replicates=40, seed=3, workers=k, progress=False) for k in (1, 2))
    pd.testing.assert_frame_equal(one.draws, two.draws)
    assert (one.failed, one.reasons, one.warned) == (two.failed, two.reasons, two.warned)


def test_a_bootstrap_does_not_repeat_what_was_said_of_the_weights():
    first = DATA["school"] == DATA["school"].iloc[0]
    with pytest.warns(DroppedUnitsWarning):
        w = hierarchical_weights(study(DATA.assign(late=DATA["late"].mask(first, 1))), lam=0.7, tolerance=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DroppedUnitsWarning)
        assert w.bootstrap(replicates=20, progress=False).warned["DroppedUnitsWarning"] > 0


def test_each_replicate_is_the_recipe_on_a_drawn_study():
    w = hierarchical_weights(study(sampling_weights="people"), lam=0.7, tolerance=0.5)
    found = w.bootstrap(replicates=5, seed=11, progress=False)
    for number, rng in enumerate(np.random.default_rng(11).spawn(5)):
        again = hierarchical_weights(w.study.resample(rng.integers(5, size=5)), lam=0.7, tolerance=0.5)
        assert_allclose(found.draws.loc[number, "ATT"], again.estimate().estimate, rtol=1e-10)
    assert_allclose(found.estimate, w.estimate().estimate, rtol=1e-12)


def test_lam_stays_at_its_value():
    w = hierarchical_weights(study())
    lam, seen = w.params["lam"], []
    quiet(w.study, lambda s: seen.append(w.refit(s).params["lam"]) or 0.0, replicates=3)
    assert seen == [lam] * 4


@pytest.mark.parametrize("kind", ["treated and untreated", "mean", "total"])
def test_an_outcome_in_row_order_is_carried_along(kind):
    data = DATA.sample(frac=1, random_state=5)
    if kind == "treated and untreated":
        s, options = study(data), {}
    else:
        data["score"] = data["score"].where(data["late"] == 0)
        s, options = Study.survey(data, outcome="score", cluster="school", covs="age", sampling_weights="people"), {"estimand": kind}
    w = unadjusted_weights(s, **options)
    named, given = (w.bootstrap(y, replicates=30, progress=False) for y in ("score", 3 - data["score"].to_numpy()))
    assert_allclose(given.estimate, w.estimate(3 - data["score"].to_numpy()).estimate)
    if kind != "total":
        assert_allclose(given.draws, (0 if kind != "mean" else 3) - named.draws)
    with pytest.raises(InputError, match="no outcome 'scor'"):
        w.bootstrap("scor")
    with pytest.raises(InputError, match="another index"):
        w.bootstrap(data["score"].sort_values())


def test_totals_grow_with_what_is_drawn():
    data = DATA.assign(score=DATA["score"].where(DATA["late"] == 0))
    s = Study.survey(data, outcome="score", cluster="school", covs="age", sampling_weights="people")
    drawn = s.resample(np.array([0, 0, 4]))
    people = data["people"].to_numpy()[s.drawn[drawn.drawn]]
    expected = np.average(drawn.outcome[drawn.treat], weights=people[drawn.treat]) * people.sum()
    assert_allclose(unadjusted_weights(drawn, estimand="total").estimate().estimate, expected)


def test_a_target_in_clusters_is_not_drawn_along():
    target = DATA.assign(age=DATA["age"] + 0.01)
    w = hierarchical_weights(study(), lam=1.0, estimand="ATE", target=target)
    with pytest.raises(InputError, match="not drawn with those of the study"):
        w.bootstrap()
    assert w.bootstrap(resample="fractional", replicates=5, progress=False).replicates == 5
    everywhere = balancing_weights(study(), estimand="ATE", target=target)
    assert everywhere.bootstrap(replicates=5, progress=False).replicates == 5


def test_formulas_for_means():
    data = schools(n_schools=40, size=6, seed=2)
    s = study(data)
    means = data.groupby("school")["score"].mean()
    between = ((means - means.mean()) ** 2).sum()
    within = ((data["score"] - data["school"].map(means)) ** 2).sum() / len(data)**2
    for way, variance in {"clusters": between / 40**2, "fractional": between / (40 * 41), "units": within}.items():
        error = quiet(s, mean, resample=way, replicates=2500).std_error
        assert_allclose(error, np.sqrt(variance), rtol=4 / np.sqrt(5000))


def test_units_keep_to_their_cluster_and_sizes_stay():
    seen = []
    quiet(study(), lambda s: seen.append((s.starts, s.cluster, s.drawn)) or 0.0, resample="units", replicates=10)
    for starts, cluster, drawn in seen:
        assert_array_equal(starts, study().starts)
        assert_array_equal(study().cluster[drawn], cluster)
    assert any(len(set(drawn)) < 60 for _, _, drawn in seen)


def test_several_numbers():
    found = quiet(study(), lambda s: {"mean": mean(s), "max": s.outcome.max()}, replicates=60)
    assert found.tidy()["term"].tolist() == ["mean", "max"]
    low, high = found.conf_int(0.9)
    assert (low <= high).all() and list(found.std_error.index) == ["mean", "max"]
    basic = found.conf_int(0.9, "basic")
    assert_allclose(basic[0], 2 * found.estimate - high)
    assert list(quiet(study(), lambda s: np.array([1.0, 2.0]), replicates=3).observed) == [1, 2]
    assert "mean" in found._repr_html_() and "mean" in repr(found)
    again = pickle.loads(pickle.dumps(found))
    pd.testing.assert_frame_equal(again.tidy(), found.tidy())


def test_quantiles_are_order_statistics():
    draws = pd.DataFrame({"a": np.random.default_rng(0).permutation(np.arange(1.0, 1000))})
    found = Bootstrap(pd.Series([500.0], ["a"]), draws, 999, "clusters")
    for level, kind, ends in ((0.95, "percentile", (25, 975)), (0.95, "basic", (25, 975)), (0.998, "percentile", (1, 999))):
        assert_allclose(found.conf_int(level, kind), ends, rtol=1e-12)
    for level in (0.999, 1.5, 0, "95"):
        with pytest.raises(InputError):
            found.conf_int(level)


def test_failures_are_counted_by_reason():
    def statistic(s):
        if isinstance(s.labels[0], tuple):
            first = s.labels[0][0]
            if first == 0:
                raise InfeasibleError(f"No weights for {s.n} units and 'age'. Details differ: {s.outcome[0]}.")
            if first == 1:
                raise EstimationError("An arm is empty.")
            if first == 2:
                warnings.warn(OverlapWarning("few units"))
        return np.nan if isinstance(s.labels[0], tuple) and s.labels[1][0] == 4 and s.labels[0][0] == 3 else 1.0

    with pytest.warns(ClusterWeightsWarning, match="of 300 replicates failed, most often") as heard:
        found = quiet(study(), statistic, replicates=300)
    assert len(heard) == 1
    assert found.failed == sum(found.reasons.values()) == 300 - len(found.draws)
    assert set(found.reasons) == {"InfeasibleError: No weights for … units and …", "EstimationError: An arm is empty",
                                  "EstimationError: The statistic is not finite"}
    firsts = [rng.integers(5, size=5) for rng in np.random.default_rng(0).spawn(300)]
    assert found.reasons["EstimationError: An arm is empty"] == sum(f[0] == 1 for f in firsts)
    assert found.warned == {"OverlapWarning": sum(f[0] == 2 for f in firsts)}
    assert str(found.failed) in repr(found) and "OverlapWarning" in repr(found)


def test_too_few_successes_are_an_error_and_bugs_are_not_caught():
    def mostly(s):
        if isinstance(s.labels[0], tuple) and s.labels[0][0] < 4:
            raise InputError("refused")
        return 0.0

    with pytest.raises(EstimationError, match="of 50 replicates failed.*refused.*fractional"):
        quiet(study(), mostly, replicates=50)
    with pytest.raises(KeyError):
        quiet(study(), lambda s: {}[s.labels[0]] if isinstance(s.labels[0], tuple) else 1.0, replicates=5)
    with pytest.raises(EstimationError, match="not finite on the study itself"):
        quiet(study(), lambda s: np.inf, replicates=5)
    with pytest.raises(InfeasibleError):
        quiet(study(), lambda s: (_ for _ in ()).throw(InfeasibleError("none")), replicates=5)


def test_changing_shapes_are_a_failure():
    with pytest.raises(EstimationError, match="other numbers than on the study itself"):
        quiet(study(), lambda s: dict.fromkeys(map(str, s.labels), 1.0), replicates=4)


@pytest.mark.parametrize("workers", [1, 2])
def test_foreign_warnings_are_handed_on_once(workers):
    def statistic(s):
        warnings.warn("mind the gap", RuntimeWarning)
        return 0.0

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = quiet(study(), statistic, replicates=20, workers=workers)
    gaps = [w for w in heard if "mind the gap" in str(w.message)]
    assert 1 <= len(gaps) <= 2 and found.warned == {}            # on the study itself, and for all replicates


def test_own_warnings_do_not_get_out_even_as_errors():
    def statistic(s):
        if isinstance(s.labels[0], tuple):
            warnings.warn(OverlapWarning("few units"))
        return 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert quiet(study(), statistic, replicates=7).warned == {"OverlapWarning": 7}


@pytest.mark.parametrize("options, message", [
    ({"resample": "rows"}, "Unknown resample"), ({"replicates": 1}, "at least 2"), ({"replicates": 9.5}, "whole number"), ({"replicates": True}, "whole number"),
])
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        quiet(study(), mean, **options)
    with pytest.raises(InputError, match="takes a Study"):
        quiet(DATA, mean)


def test_a_bar_is_shown_only_if_asked(capsys):
    bootstrap(study(), mean, replicates=3)
    assert "replicates" in capsys.readouterr().err
    quiet(study(), mean, replicates=3)
    assert capsys.readouterr().err == ""
    seeded_map(lambda number, rng: number, 3, 0, progress=False)
    assert capsys.readouterr().err == ""


def test_plot():
    import matplotlib.pyplot as plt
    found = quiet(study(), lambda s: {"a": mean(s), "cost in $": -mean(s)}, replicates=60)
    for term, n_lines in ((None, 3), ("cost in $", 3)):
        fig, ax = plt.subplots()
        assert found.plot(term, ax=ax) is ax and len(ax.lines) == n_lines
        assert sum(bar.get_height() for bar in ax.patches) == 60
        fig.canvas.draw()
        plt.close(fig)
    assert_allclose(quiet(study(), mean, replicates=10).plot().lines[0].get_xdata()[0], mean(study()))
    with pytest.raises(InputError, match="no number 'b'"):
        found.plot("b")
    plt.close("all")


# --- wild cluster test --------------------------------------------------------------------------------------------


def regression(y, treat, weights, cluster):
    model = sm.WLS(y, sm.add_constant(treat.astype(float)), weights=weights)
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": cluster, "use_correction": False})
    groups = len(np.unique(cluster))
    return fit.params[1], fit.bse[1] * np.sqrt(groups / (groups - 1))


def brute_force(y, treat, weights, cluster, null, points):
    groups, codes = np.unique(cluster, return_inverse=True)
    tau, error = regression(y, treat, weights, cluster)
    centre = np.average(y - null * treat, weights=weights)
    residual, extreme = y - null * treat - centre, 0
    for v in np.stack(np.meshgrid(*[points] * len(groups)), axis=-1).reshape(-1, len(groups)):
        star, error_star = regression(centre + null * treat + v[codes] * residual, treat, weights, cluster)
        extreme += abs((star - null) / error_star) >= abs((tau - null) / error) * (1 - 1e-9)
    return extreme / len(points) ** len(groups)


def made(seed, clusters=6, whole=False):
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(clusters), rng.integers(3, 9, size=clusters))
    n = len(cluster)
    treat = cluster % 2 == 0 if whole else rng.random(n) < 0.5
    return rng.normal(size=clusters)[cluster] + rng.normal(size=n), treat, rng.exponential(size=n), np.searchsorted(cluster, np.arange(clusters + 1)), cluster


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_p_values_equal_brute_force(seed, whole):
    y, treat, w, starts, cluster = made(seed, whole=whole)
    for null in (0.0, 1.3):
        test = wild_cluster_test(y, treat, w, starts, null=null, kind="rademacher")
        assert abs(test.p_value - brute_force(y, treat, w, cluster, null, [-1, 1])) <= 1e-12
        assert_allclose([test.estimate, test.std_error], regression(y, treat, w, cluster), rtol=1e-9)
        assert (test.enumerated, test.draws_used, test.smallest_p) == (True, 64, 1 / 32)


@pytest.mark.parametrize("whole", [False, True])
def test_webb_equals_brute_force(whole):
    y, treat, w, starts, cluster = made(2, clusters=4, whole=whole)
    points = np.sqrt([0.5, 1, 1.5])
    test = wild_cluster_test(y, treat, w, starts, null=0.4)
    assert (test.kind, test.enumerated, test.draws_used, test.smallest_p) == ("webb", True, 6**4, 6.0**-3)
    assert abs(test.p_value - brute_force(y, treat, w, cluster, 0.4, [*points, *-points])) <= 1e-12


def test_units_without_weight_and_scales_play_no_part():
    y, treat, w, starts, cluster = made(3)
    w[cluster == 4], w[::5] = 0.0, 0.0
    used = w > 0
    fewer = np.unique(cluster[used], return_inverse=True)[1]
    one = wild_cluster_test(np.where(used, y, np.nan), treat, w, starts, kind="rademacher")
    two = wild_cluster_test(y[used], treat[used], w[used], np.searchsorted(fewer, np.arange(6)), kind="rademacher")
    assert (one.clusters, one.draws_used) == (5, 32) == (two.clusters, two.draws_used)
    assert one.p_value == two.p_value and one.conf_int(0.9) == two.conf_int(0.9)
    scaled = wild_cluster_test(np.where(used, 1e3 * y + 1e5, 0), treat, 7 * w, starts, kind="rademacher")
    assert scaled.p_value == one.p_value
    assert_allclose(scaled.conf_int(0.9), np.array(one.conf_int(0.9)) * 1e3, rtol=1e-6)


def test_drawn_vectors_come_close_to_all_of_them():
    y, treat, w, starts, _ = made(4, clusters=12)
    exact = wild_cluster_test(y, treat, w, starts, null=0.3)
    drawn = wild_cluster_test(y, treat, w, starts, null=0.3, draws=4000)
    assert exact.enumerated and exact.draws_used == 4096 and not drawn.enumerated and drawn.smallest_p == 1 / 4001
    assert abs(exact.p_value - drawn.p_value) < 4 * np.sqrt(exact.p_value * (1 - exact.p_value) / 4000) + 1 / 4000
    assert drawn.p_value == wild_cluster_test(y, treat, w, starts, null=0.3, draws=4000).p_value
    assert drawn.p_value != wild_cluster_test(y, treat, w, starts, null=0.3, draws=4000, seed=1).p_value


@pytest.mark.parametrize("kind", ["rademacher", "webb"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_interval_holds_what_is_not_rejected(kind, whole):
    y, treat, w, starts, _ = made(5, clusters=9, whole=whole)
    test = wild_cluster_test(y, treat, w, starts, kind=kind)
    low, high = test.conf_int(0.9)
    assert low < test.estimate < high
    for end, inwards in ((low, 1), (high, -1)):
        inside, outside = (wild_cluster_test(y, treat, w, starts, kind=kind, null=end + inwards * d * test.std_error).p_value for d in (1e-6, -1e-6))
        assert outside <= 0.1 < inside
    wide = test.conf_int(0.98)
    assert wide[0] <= low and wide[1] >= high


def test_few_clusters_have_no_narrow_interval():
    y, treat, w, starts, _ = made(6, clusters=5)
    test = wild_cluster_test(y, treat, w, starts, kind="rademacher")
    assert test.smallest_p == 1 / 16 and test.conf_int() == (-np.inf, np.inf)
    assert np.isfinite(test.conf_int(0.8)).all()
    assert "inf" in repr(test) and "0.062" in test._repr_html_()


def test_auto_takes_signs_from_ten_clusters_on():
    assert [wild_cluster_test(*made(7, clusters=k)[:4], draws=99).kind for k in (9, 10)] == ["webb", "rademacher"]


def test_many_clusters_are_drawn_in_blocks():
    y, treat, w, starts, _ = made(8, clusters=300)
    test = wild_cluster_test(y, treat, w, starts)
    assert test.draws_used == 9999 and 0 < test.p_value < 1
    normal = abs(test.statistic)
    assert_allclose(test.conf_int(), test.estimate + np.array([-1.96, 1.96]) * test.std_error, atol=0.15 * test.std_error)
    assert pickle.loads(pickle.dumps(test)).p_value == test.p_value and normal == abs((test.estimate - 0) / test.std_error)


@pytest.mark.parametrize("change, kind, message", [
    ({"y": np.ones(3)}, InputError, "have the shapes"), ({"starts": np.array([0, 5])}, InputError, "must rise from 0"),
    ({"weights": -1}, InputError, "not negative"), ({"weights": np.nan}, InputError, "not negative"), ({"treat": 2}, InputError, "treat must be True"),
    ({"kind": "mammen"}, InputError, "Unknown kind"), ({"draws": 0}, InputError, "at least 1"), ({"null": np.inf}, InputError, "finite number"),
    ({"y": np.nan}, InputError, "missing or infinite"), ({"y": 1.0}, EstimationError, "does not vary"), ({"treat": 1}, EstimationError, "other units.*0 clusters"),
])
def test_wild_refusals(change, kind, message):
    y, treat, w, starts, _ = made(9)
    arguments = {"y": y, "treat": treat, "weights": w, "starts": starts}
    change = {k: np.full(len(y), v) if k in ("y", "treat", "weights") and np.ndim(v) == 0 else v for k, v in change.items()}
    with pytest.raises(kind, match=message):
        wild_cluster_test(**(arguments | change))


@pytest.mark.parametrize("sides", [1, 0])
def test_one_cluster_on_a_side_is_refused(sides):
    y, _, w, starts, cluster = made(10)
    with pytest.raises(EstimationError, match="lie in 1 cluster"):
        wild_cluster_test(y, (cluster == 2) == sides, w, starts)


def test_level_and_pupils_are_read_with_gaps():
    "The small study with clusters that lack an arm goes through every way of drawing."
    w = unadjusted_weights(pupils())
    for way in ("clusters", "units", "fractional"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClusterWeightsWarning)
            found = w.bootstrap(resample=way, replicates=100, progress=False)
        assert len(found.draws) + found.failed == 100 and found.std_error > 0
