"""One TOML file describes a project. Read it, override it, and tell every fault of it at once."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from lora_align.errors import UserError, nearest
from lora_align.preference import NAME, Preference, Ranker

LOCAL = Path("lora-align.toml")
Positive = Annotated[float, Gt(0), Lt(1e9)]
Share = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Base:
    """The model everything stands on. Empty text means the model's own."""

    model: str
    revision: str = ""
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    chat_template: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """The shape of every adapter. `init_seed` fixes A for all preferences and both directions."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    init_seed: int = 0


@dataclass(frozen=True)
class Training:
    """What all training has in common. Batches count rows; `limit` stops reading after that many to train on."""

    epochs: Positive = 1.0
    learning_rate: Positive = 5e-5
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: Share = 0.03
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Positive = 1.0
    batch_size: Count = 16
    micro_batch_size: Count = 4
    max_length: Annotated[int, Ge(8)] = 1024
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    seed: int = 0
    held_out: Share = 0.05
    limit: Count | None = None
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """The start policy's adapter, trained on conversations."""

    data: str
    split: str = "train"
    revision: str = ""
    answers_only: bool = True
    packing: bool = False
    lora: Lora | None = None


@dataclass(frozen=True)
class Dpo(Training):
    """Preference adapters. `beta` is DPO's; `seed` orders the data and never touches A."""

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Ge(0), Le(0.5)] = 0.0


@dataclass(frozen=True)
class Ratings:
    """One `[reward.ratings.NAME]` table: rated answers and the raters' scale. No attributes named: all there are."""

    data: Annotated[str, Len(1)]
    split: str = "train"
    revision: str = ""
    low: float = 0.0
    high: float = 4.0
    attributes: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class Reward(Training):
    """The reward model. A head a rated attribute, and a head each name in `pairs`, trained on that preference's pairs.

    `objectives` derives further ones, each the mean of heads. `lm_weight` is that of the language-model loss.
    """

    ratings: Mapping[str, Ratings] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    objectives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lm_weight: Annotated[float, Ge(0)] = 0.1
    lora: Lora | None = None


@dataclass(frozen=True, kw_only=True)
class Rsf(Training):
    """Rejection sampling: one policy that is asked for a direction over the reward model's objectives.

    `directions` bounds each objective's weight. A prompt gets `per_prompt` directions and `samples` answers for each;
    the first policy learns from `bootstrap` answers a prompt of one that is asked for scores. `ask` and `steer` are the
    system messages that ask for either, as Jinja templates: `ask` may name `want` (a weight for each objective),
    `decimals` and `integers` (both spelt out), `steer` may name `scores` and `listed`. `watch` is the objective whose
    fall is named. `beta` is for `learn = "dpo"`.
    """

    data: Annotated[str, Len(1)]
    directions: Mapping[str, tuple[float, float]]
    split: str = "train"
    revision: str = ""
    reward: str = "reward"
    iterations: Annotated[int, Ge(0)] = 4
    per_prompt: Count = 5
    samples: Count = 16
    bootstrap: Count = 80
    replay: Share = 0.15
    temperature: Positive = 1.0
    max_new_tokens: Count = 512
    ask: str = "Your response should maximize weighted rating = {{ decimals }}"
    steer: str = "Your response should be rated {{ listed }}"
    watch: str = "harmlessness"
    learn: Literal["sft", "dpo"] = "sft"
    loss_on: Literal["answers", "all"] = "answers"
    beta: Positive = 0.1
    packing: bool = True
    lora: Lora | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole project, resolved: every default filled in."""

    base: Base
    about: str = ""
    lora: Lora = field(default_factory=Lora)
    preferences: Mapping[str, Preference] = field(default_factory=dict)
    sft: Sft | None = None
    dpo: Dpo = field(default_factory=Dpo)
    reward: Reward | None = None
    rsf: Rsf | None = None

    def preference(self, name: str) -> Preference:
        """The preference of that name, or an error that lists the known ones."""
        if name not in self.preferences:
            known = list(self.preferences)
            raise UserError(f"no preference {name!r} in the recipe{nearest(name, known)} (known: {', '.join(known)})")
        return self.preferences[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as kept in a run's manifest; `from_dict` reads it back."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def builtin() -> dict[str, Path]:
    """The recipes that travel with the package, by name."""
    packaged = Path(str(files("lora_align") / "recipes"))
    folder = packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find(name: str | None) -> tuple[Path, str]:
    """The recipe file meant, and one line that says why it was chosen (empty when it was named)."""
    if name is None:
        if LOCAL.exists():
            return LOCAL, f"recipe: ./{LOCAL}"
        return builtin()["demo"], f"recipe: the built-in demo (no --recipe and no ./{LOCAL})"
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        if path.is_file():
            return path, ""
        raise UserError(f"no recipe file {name!r}")
    if name not in builtin():
        known = list(builtin())
        raise UserError(f"no recipe {name!r}{nearest(name, known)} (built in: {', '.join(known)}; or a .toml file)")
    return builtin()[name], ""


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `table.key=value` overrides."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: not valid TOML: {fault}") from fault
    recipe = from_dict(table, str(path), overrides)
    template = path.parent / recipe.base.chat_template
    if recipe.base.chat_template.endswith(".jinja"):
        if not template.is_file():
            raise UserError(f"{path}: base.chat_template: no file {template}")
        table["base"]["chat_template"] = template.read_text(encoding="utf-8")
        recipe = from_dict(table, str(path))
    return recipe


def from_dict(table: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Apply overrides to plain data and check it against the dataclasses above; one error names every fault."""
    from pydantic import TypeAdapter, ValidationError

    for override in overrides:
        _override(table, override)
    faults: list[str] = []
    recipe: Recipe | None = None
    try:  # by way of JSON: strict about scalars, yet arrays become tuples and tables dataclasses
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(table, default=str), strict=True, extra="forbid")
    except ValidationError as invalid:
        faults += [_describe(dict(fault)) for fault in invalid.errors()]
    faults += _bad_preferences(table.get("preferences"))
    if recipe is not None:
        faults += [*_bad_batches(recipe), *_bad_reward(recipe), *_bad_rsf(recipe)]
    if faults or recipe is None:
        raise UserError("\n".join(f"{source}: {fault}" for fault in faults))
    return recipe


