"""Metrics of the demo against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dbmtl_fused.demo.metrics import accuracy, delta_p, delta_p_task, mean_absolute_error


def test_accuracy_and_error_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, -1.0], [0.0, 0.1]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 1])).item() == 75
    assert mean_absolute_error(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 2.0])).item() == 2.5


@pytest.mark.parametrize(
    ("value", "baseline", "higher_is_better", "expected"),
    [
        pytest.param(90.0, 80.0, True, 12.5, id="higher accuracy is better"),
        pytest.param(60.0, 80.0, True, -25.0, id="lower accuracy is worse"),
        pytest.param(6.0, 8.0, False, 25.0, id="lower error is better"),
        pytest.param(12.0, 8.0, False, -50.0, id="higher error is worse"),
        pytest.param(8.0, 8.0, False, 0.0, id="no difference"),
    ],
)
def test_sign_of_one_metric(value: float, baseline: float, higher_is_better: bool, expected: float):
    assert delta_p_task([value], [baseline], [higher_is_better]) == pytest.approx(expected)


def test_metrics_are_averaged_within_a_task_and_then_tasks():
    # Segmentation: mIoU 50 -> 55 (+10 %), pixel accuracy 80 -> 76 (-5 %): mean +2.5 %. Depth: error 0.4 -> 0.5 (-25 %).
    values, baseline = [[55.0, 76.0], [0.5]], [[50.0, 80.0], [0.4]]
    higher_is_better = [[True, True], [False]]
    assert delta_p_task(values[0], baseline[0], higher_is_better[0]) == pytest.approx(2.5)
    assert delta_p(values, baseline, higher_is_better) == pytest.approx((2.5 - 25) / 2)


def test_the_baseline_itself_is_zero():
    scores = [[96.0], [0.3, 7.0]]
    assert delta_p(scores, scores, [[True], [False, False]]) == 0


def test_baseline_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"baseline, which must not be 0, got \[0.0\]"):
        delta_p_task([1.0], [0.0], [True])


def test_missing_task_is_refused():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        delta_p([[1.0]], [[1.0], [2.0]], [[True], [True]])
