"""Datasets on the hub: load a split of a configuration or of a folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_align.errors import NotFetchedError, UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

SEVERAL, NO_SUBSET = (
    "Config name is missing",
    ("BuilderConfig", "find cache for"),
)  # parts of error messages of `datasets`


def load(data: str, split: str, revision: str, subset: str) -> "Dataset":
    """Load a dataset from the hub or from its cache."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return _subset(partial(datasets.load_dataset, split=split), data, revision or None, subset)
    except datasets.exceptions.DatasetNotFoundError as fault:
        if "gated" in str(fault):  # `datasets` does not keep the cause
            page = f"https://huggingface.co/datasets/{data}"
            raise UserError(f"data {data!r} is gated: accept its terms at {page}, then run `hf auth login`") from fault
        raise UserError(f"data {data!r}: {first_line(fault)}; for a private dataset, run `hf auth login`") from fault
    except ConnectionError as fault:
        why = first_line(fault)
        raise NotFetchedError(
            f"data {data!r} is not in the cache and could not be fetched: {why}; "
            f"with a network, run `hf download --repo-type dataset {data}`, or set `data` to a file"
        ) from fault
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as fault:
        why = first_line(fault.__cause__ or fault)
        if SEVERAL in why:
            _, _, names = str(fault).partition("[")
            why = f"it has several subsets, [{names.partition(']')[0]}]; choose one with `subset` in the recipe's table"
        raise UserError(f"data {data!r} (split {split!r}) could not be read: {why}") from fault


def _subset(fetch: Callable[..., "Dataset"], data: str, revision: str | None, name: str) -> "Dataset":
    """Load a dataset's configuration `name`, or else its folder `name`; "" loads the default configuration."""
    try:
        return fetch(data, name=name or None, revision=revision)
    except (ValueError, ConnectionError) as fault:
        unnamed = isinstance(fault, ConnectionError) or any(words in str(fault) for words in NO_SUBSET)
        if not name or not unnamed:
            raise
        folder = _folder(data, revision, name)
        if not folder and isinstance(fault, ConnectionError):
            raise
        if not folder:
            raise UserError(f"data {data!r} has no subset and no folder {name!r}: {first_line(fault)}") from fault
    return fetch(str(folder))


def _folder(data: str, revision: str | None, name: str) -> Path | None:
    """Fetch one folder of a dataset, or return it from the cache; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns=f"{name}/*")
    except LocalEntryNotFoundError:
        return None
    folder = Path(root, name)
    return folder if folder.is_dir() and ".." not in folder.parts else None
