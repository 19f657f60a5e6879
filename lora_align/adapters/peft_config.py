"""PEFT's adapter_config.json: refused where it means more than scaling · B A, and what it means where it does not."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from lora_align.adapters import module_names
from lora_align.console import inert
from lora_align.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_RANK, LARGEST_ALPHA = 2**16, 1e6  # beyond these a number is a slip or an attack
PATIENCE = 1.0  # seconds for one name and one pattern

# Keys that change nothing about ΔW = scaling · B A, whatever they hold.
HARMLESS = frozenset(
    """
    peft_version inference_mode lora_dropout fan_in_fan_out layers_pattern runtime_config megatron_core
    loftq_config eva_config corda_config lora_ga_config velora_config qalora_group_size ensure_weight_tying
    """.split()  # noqa: SIM905
)
# Keys that are read here, and what they may hold.
READ: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "r": lambda value: _rank(value),
    "lora_alpha": lambda value: _number(value),
    "use_rslora": lambda value: value in (None, True, False),
    "rank_pattern": lambda value: not value or _patterns(value, _rank),
    "alpha_pattern": lambda value: not value or _patterns(value, _number),
    "target_modules": lambda value: _pattern(value) if isinstance(value, str) else _texts(value),
    "exclude_modules": lambda value: not value or (_pattern(value) if isinstance(value, str) else _texts(value)),
    "layers_to_transform": lambda value: value is None or type(value) is int or _whole(value),
    "init_lora_weights": lambda value: isinstance(value, bool | str),
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
    "revision": lambda value: value is None or isinstance(value, str),
    "task_type": lambda value: value is None or isinstance(value, str),
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
    "auto_mapping": "it asks for code to be imported; without that key, and with a task_type, the adapter is the same",
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


def targeted(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether PEFT would adapt a module of some name."""
    wanted, excluded = _named(config["target_modules"]), _named(config.get("exclude_modules") or [])
    only = config.get("layers_to_transform")
    numbers = {only} if isinstance(only, int) else set(only or ())

    def adapted(module: str) -> bool:
        at = module_names.place(module) if numbers else None
        return wanted(module) and not excluded(module) and (not numbers or (at is not None and at.layer in numbers))

    return adapted


def _named(said: str | Sequence[str]) -> Callable[[str], bool]:
    """By a pattern, or by names and their endings."""
    if isinstance(said, str):
        return lambda module: said == "all-linear" or _matches(said, module)
    whole, endings = set(said), tuple(f".{name}" for name in said)
    return lambda module: module in whole or module.endswith(endings)  # most names of thousands are found at once


def covers_every_layer(config: Mapping[str, Any]) -> bool:
    """Whether it left no layer out by plan: by number, by an exception, by a pattern, by naming modules one by one."""
    targets = config["target_modules"]
    if config.get("layers_to_transform") not in (None, []) or config.get("exclude_modules"):
        return False
    if isinstance(targets, str):
        return targets == "all-linear"
    return not any(module_names.NUMBER.search(f".{target}") for target in targets)


def lacking(config: Mapping[str, Any], modules: Collection[str]) -> str:
    """What ought to be among an adapter's modules and is not, or nothing."""
    targets = config["target_modules"]
    if not isinstance(targets, str):
        present = {".".join(parts[i:]) for parts in (name.split(".") for name in modules) for i in range(len(parts))}
        named = (target for target in targets if module_names.NUMBER.search(f".{target}") and target not in present)
        lost = next(named, None)
        if lost:
            return f"there is no {lost}"
    if isinstance(targets, str) and targets != "all-linear":
        return ""
    return module_names.lost(modules, covers_every_layer(config))


@dataclass(frozen=True)
class About:
    """What a configuration says beside ranks: of which base, for which task, of which modules."""

    base: str
    revision: str = ""
    task: str | None = "CAUSAL_LM"
    targets: tuple[str, ...] = ()  # module names or their common endings; none stands for every module by its name
    transposed: bool = False  # PEFT's fan_in_fan_out, which tells how the base stores its weights and changes no sum

    @classmethod
    def common(cls, configs: Sequence[Mapping[str, Any]]) -> "About":
        """What adapters that are added have in common; endings only where they mean the same modules again."""
        bases = [config.get("base_model_name_or_path") or "" for config in configs]
        tasks = {config.get("task_type") for config in configs}
        lists = [config["target_modules"] for config in configs]
        same = all(isinstance(targets, list) and sorted(targets) == sorted(lists[0]) for targets in lists)
        endings = sorted(lists[0]) if same and all(map(covers_every_layer, configs)) else []
        return cls(
            base=next(filter(None, bases), ""),
            revision=next(filter(None, (config.get("revision") for config in configs)), ""),
            task=tasks.pop() if len(tasks) == 1 else None,
            targets=tuple(endings),
            transposed=any(config.get("fan_in_fan_out") for config in configs),
        )


def written(ranks: Mapping[str, int], about: About) -> str:
    """The configuration of an adapter with these ranks whose scaling is 1 everywhere."""
    largest = max(ranks.values())
    differing = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != largest}
    config = {
        "peft_type": "LORA",
        "task_type": about.task,
        "base_model_name_or_path": about.base,
        "revision": about.revision or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": differing,
        "alpha_pattern": differing,
        "target_modules": list(about.targets) or sorted(ranks),
        "fan_in_fan_out": about.transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    return json.dumps(config, indent=2)


def _own(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """A module's own rank or alpha: the first pattern that matches its name or its name's end."""
    for pattern, value in (config.get(key) or {}).items():
        if _matches(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(default)


def _matches(pattern: str, module: str) -> bool:
    """Whether somebody's pattern matches the whole name; some patterns would take for ever to tell."""
    try:
        return regex.fullmatch(pattern, module, timeout=PATIENCE) is not None
    except TimeoutError:
        raise UserError(f"{CONFIG}: the pattern {inert(pattern)[:80]!r} takes too long to match") from None


def _rank(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST_RANK


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_ALPHA


def _pattern(text: str) -> bool:
    try:
        return bool(re.compile(rf"(.*\.)?({text})$")) and bool(re.compile(text))
    except (re.error, RecursionError, OverflowError):
        return False


def _patterns(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_pattern(key) and fits(held) for key, held in value.items())


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _whole(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
