"""Shapes of the built-in recipes' bases, for a plan when neither the cache nor the hub provides their files.

Each folder in `shapes/` holds the part of a base's published configuration that determines its size.
"""

from contextlib import suppress
from pathlib import Path

from transformers import AutoConfig

from lora_align import recipe
from lora_align.errors import NotFetchedError
from lora_align.model import base as bases
from lora_align.model.base import Base

SHAPES = Path(__file__).parent / "shapes"
HUB_SECONDS = 3.0  # timeout after which the hub counts as unreachable


def find(base: recipe.Base, *, outline: bool) -> Base:
    """Locate a base. With `outline`, fall back to a shipped shape if the base's files are not available."""
    folder = SHAPES / base.model.replace("/", "--")
    shipped = outline and folder.is_dir() and not Path(base.model).is_dir()
    if not shipped:
        return bases.find(base, outline=outline)
    if _in_cache(base) or _hub_answers():
        with suppress(NotFetchedError):  # a gated base, or a proxy that answers in the hub's place
            return bases.find(base, outline=outline)
    positions = AutoConfig.from_pretrained(folder).max_position_embeddings
    tokenizer = bases.find(recipe.Base("demo")).chat  # a placeholder: rows are assumed, not tokenised
    return Base(folder, base, "", tokenizer, positions)


def is_shipped(base: Base) -> bool:
    """Return whether only the shipped shape of a base is available."""
    return base.folder.parent == SHAPES


def _in_cache(base: recipe.Base) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(base.model, "config.json", revision=base.revision or None), str)


def _hub_answers() -> bool:
    from httpx2 import HTTPError
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except (HTTPError, ConnectionError):  # no network, or HF_HUB_OFFLINE
        return False
    return True
