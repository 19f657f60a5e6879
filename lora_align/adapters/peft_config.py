"""PEFT's adapter_config.json: refused where it means more than scaling · B A, and what it means where it does not."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora_align.adapters import layers
from lora_align.console import inert
from lora_align.errors import UserError

CONFIG = "adapter_config.json"

# Keys that change nothing about ΔW = scaling · B A, whatever they hold.
HARMLESS = frozenset(
    """
    task_type peft_version base_model_name_or_path revision inference_mode lora_dropout fan_in_fan_out
    exclude_modules layers_pattern runtime_config megatron_core
    loftq_config eva_config corda_config lora_ga_config velora_config qalora_group_size ensure_weight_tying
    """.split()  # noqa: SIM905
)
# Keys that are read here, and what they may hold.
READ: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "r": lambda value: type(value) is int and value > 0,
    "lora_alpha": lambda value: _number(value),
    "use_rslora": lambda value: value in (None, True, False),
    "rank_pattern": lambda value: not value or _patterns(value, lambda rank: type(rank) is int and rank > 0),
    "alpha_pattern": lambda value: not value or _patterns(value, _number),
    "target_modules": lambda value: _pattern(value) if isinstance(value, str) else _texts(value),
    "layers_to_transform": lambda value: value is None or type(value) is int or _whole(value),
    "init_lora_weights": lambda value: isinstance(value, bool | str),
}
# Keys that must hold nothing, and what is wrong where they do.
REFUSED = {
    "use_dora": "DoRA adapters do not add",
    "kasa_config": "KaSA adapters do not add",
    "lora_bias": "adapters with a bias do not add as B A",
    "bias": "adapters with a bias do not add as B A",
    "modules_to_save": "whole saved modules are not LoRA",
    "trainable_token_indices": "trained tokens are not LoRA",
    "target_parameters": "adapters of bare parameters are not read",
    "layer_replication": "replicated layers change the base",
    "auto_mapping": "it asks for code to be imported",
    "megatron_config": "Megatron layers are not read",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA is stored differently",
    "arrow_config": "routed adapters are not one ΔW",
    "monteclora_config": "MonteCLoRA adapters are sampled",
}
# Beginnings that leave the base alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take something out of it first.
PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def read(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, if all it means is scaling · B A."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no adapter in {folder}: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a LoRA adapter")
    for key, value in config.items():
        if key in REFUSED and value not in (None, False, "none", [], {}):
            raise UserError(f"{path}: {key} is set: {REFUSED[key]}")
        if key in READ and not READ[key](value):
            raise UserError(f"{path}: {key} cannot be {inert(json.dumps(value)[:80])}")
        if key not in REFUSED and key not in READ and key not in HARMLESS:
            raise UserError(f"{path}: unknown key {inert(key)!r}; what it does to the weights is not known")
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if lacking:
        raise UserError(f"{path}: {lacking[0]} is missing")
    beginning = config.get("init_lora_weights", True)
    if beginning not in PLAIN_BEGINNINGS:
        raise UserError(
            f"{path}: init_lora_weights is {inert(str(beginning))!r}: such adapters stand on a changed base; "
            "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…) makes a plain one"
        )
    return config


def rank(config: Mapping[str, Any], module: str) -> int:
    """A module's rank."""
    return int(_own(config, "rank_pattern", module, config["r"]))


def scaling(config: Mapping[str, Any], module: str) -> float:
    """What B A is multiplied by in a module."""
    alpha, r = _own(config, "alpha_pattern", module, config["lora_alpha"]), rank(config, module)
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt a module of that name."""
    targets = config["target_modules"]
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def lacking(config: Mapping[str, Any], modules: Collection[str]) -> str:
    """What ought to be among an adapter's modules and is not, or nothing.

    Targets that are patterns or have exceptions do not tell; those that name a layer do; others are in every layer.
    """
    targets = config["target_modules"]
    if config.get("exclude_modules") or (isinstance(targets, str) and targets != "all-linear"):
        return ""
    named = [] if isinstance(targets, str) else [target for target in targets if layers.NUMBER.search(f".{target}")]
    lost = [target for target in named if not any(f".{module}".endswith(f".{target}") for module in modules)]
    if lost:
        return f"there is no {lost[0]}"
    return "" if named else layers.gap(modules, config.get("layers_to_transform"))


def written(ranks: Mapping[str, int], *, base: str, revision: str, targets: list[str], transposed: bool) -> str:
    """The configuration of an adapter with these ranks whose scaling is 1 everywhere."""
    largest = max(ranks.values())
    differing = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": differing,
        "alpha_pattern": differing,
        "target_modules": sorted(targets),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    return json.dumps(config, indent=2)


def _own(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """A module's own rank or alpha: the first pattern that matches its name or its name's end."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except (re.error, RecursionError):
        return False


def _patterns(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_pattern(key) and fits(held) for key, held in value.items())


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _whole(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
