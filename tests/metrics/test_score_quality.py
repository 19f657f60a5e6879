"""Metrics of scores against their definitions."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_align.metrics import score_quality

grades = st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), min_size=3, max_size=40)


@given(grades)
def test_rank_correlation_equals_that_of_pandas(pairs: list[tuple[int, int]]) -> None:
    table = pd.DataFrame(pairs, dtype=float)
    ours = score_quality.rank_correlations(torch.tensor(pairs).double())
    theirs = table.corr(method="spearman")
    if table.nunique().min() > 1:
        assert float(ours[0, 1]) == pytest.approx(theirs[0][1], abs=1e-9)
    else:
        assert math.isnan(float(ours[0, 1]))


def test_rank_correlation_ignores_missing_values() -> None:
    columns = torch.tensor([[1.0, 1.0], [2.0, 2.0], [math.nan, -9.0], [3.0, 3.0]])
    assert float(score_quality.rank_correlations(columns)[0, 1]) == pytest.approx(1.0)


@given(grades)
def test_concordance_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    scores, truth = torch.tensor(pairs).double().T
    wins = [
        1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        for i in range(len(pairs))
        for j in range(len(pairs))
        if truth[i] > truth[j]
    ]
    share = score_quality.concordance(scores, truth)
    assert math.isnan(share) if not wins else share == pytest.approx(sum(wins) / len(wins))


def test_calibration_error_is_the_mean_offset() -> None:
    seen = torch.arange(100).double()
    assert score_quality.calibration_error(score_quality.calibration(seen, seen)) == pytest.approx(0)
    assert score_quality.calibration_error(score_quality.calibration(seen + 7, seen)) == pytest.approx(7)
    assert len(score_quality.calibration(seen[:3], seen[:3])) == 3
