"""Locate, fingerprint and load the base model."""

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lora_align import distributed, recipe, store
from lora_align.adapters.safetensors_stream import TensorFile
from lora_align.errors import NotFetchedError, UserError, first_line
from lora_align.model.base_folder import GGUF, fingerprint, hub_id, local_folder, weight_files
from lora_align.model.chat_format import ChatFormat
from lora_align.model.nf4 import dequantise_once, disable_cpu_repacking
from lora_align.model.template_check import check_template

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]  # configuration, tokenizer, templates, licence
CACHE_QUANTIZED_FROM = 1 << 30  # bytes of weights; quantising a smaller base is faster than loading it from the cache

transformers.utils.logging.disable_default_handler()
transformers.utils.logging.enable_propagation()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """A base model on disk, not loaded yet: its folder, its fingerprint and its chat format."""

    folder: Path
    recipe: recipe.Base
    fingerprint: str
    chat: ChatFormat
    max_length: int

    @property
    def identity(self) -> dict[str, Any]:
        """Return what a manifest records about the base."""
        return {
            "model": self.recipe.model,
            "revision": self.recipe.revision,
            "fingerprint": self.fingerprint,
            "quantization": self.recipe.quantization,
            "double_quant": self.recipe.double_quant,
            "chat_format": self.chat.fingerprint(),
        }

    def load(self, cache_from: int = CACHE_QUANTIZED_FROM) -> PreTrainedModel:
        """Load the frozen model, in 4-bit unless the recipe says otherwise, on the GPU if there is one.

        From `cache_from` bytes of weights on, the 4-bit model is cached on disk.
        """
        gc.collect()  # a base that is no longer used must be freed before the next one is loaded
        weights = sum(file.stat().st_size for file in weight_files(self.folder))
        source = self.folder
        if self.recipe.quantization == "nf4" and weights >= cache_from:
            source = _quantized(self)
        if not self.recipe.fsdp or distributed.world_size() == 1:
            model = _load(source, self.recipe, device(self.recipe))
            if model.device.type == "cpu":
                dequantise_once(model, compute_dtype(self.recipe))
            return model
        from lora_align.model.fsdp import shard_base

        distributed.barrier()  # initialises torch.distributed
        with FileLock(store.cache_folder() / ".sharding.lock"):  # hold one whole base in memory at a time
            return shard_base(_load(source, self.recipe, torch.device("cpu")), device(self.recipe))


def find(base: recipe.Base, *, outline: bool = False) -> Base:
    """Locate a base, hash its weights and check its chat template.

    With `outline`, weights are neither fetched nor hashed, and they may be missing. A GGUF file is always fetched,
    converted and hashed, because it also holds the configuration.
    """
    file = gguf_file(base)
    folder = _converted(file) if file else _folder(base, outline)
    if not (folder / "config.json").is_file():
        raise UserError(f"base.model {base.model!r}: no config.json in {folder}; give a folder in transformers' format")
    if base.fsdp and base.quantization != "nf4":
        raise UserError(
            f"base.fsdp shards 4-bit weights, but base.quantization is {base.quantization!r}; "
            'set base.quantization = "nf4" or base.fsdp = false'
        )
    weights = [] if outline else weight_files(folder)
    if not weights and not outline:
        raise UserError(
            f"base.model {base.model!r}: no .safetensors weights in {folder}; pickle files are "
            "not read: convert them with save_pretrained"
        )
    for one in weights:
        TensorFile(one)  # refuses a damaged file
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as fault:
        raise UserError(f"base.model {base.model!r} does not load: {fault}") from fault
    template = base.chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise UserError(
            f"base.model {base.model!r} has no chat template; give one in the recipe: base.chat_template "
            "(Jinja text, or the name of a .jinja file beside the recipe)"
        )
    whose = "base.chat_template" if base.chat_template else f"the chat template of base.model {base.model!r}"
    check_template(template, {**tokenizer.special_tokens_map, **base.chat_template_kwargs}, whose)
    hashed = [file] if file else weights
    return Base(
        folder=folder,
        recipe=base,
        fingerprint=fingerprint(hashed),
        chat=ChatFormat(tokenizer, template, base.chat_template_kwargs, _stops(folder, tokenizer.eos_token_id)),
        max_length=getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20,
    )


