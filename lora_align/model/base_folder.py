"""The folder of a base on this disk, its weight files and their fingerprint. Does not import torch."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from lora_align import store
from lora_align.errors import UserError, first_line
from lora_align.plugins import Registry

INDEX = "model.safetensors.index.json"
GGUF = ".gguf"  # suffix of base.model

BASES: Registry[Callable[[], Path]] = Registry("bases")


def local_folder(model: str) -> Path | None:
    """Return the folder of a model: a local folder or that of a registered base. Return None for other names."""
    path = Path(model).expanduser()
    if path.is_dir() and model not in BASES:
        return path
    registered = BASES.get(model)
    return registered() if registered else None


def hub_id(model: str) -> str:
    """Return the OWNER/NAME of a base.model on the hub: an id, or a GGUF file in a repository. Return "" for a path."""
    owner, _, rest = model.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name or owner.startswith((".", "~")) or Path(model).exists():
        return ""
    return f"{owner}/{name}" if not file or file.endswith(GGUF) else ""


def weight_files(folder: Path) -> list[Path]:
    """Return the base's safetensors files: the single file, or every shard that its index names."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError, TypeError) as fault:
        raise UserError(f"{index}: damaged ({first_line(fault)}); fetch the base again") from fault
    shards = sorted({folder / name for name in named})
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{folder}: missing: {', '.join(missing)}; fetch the base again")
    return shards


def fingerprint(files: Iterable[Path]) -> str:
    """Return the hash that identifies a base: of the hashes of its weight files."""
    return hashlib.sha256("".join(map(store.known_sha256, files)).encode()).hexdigest()
