"""The vectors of a mix are found again only if their adapters are unchanged."""

from pathlib import Path

import pytest

from lora_align.adapters.peft_config import CONFIG, WEIGHTS
from lora_align.policy.policy import is_made_of
from lora_align.policy.vectors import Parent, Vector


@pytest.mark.parametrize("changed", [CONFIG, WEIGHTS])
def test_a_changed_file_of_an_adapter_makes_another_vector(changed: str, tmp_path: Path) -> None:
    """A changed lora_alpha scales the adapter, although its weights are the same."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_text("before")
    vector = Vector("helpful", (Parent(tmp_path, 1.0, None),))
    adapters = [parent.lineage() for parent in vector.parents]
    assert is_made_of(vector, adapters)
    (tmp_path / changed).write_text("after")
    assert not is_made_of(vector, adapters)
