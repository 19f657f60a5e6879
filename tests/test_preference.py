import pytest

from lora_align.errors import UserError
from lora_align.preference import parse_weights


def test_weights_are_read_in_order() -> None:
    assert parse_weights(" helpful=1, harmless = -0.5,a/b=1e-2 ") == {"helpful": 1.0, "harmless": -0.5, "a/b": 0.01}


@pytest.mark.parametrize(
    "text", ["", ",", "helpful", "helpful=", "=1", "helpful=nan", "helpful=1e999", "helpful=-inf", "a=1,a=2", "a=one"]
)
def test_weights_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="weights:"):
        parse_weights(text)
