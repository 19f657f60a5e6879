"""PEFT's LoRA folders, read with suspicion and written so that stock PEFT loads them unchanged."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.console import inert
from lora_align.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys that change nothing about ΔW = scaling · B A, whatever they hold.
HARMLESS = frozenset(
    """
    peft_type task_type peft_version base_model_name_or_path revision inference_mode r lora_alpha lora_dropout
    target_modules exclude_modules init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    use_rslora runtime_config megatron_core loftq_config eva_config corda_config lora_ga_config velora_config
    qalora_group_size ensure_weight_tying
    """.split()  # noqa: SIM905
)
# Keys that must hold nothing, and what is wrong where they do.
REFUSED = {
    "use_dora": "DoRA adapters do not add",
    "kasa_config": "KaSA adapters do not add",
    "lora_bias": "adapters with a bias do not add as B A",
    "bias": "adapters with a bias do not add as B A",
    "modules_to_save": "whole saved modules are not LoRA",
    "trainable_token_indices": "trained tokens are not LoRA",
    "target_parameters": "adapters of bare parameters are not read yet",
    "layer_replication": "replicated layers change the base",
    "fan_in_fan_out": "transposed layers are not read yet",
    "auto_mapping": "it asks for code to be imported",
    "megatron_config": "Megatron layers are not read",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA is stored differently",
    "arrow_config": "routed adapters are not one ΔW",
    "monteclora_config": "MonteCLoRA adapters are sampled",
}


def load(folder: Path) -> LoraDelta:
    """The update an adapter folder describes, in float32 whatever it is stored in."""
    config, tensors = read_config(folder), _read_tensors(folder)
    pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if not match:
            raise UserError(f"{folder / WEIGHTS}: {inert(key)!r} is not a LoRA tensor")
        if not tensor.isfinite().all():
            raise UserError(f"{folder / WEIGHTS}: {inert(key)} holds values that are not finite")
        sides.setdefault(match[1], {})[match[2]] = tensor
    if not sides:
        raise UserError(f"{folder / WEIGHTS}: no LoRA tensors in it")
    return LoraDelta({name: _factors(folder, config, name, pair) for name, pair in sides.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, refused where it means more than scaling · B A."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no adapter in {folder}: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise UserError(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a LoRA adapter")
    for key, value in config.items():
        if key in REFUSED and value not in (None, False, "none", [], {}):
            raise UserError(f"{path}: {key} is set: {REFUSED[key]}")
        if key not in REFUSED and key not in HARMLESS:
            raise UserError(f"{path}: unknown key {inert(key)!r}")
    return config


def save(delta: LoraDelta, folder: Path, *, base: str, revision: str = "", targets: list[str] | None = None) -> None:
    """Write an ordinary PEFT adapter whose scaling is 1. `targets` are module names or their common endings."""
    ranks = {name: factors.rank for name, factors in delta.items()}
    rank = max(ranks.values())
    differing = {name: r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {re.escape(name): r for name, r in differing.items()},
        "alpha_pattern": {re.escape(name): r for name, r in differing.items()},
        "target_modules": sorted(targets or delta),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {}
    for name, factors in delta.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.B.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def common_endings(folders: list[Path]) -> list[str] | None:
    """The target list that all adapters share, to hand on; None where they differ or name a pattern."""
    lists = [read_config(folder).get("target_modules") for folder in folders]
    shared = [sorted(names) if isinstance(names, list) else None for names in lists]
    return shared[0] if shared and all(names == shared[0] for names in shared) else None


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = next(folder.glob("adapter_model.bin"), None)
        hint = f"; {pickled.name} is a pickle and is not opened: save it as safetensors with PEFT" if pickled else ""
        raise UserError(f"no {WEIGHTS} in {folder}{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: damaged or cut short ({path.stat().st_size:,} bytes): {fault}") from fault


def _factors(folder: Path, config: Mapping[str, Any], name: str, pair: Mapping[str, torch.Tensor]) -> Factors:
    """Check one module's pair against the configuration and fold its scaling into B."""
    if set(pair) != {"A", "B"}:
        raise UserError(f"{folder / WEIGHTS}: {inert(name)} has lora_{''.join(pair)} but not the other side")
    rank = _pattern(config, "rank_pattern", name, config["r"])
    alpha = _pattern(config, "alpha_pattern", name, config["lora_alpha"])
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
        raise UserError(f"{folder}: {inert(name)} has tensors {tuple(B.shape)}, {tuple(A.shape)}; the rank is {rank}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(B.float() * scaling, A.float())  # in half precision the product would be rounded


def _pattern(config: Mapping[str, Any], key: str, name: str, default: float) -> float:
    """A module's own rank or alpha: the first pattern that matches its name or its name's end."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return float(default)