def device(base: recipe.Base) -> torch.device:
    """Return this process's GPU (CUDA, Intel's XPU, or Apple's MPS for a base that is not in 4-bit), or the CPU."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    kinds = ("cuda", "xpu") if base.quantization == "nf4" else ("cuda", "xpu", "mps")
    return torch.device(gpu.type, distributed.local_rank()) if gpu and gpu.type in kinds else torch.device("cpu")


def device_memory(where: torch.device) -> tuple[int, int]:
    """Return the free and the total memory of a GPU in bytes, or that of this machine, which an Apple GPU shares."""
    if where.type in ("cpu", "mps"):
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)
    return torch.accelerator.get_memory_info(where)


def device_name(where: torch.device) -> str:
    """Return the name of a card, or the type of another device."""
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type


def base_model_of(policy: "PeftModel") -> PreTrainedModel:
    """Return the base model under the PEFT wrapper, with the adapter layers in place."""
    model = policy.get_base_model()
    assert isinstance(model, PreTrainedModel)
    return model


def compute_dtype(base: recipe.Base) -> torch.dtype:
    """Return the dtype of activations: float32 on a CPU and on MPS; on other GPUs bfloat16, or else float16."""
    if base.dtype != "auto":
        return getattr(torch, base.dtype)  # type: ignore[no-any-return]
    kind = device(base).type
    if kind in ("cpu", "mps"):
        return torch.float32
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def gguf_file(base: recipe.Base) -> Path | None:
    """Return the GGUF file that base.model names, fetched from the hub if necessary. None for other bases."""
    if not base.model.endswith(GGUF):
        return None
    file = Path(base.model).expanduser()
    if file.is_file():
        return file
    owner, _, name = base.model.partition("/")
    name, _, path = name.partition("/")
    if not path or base.model.startswith((".", "/", "~")):
        raise UserError(f"no file {base.model}; base.model may also be a file on the hub: owner/name/file.gguf")
    from huggingface_hub import hf_hub_download

    with _report_hub_errors(f"{owner}/{name}", base.revision or None, f" {path}"):
        return Path(hf_hub_download(f"{owner}/{name}", path, revision=base.revision or None))


def comes_quantized(folder: Path) -> bool:
    """Return whether a folder holds quantised weights."""
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _folder(base: recipe.Base, outline: bool) -> Path:
    """Return the base's folder: registered, on this disk, or from the hub's cache, fetched if necessary."""
    if folder := local_folder(base.model):
        return folder
    if not hub_id(base.model):
        raise UserError(
            f"base.model {base.model!r} is neither a folder, nor a GGUF file, nor a hub id (owner/name or "
            "owner/name/file.gguf)"
        )
    from huggingface_hub import snapshot_download

    wanted = [*CONFIG_FILES, *([] if outline else ["*.safetensors"])]
    # consolidated*: Mistral's repositories store every weight a second time, in another format
    unwanted = ["original/*", "consolidated*"]
    revision = base.revision or None
    with _report_hub_errors(base.model, revision, "".join(f" --include '{files}'" for files in wanted if outline)):
        return Path(snapshot_download(base.model, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))


def _converted(file: Path) -> Path:
    from lora_align.model import gguf_file

    return gguf_file.folder_of(file, store.known_sha256(file))


@contextmanager
def _report_hub_errors(name: str, revision: str | None, files: str) -> Iterator[None]:
    """Turn the hub's errors into UserErrors. `files` completes the command `hf download NAME`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as fault:
        raise NotFetchedError(
            f"base {name!r} is gated and this account has no access: request access at "
            f"https://huggingface.co/{name}, then run `hf auth login`"
        ) from fault
    except errors.RepositoryNotFoundError as fault:
        raise UserError(f"no model {name!r} on the hub; if it is private, run `hf auth login`") from fault
    except errors.RevisionNotFoundError as fault:
        raise UserError(
            f"base.revision: model {name!r} has no revision {revision!r}; its page lists branches and tags"
        ) from fault
    except errors.RemoteEntryNotFoundError as fault:
        raise UserError(f"model {name!r} has no file{files} on the hub") from fault
    except errors.HFValidationError as fault:
        raise UserError(f"base.model {name!r} is not a valid hub id: {fault}") from fault
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as fault:
        raise NotFetchedError(
            f"base {name!r} is not in the cache and the hub cannot be reached; with a network, run "
            f"`hf download {name}{files}`, or set base.model to a local folder or GGUF file"
        ) from fault
    except (errors.HfHubHTTPError, OSError) as fault:
        raise NotFetchedError(f"base {name!r} could not be fetched: {first_line(fault)}") from fault


def _load(source: Path, base: recipe.Base, where: torch.device) -> PreTrainedModel:
    chosen: dict[str, Any] = {}  # keys left out here keep the values of the model's own configuration
    if base.quantization == "nf4" and not comes_quantized(source):
        chosen["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=base.double_quant,
            bnb_4bit_compute_dtype=compute_dtype(base),
        )
    if base.attention != "auto":
        chosen["attn_implementation"] = base.attention
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=compute_dtype(base),
            device_map={"": where},
            use_safetensors=True,
            trust_remote_code=False,
            **chosen,
        )
    except (ValueError, OSError, ImportError) as fault:
        raise UserError(f"base.model {base.model!r} does not load: {fault}") from fault
    disable_cpu_repacking(model)
    for module in model.modules():
        # the frozen base has no dropout; the recipe sets the adapter's dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):  # attention modules pass this number to their kernels
            module.attention_dropout = 0.0  # type: ignore[assignment]
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def _quantized(base: Base) -> Path:
    """Return the cache folder of this base in 4-bit. Fill the folder on first use."""
    settings = {
        "fingerprint": base.fingerprint,
        "double": base.recipe.double_quant,
        "dtype": str(compute_dtype(base.recipe)),
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = store.cache_folder() / "bases" / f"{base.folder.name}-nf4-{key}"
    if comes_quantized(base.folder):
        return base.folder

    def quantise(staging: Path) -> None:
        model = _load(base.folder, base.recipe, torch.device("cpu") if base.recipe.fsdp else device(base.recipe))
        store.check_free_space(staging.parent, model.get_memory_footprint(), store.CACHE_REMEDY)
        model.save_pretrained(staging)

    store.fill_once(folder, "the 4-bit base", quantise)
    return folder


def _stops(folder: Path, eos: int | None) -> frozenset[int]:
    path = folder / "generation_config.json"
    settings: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = settings.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*ids, eos] if isinstance(i, int))
