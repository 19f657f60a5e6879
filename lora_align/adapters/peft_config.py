"""PEFT's adapter_config.json: read and write plain LoRA, and refuse anything beyond scaling · B A."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from lora_align.adapters import module_names
from lora_align.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_RANK, LARGEST_ALPHA = 2**16, 1e6  # larger numbers are errors or attacks
MATCH_SECONDS = 1.0  # seconds to match one pattern against one name

# Keys that never affect ΔW = scaling · B A.
HARMLESS = frozenset(
    """
    peft_version inference_mode lora_dropout fan_in_fan_out layers_pattern runtime_config megatron_core
    loftq_config eva_config corda_config lora_ga_config velora_config qalora_group_size ensure_weight_tying
    """.split()  # noqa: SIM905
)
# Keys that this module reads, with checks of their values.
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
# Keys that must be empty, with the reason for a refusal.
REFUSED = {
    "use_dora": "DoRA adapters cannot be added",
    "kasa_config": "KaSA adapters cannot be added",
    "lora_bias": "adapters with a bias cannot be added as B A",
    "bias": "adapters with a bias cannot be added as B A",
    "modules_to_save": "fully saved modules are not LoRA",
    "trainable_token_indices": "trained tokens are not LoRA",
    "target_parameters": "adapters of bare parameters are not supported",
    "layer_replication": "replicated layers change the base",
    "auto_mapping": "it would import code; remove the key and set task_type (the weights stay the same)",
    "megatron_config": "Megatron layers are not supported",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA is stored differently",
    "arrow_config": "routed adapters are not one ΔW",
    "monteclora_config": "MonteCLoRA adapters are sampled",
}
# Values of init_lora_weights that keep the base. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract a part of it first.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def read(folder: Path) -> dict[str, Any]:
    """Read the configuration in a folder; refuse it unless it means scaling · B A."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no adapter in {folder}: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path}: not valid JSON: {fault}; save or download the adapter again") from fault
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a LoRA adapter; expected peft_type LORA")
    for key, value in config.items():
        if key in REFUSED and value not in (None, False, "none", [], {}):
            raise UserError(f"{path}: {key} is set: {REFUSED[key]}")
        if key in READ and not READ[key](value):
            raise UserError(f"{path}: {key} cannot be {json.dumps(value)[:80]}")
        if key not in REFUSED and key not in READ and key not in HARMLESS:
            raise UserError(
                f"{path}: unknown key {key!r}; its effect on the weights is unknown; remove it if it has none"
            )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; save or download the adapter again")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights is {str(init)!r}: such adapters need a changed base; "
            "convert the adapter with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    return config


def rank(config: Mapping[str, Any], module: str) -> int:
    """Return a module's rank."""
    return int(_module_value(config, "rank_pattern", module, config["r"]))


def scaling(config: Mapping[str, Any], module: str) -> float:
    """Return the factor of B A in a module."""
    alpha, r = _module_value(config, "alpha_pattern", module, config["lora_alpha"]), rank(config, module)
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def target_matcher(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function that says whether PEFT would adapt a module by its name."""
    wanted, excluded = _matcher(config["target_modules"]), _matcher(config.get("exclude_modules") or [])
    only = config.get("layers_to_transform")
    numbers = {only} if isinstance(only, int) else set(only or ())

    def adapted(module: str) -> bool:
        at = module_names.parse_name(module) if numbers else None
        return wanted(module) and not excluded(module) and (not numbers or (at is not None and at.layer in numbers))

    return adapted


def _matcher(targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Match module names by a pattern, or by a list of names and endings."""
    if isinstance(targets, str):
        return lambda module: targets == "all-linear" or _matches(targets, module)
    whole, endings = set(targets), tuple(f".{name}" for name in targets)
    return lambda module: module in whole or module.endswith(endings)  # a set is fast even for thousands of names


def covers_every_layer(config: Mapping[str, Any]) -> bool:
    """Return whether the configuration selects all layers: no layer numbers, exclusions, patterns or full names."""
    targets = config["target_modules"]
    if config.get("layers_to_transform") not in (None, []) or config.get("exclude_modules"):
        return False
    if isinstance(targets, str):
        return targets == "all-linear"
    return not any(module_names.NUMBER.search(f".{target}") for target in targets)


def missing_module(config: Mapping[str, Any], modules: Collection[str]) -> str:
    """Describe a module that the configuration implies and the adapter lacks; "" if none."""
    targets = config["target_modules"]
    if not isinstance(targets, str):
        present = {".".join(parts[i:]) for parts in (name.split(".") for name in modules) for i in range(len(parts))}
        named = (target for target in targets if module_names.NUMBER.search(f".{target}") and target not in present)
        missing = next(named, None)
        if missing:
            return f"there is no {missing}"
    if isinstance(targets, str) and targets != "all-linear":
        return ""
    return module_names.missing_module(modules, covers_every_layer(config))


@dataclass(frozen=True)
class BaseInfo:
    """The parts of a configuration that do not depend on ranks."""

    base: str
    revision: str = ""
    task: str | None = "CAUSAL_LM"
    targets: tuple[str, ...] = ()  # module names or common endings; if empty, every module is listed by its full name
    transposed: bool = False  # PEFT's fan_in_fan_out: how the base stores its weights; no effect on sums

    @classmethod
    def common(cls, configs: Sequence[Mapping[str, Any]]) -> "BaseInfo":
        """Return the values that several configurations share.

        Endings are kept as `targets` only if all configurations have the same ones and select every layer.
        """
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


def to_json(ranks: Mapping[str, int], about: BaseInfo) -> str:
    """Return the JSON of a configuration with these ranks and a scaling of 1."""
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


def _module_value(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """Return a module's rank or alpha: the first value whose pattern matches the name or its end, else `default`."""
    for pattern, value in (config.get(key) or {}).items():
        if _matches(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(default)


def _matches(pattern: str, module: str) -> bool:
    """Match a pattern against the whole name, with a time limit because some patterns would run forever."""
    try:
        return regex.fullmatch(pattern, module, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{CONFIG}: the pattern {pattern[:80]!r} takes too long to match; list the modules by name"
        ) from None


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
    return isinstance(value, dict) and all(_pattern(key) and fits(number) for key, number in value.items())


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _whole(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
