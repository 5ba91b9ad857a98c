"""Errors and warnings that are expected, certificates that fail for one reason, tables that escape, plots that draw."""

import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from clusterweights.core import (Certificate, DroppedUnitsWarning, EstimationError, InputError, OverlapWarning, Table, counted, decimals,
                                 expect_error, expect_warning, interval_plot, listed, nearest)

LIMITS = {"equality": 1e-9, "bounds": 1e-12, "stationarity": 1e-6, "gap": 1e-8}


def certificate(**residuals):
    return Certificate(**(dict.fromkeys(LIMITS, 0.0) | residuals))


@pytest.mark.parametrize("name", LIMITS)
def test_each_residual_decides_by_its_own_limit(name):
    assert certificate(**{name: LIMITS[name] / 2}).ok
    for sign in (1, -1):
        bad = certificate(**{name: sign * 2 * LIMITS[name]})
        assert not bad.ok
        assert bad.failures == [name]
        assert bad.worst == pytest.approx(2)
        assert f"NOT certified ({name})" in str(bad)


def test_a_residual_that_is_not_a_number_fails():
    bad = certificate(gap=np.nan)
    assert bad.failures == ["gap"]
    assert bad.worst == np.inf


def test_markup_is_escaped_in_title_notes_and_labels():
    html = Table(pd.DataFrame({"<u>": ["<s>"]}, index=["<a>"]), title="<b>", notes=["<i>"])._repr_html_()
    for tag in ("<u>", "<s>", "<a>", "<b>", "<i>"):
        assert tag not in html


def test_a_table_shows_missing_values_as_dashes():
    cells = Table(pd.DataFrame({"a": [0.25, np.nan], "b": [None, "x"]}), formats={"a": ".3f", "b": ".3f"}).cells()
    assert cells["a"].tolist() == ["0.250", "–"]
    assert cells["b"].tolist() == ["–", "x"]


def test_expect_error_checks_the_message_and_the_kind():
    with pytest.raises(AssertionError, match="lacks 'right'"), expect_error(InputError, "right"):
        raise InputError("wrong")
    with pytest.raises(AssertionError, match="no InputError was raised"), expect_error(InputError):
        pass
    with pytest.raises(KeyError), expect_error(InputError):
        raise KeyError("other")


def test_expect_warning_wants_exactly_one():
    with expect_warning(OverlapWarning, "few"):
        warnings.warn(OverlapWarning("few units"))
    with pytest.raises(AssertionError, match="expected one"), expect_warning(OverlapWarning):
        pass
    with pytest.raises(AssertionError, match="expected one"), expect_warning(OverlapWarning, "many"):
        warnings.warn(OverlapWarning("few units"))
    with pytest.raises(AssertionError, match="expected one"), expect_warning(OverlapWarning):
        warnings.warn(DroppedUnitsWarning("lost"))


def test_an_estimation_error_is_an_input_error():
    assert issubclass(EstimationError, InputError)
    assert issubclass(InputError, ValueError)


def test_words_for_messages():
    assert counted(1, "cluster") == "1 cluster"
    assert counted(1200, "unit") == "1,200 units"
    assert listed("abcdefg", most=2) == "'a', 'b' and 5 more"
    assert listed([np.str_("a"), np.int64(3)]) == "'a' and 3"
    assert nearest("Scool", ["school", "pupil"]) == " Did you mean 'school'?"


@pytest.mark.parametrize("size, places", [(0.0123, 4), (0.5, 3), (1234, 0), (-0.0123, 4), (0.0, 3), (np.nan, 3), (1e-30, 12)])
def test_decimals_show_three_digits(size, places):
    assert decimals(size) == places


def test_an_interval_plot_draws_dots_and_bars():
    ax = interval_plot(["a", "b"], [1, 2], [0, 1], [2, 4], shift=0.25, ax=Figure().subplots())
    assert_allclose(ax.lines[0].get_xdata(), [1, 2])
    assert_allclose(ax.lines[0].get_ydata(), [0.25, 1.25])
    assert_allclose(np.array(ax.collections[0].get_segments())[:, :, 0], [[0, 2], [1, 4]])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
