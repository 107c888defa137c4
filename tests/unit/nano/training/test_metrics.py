import pytest

from serving.nano.training.metrics import character_error_rate, edit_distance, mean_error_rate


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distance(left: str, right: str, distance: int) -> None:
    assert edit_distance(left, right) == distance == edit_distance(right, left)


def test_error_rates() -> None:
    assert character_error_rate("abd", "abc") == pytest.approx(1 / 3)
    assert mean_error_rate(["a", "x"], ["a", "y"]) == 0.5
