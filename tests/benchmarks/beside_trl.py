"""Give TRL's trainer the same token ids as ours, so that the comparisons differ in training alone."""

from collections.abc import Sequence
from typing import Any

from lora_align.model.tokenise import TokenPair


def tokenised() -> Any:
    """Return a subclass of TRL's trainer for rows of token ids."""
    from datasets import Dataset
    from trl import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    return Tokenised


def columns(rows: Sequence[TokenPair]) -> list[dict[str, list[int]]]:
    """Return the rows under TRL's column names."""
    return [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in rows]
