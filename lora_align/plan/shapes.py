"""The shapes of the built-in recipes' bases, for a plan where neither the cache nor the hub has their files.

A folder of `shapes/` holds as much of a base's published configuration as its size follows from.
"""

from pathlib import Path

from transformers import AutoConfig

from lora_align import recipe
from lora_align.model import base as bases
from lora_align.model.base import Base

SHAPES = Path(__file__).parent / "shapes"
HUB_SECONDS = 3.0  # until a hub that does not answer counts as out of reach


def find(base: recipe.Base, *, outline: bool) -> Base:
    """Locate a base; where its files cannot be had, an outline is made of the shipped shape, if there is one."""
    folder = SHAPES / base.model.replace("/", "--")
    shipped = outline and folder.is_dir() and not Path(base.model).is_dir()
    if not shipped or _in_cache(base) or _hub_answers():
        return bases.find(base, outline=outline)
    positions = AutoConfig.from_pretrained(folder).max_position_embeddings
    tokenizer = bases.find(recipe.Base("demo")).chat  # stands in: rows are assumed where the base's own is not there
    return Base(folder, base, "", tokenizer, positions)


def is_shipped(base: Base) -> bool:
    """Whether no more is known of a base than its shape."""
    return base.folder.parent == SHAPES


def _in_cache(base: recipe.Base) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(base.model, "config.json", revision=base.revision or None), str)


def _hub_answers() -> bool:
    from httpx2 import HTTPError
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except (HTTPError, ConnectionError):  # of a network that is not there, and of HF_HUB_OFFLINE
        return False
    return True
