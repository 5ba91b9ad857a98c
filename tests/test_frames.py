"""The same data in any frame library give the same weights, to the last bit."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import clusterweights as cw


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(3)
    n = 400
    data = pd.DataFrame({
        "school": rng.choice(["oak", "elm", "ash", "fir"], n), "late": rng.choice(["yes", "no"], n, p=[0.3, 0.7]),
        "age": rng.normal(size=n), "lunch": rng.choice(["free", "paid", "reduced"], n), "twin": rng.uniform(size=n) < 0.4,
        "rooms": rng.integers(1, 6, n), "people": rng.integers(1, 9, n), "score": rng.normal(size=n)})
    data.loc[rng.choice(n, 20, replace=False), "age"] = np.nan
    data.loc[rng.choice(n, 20, replace=False), "lunch"] = None
    return data


OTHERS = {
    "polars": pl.from_pandas,
    "polars with categories": lambda d: pl.from_pandas(d).with_columns(pl.col("lunch", "school").cast(pl.Categorical)),
    "pyarrow": lambda d: pa.Table.from_pandas(d, preserve_index=False),
    "pandas with categories": lambda d: d.astype({"lunch": "category", "school": "category"}),
    "pandas with nullable types": lambda d: d.convert_dtypes(),
    "pandas with pyarrow types": lambda d: d.convert_dtypes(dtype_backend="pyarrow"),
}


@pytest.mark.parametrize("library", OTHERS)
@pytest.mark.parametrize("door", ["columns", "formula"])
def test_same_weights_to_the_last_bit(frame, library, door):
    def weights(data):
        options = dict(outcome="score", treated="yes", sampling_weights="people", missing="indicator")
        if door == "columns":
            study = cw.Study(data, treat="late", cluster="school", covs=["age", "lunch", "twin", "rooms"], **options)
        else:
            study = cw.Study.from_formula("late ~ age + lunch + twin + rooms + (1 | school)", data, **options)
        return study.names, cw.hierarchical_weights(study, estimand="ATE").weights

    names, expected = weights(frame)
    same_names, same = weights(OTHERS[library](frame))
    assert same_names == names
    np.testing.assert_array_equal(same, expected)
