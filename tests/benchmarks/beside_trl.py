"""What comparisons with TRL's trainer share: the same token ids on both sides, so that nothing but training differs."""

from collections.abc import Sequence
from typing import Any

from lora_align.model.tokenise import TokenPair


def tokenised() -> Any:
    """TRL's trainer for rows that are token ids."""
    from datasets import Dataset
    from trl import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    return Tokenised


def columns(rows: Sequence[TokenPair]) -> list[dict[str, list[int]]]:
    """As TRL names them."""
    return [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in rows]