def _bad_batches(recipe: Recipe) -> Iterator[str]:
    """An optimiser step is a whole number of micro-batches."""
    for name, stage in (("sft", recipe.sft), ("dpo", recipe.dpo), ("reward", recipe.reward), ("rsf", recipe.rsf)):
        if stage and stage.batch_size % stage.micro_batch_size:
            yield f"{name}.batch_size: {stage.batch_size} is no multiple of micro_batch_size {stage.micro_batch_size}"


def _bad_reward(recipe: Recipe) -> Iterator[str]:
    """What a [reward] table says of preferences and heads that are not there."""
    if recipe.reward is None:
        return
    if not recipe.reward.ratings and not recipe.reward.pairs:
        yield "reward: nothing to learn from; give [reward.ratings.NAME] or [reward.pairs]"
    for head, preference in recipe.reward.pairs.items():
        if preference not in recipe.preferences:
            yield f"reward.pairs.{head}: no preference {preference!r}{nearest(preference, list(recipe.preferences))}"
    for name, table in recipe.reward.ratings.items():
        if table.high <= table.low:
            yield f"reward.ratings.{name}: high ({table.high:g}) must be above low ({table.low:g})"
    for name, heads in recipe.reward.objectives.items():
        if not heads:
            yield f"reward.objectives.{name}: no heads to take the mean of"


def _bad_rsf(recipe: Recipe) -> Iterator[str]:
    """Directions that are none."""
    if recipe.rsf is None:
        return
    if len(recipe.rsf.directions) < 2:
        yield "rsf.directions: two objectives or more, each with its bounds, as in verbosity = [-0.7, 0.0]"
    for name, (low, high) in recipe.rsf.directions.items():
        if not -1 <= low <= high <= 1:
            yield f"rsf.directions.{name}: bounds from -1 to 1, the lower first, not [{low:g}, {high:g}]"


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `table.key=value`; the value is TOML, or else taken as text."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override!r}: expected table.key=value, as in --set dpo.beta=0.05")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override!r}: {key!r} is a value, not a table")
    table[keys[-1]] = value


def _describe(fault: Mapping[str, Any]) -> str:
    """One validation fault in the words of a recipe."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {where!r}{_suggestion(fault['loc'])}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: missing"
    if fault["type"] in ("dataclass_type", "dataclass_exact_type", "mapping_type"):
        return f"{where}: must be a table, as in [{where}]"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{where}: {message}, not {fault['input']!r}"


def _suggestion(location: tuple[str | int, ...]) -> str:
    """The known key nearest to an unknown one, in the table it stands in."""
    tables: dict[str, Any] = {
        "": Recipe,
        "base": Base,
        "lora": Lora,
        "sft": Sft,
        "dpo": Dpo,
        "reward": Reward,
        "ratings": Ratings,
        "rsf": Rsf,
        "preferences": Preference,
    }
    parent = next((part for part in ("ratings", str(location[0])) if part in location[:-1]), "")
    known = [field.name for field in fields(tables.get(parent, Recipe))]
    return nearest(str(location[-1]), known) or f" (known: {', '.join(known)})"


def _bad_preferences(tables: Any) -> Iterator[str]:
    """Faults that types cannot tell: names that cannot be folders, rankers that do not exist, margins of labels."""
    for name, table in tables.items() if isinstance(tables, Mapping) else ():
        if not NAME.fullmatch(str(name)):
            yield f"preferences.{name}: a name is 1 to 64 of a-z 0-9 _ - and starts with a letter or digit"
        rank = table.get("rank", "label") if isinstance(table, Mapping) else "label"
        if isinstance(rank, str):
            try:
                kind = Ranker.parse(rank).kind
            except ValueError as fault:
                yield f"preferences.{name}.rank: {fault}"
                continue
            if kind == "label" and isinstance(table, Mapping) and table.get("margin"):
                yield f"preferences.{name}.margin: a label says who won, not by how much; rank by rating: or score:"
