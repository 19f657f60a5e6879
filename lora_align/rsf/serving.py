"""The vLLM command that serves a recipe's base with the adapters of `rsf`, for `--endpoint`."""

import shlex
from pathlib import Path

from lora_align.model.base_folder import GGUF, local_folder
from lora_align.recipe import Base, Recipe


def serve_command(recipe: Recipe) -> str:
    """Return the vLLM command that serves a recipe's base and lets `rsf` load adapters at run time."""
    base, own = recipe.base, (recipe.rsf and recipe.rsf.lora) or recipe.lora
    rank = own.rank + ((recipe.sft.lora or recipe.lora).rank if recipe.sft else 0)  # both are served as one adapter
    rank = max(
        rank, (recipe.reward.lora or recipe.lora).rank if recipe.reward else 0
    )  # loaded first, to test the server
    ranks = [size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank]
    model = str(_converted(base) if base.model.endswith(GGUF) else local_folder(base.model) or base.model)
    words = ["vllm", "serve", model, *(["--revision", base.revision] if base.revision else [])]
    words += ["--chat-template", base.chat_template] if base.chat_template else []
    words += ["--quantization", "bitsandbytes"] if base.quantization == "nf4" else []
    words += ["--enable-lora", "--max-lora-rank", str(ranks[0] if ranks else rank)]
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + shlex.join(words)


def _converted(base: Base) -> Path:
    """Return the folder that a GGUF file was converted to."""
    from lora_align.model.base import find

    return find(base, outline=True).folder
