"""The tables of a recipe, with their defaults."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from lora_align.errors import UserError, nearest
from lora_align.rankers import Ranker, Winner
from lora_align.recipe import optimizers

# Upper bounds are beyond what anybody needs. They refuse slips at once that would end in an overflow, or in a wait.
Positive = Annotated[float, Gt(0), Le(1_000)]
Share = Annotated[float, Ge(0), Lt(1)]
Rows = Annotated[int, Ge(1), Le(1_000_000_000)]
Few = Annotated[int, Ge(1), Le(100_000)]
Tokens = Annotated[int, Ge(1), Le(10_000_000)]
Weight = Annotated[float, Ge(0), Le(1_000)]
Points = Annotated[float, Ge(-1e9), Le(1e9)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # what NumPy takes


@dataclass(frozen=True)
class Base:
    """The model everything stands on. Empty text means the model's own. With `fsdp`, processes that train together have
    a part of a 4-bit base each, for one that no card holds."""

    model: str
    revision: str = ""
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    fsdp: bool = False
    chat_template: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """The shape of every adapter. `init_seed` fixes A for all preferences and both directions."""

    rank: Annotated[int, Ge(1), Le(16_384)] = 16
    alpha: Annotated[float, Gt(0), Le(1e6)] = 32.0
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    init_seed: Seed = 0


@dataclass(frozen=True)
class Training:
    """What all training has in common. Batches count rows; `limit` stops reading after that many to train on.

    A batch is computed in parts of about `tokens_per_batch` tokens, which changes memory and speed and nothing else.
    `compile` makes programs of the base's layers first, which takes time; `plan --measure` says whether that pays.
    `warmup` below 1 is a share of the steps, from 1 on their number. A checkpoint is kept every `save_minutes`.
    """

    epochs: Positive = 1.0
    learning_rate: Positive = 5e-5
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: Annotated[float, Ge(0), Le(1e7)] = 0.03
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.0
    max_grad_norm: Annotated[float, Gt(0), Le(1e9)] = 1.0
    batch_size: Few = 16
    tokens_per_batch: Tokens = 4096
    max_length: Annotated[Tokens, Ge(8)] = 1024
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Seed = 0
    held_out: Share = 0.05
    save_minutes: Annotated[float, Ge(0), Le(1e6)] = 10.0
    limit: Rows | None = None
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """The start policy's adapter, trained on conversations."""

    data: str
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    answers_only: bool = True
    packing: bool = False
    lora: Lora | None = None


@dataclass(frozen=True)
class Dpo(Training):
    """Preference adapters. `beta` is DPO's; `seed` orders the data and never touches A."""

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Ge(0), Le(0.5)] = 0.0


@dataclass(frozen=True)
class Preference:
    """One `[preferences.NAME]` table of a recipe. `margin` is how far apart two ratings (or lengths) must be.

    Of a data set on the hub `split`, `revision` and `subset` (a part it names, or a folder of it) say what is read.
    `columns` says what a column that is known here is called in the data; with `skip_bad` rows that cannot be read are
    counted instead of refused. `labels` says which answer each value of a label column prefers, as in
    { A = "first", B = "second", C = "tie" }. A table may name other preferences, `of` whose pairs it consists, instead
    of data.
    """

    data: str = ""
    rank: str = "label"
    margin: Annotated[float, Ge(0), Le(1e9)] = 0.0
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    labels: Mapping[str, Winner] = field(default_factory=dict)
    of: tuple[str, ...] = ()

    @property
    def ranker(self) -> Ranker:
        """The parsed `rank`."""
        return Ranker.parse(self.rank)


@dataclass(frozen=True)
class Ratings:
    """One `[reward.ratings.NAME]` table: rated answers and the raters' scale. No attributes named: all there are."""

    data: Annotated[str, Len(1)]
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    low: Points = 0.0
    high: Points = 4.0
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
    lm_weight: Weight = 0.1
    lora: Lora | None = None


@dataclass(frozen=True, kw_only=True)
class Rsf(Training):
    """Rejection sampling: one policy that is asked for a direction over the reward model's objectives.

    `directions` bounds each objective's weight. So many `iterations` follow the SteerLM-style policy, as the paper
    counts them. Each asks `prompts` of its half (or all). A prompt gets `per_prompt` directions and `samples` answers
    for each; the first iteration learns from `bootstrap` answers a prompt of the SteerLM-style policy. The first
    `pooled` iterations choose among all of a prompt's answers, whatever was asked for; later ones among those to the
    direction at hand. `ask` and `steer` are the system messages that ask for directions and for scores, as Jinja
    templates: `ask` may name `want` (a weight for each objective), `decimals` and `integers` (both spelt out), `steer`
    may name `scores` and `listed`. `watch` is the objective whose fall is named. `beta` is for `learn = "dpo"`.
    """

    data: Annotated[str, Len(1)]
    directions: Mapping[str, tuple[float, float]]
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    reward: str = "reward"
    iterations: Annotated[int, Ge(1), Le(1_000)] = 4
    prompts: Rows | None = None
    per_prompt: Few = 5
    samples: Few = 16
    bootstrap: Few = 80
    pooled: Few = 1
    replay: Share = 0.15
    temperature: Positive = 1.0
    max_new_tokens: Tokens = 512
    ask: str = "Your response should maximize weighted rating = {{ decimals }}"
    steer: str = "Your response should be rated {{ listed }}"
    watch: str = "harmlessness"
    learn: Literal["sft", "dpo"] = "sft"
    loss_on: Literal["answers", "all"] = "answers"
    beta: Positive = 0.1
    packing: bool = True
    lora: Lora | None = None


@dataclass(frozen=True)
class Asked:
    """A source of [eval]; `prompts = "FILE or hub id"` is short for one. `where` keeps the rows whose columns hold the
    values it names, as in `where = { label = "safe" }`."""

    data: str = ""
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Eval:
    """What everyone who is measured is asked: `prompts` to answer, `risky` ones to refuse, `count` of each, `samples`
    answers to every one; `text` whose loss should not rise; `facts` that should stay known, up to `pairs` of them, and
    up to `pairs` held-out pairs of each preference.

    Where no prompts are named, those of held-out pairs are asked. Prompts that the recipe trains on are passed over.
    """

    prompts: Asked = field(default_factory=Asked)
    risky: Asked = field(default_factory=Asked)
    text: Asked = field(default_factory=Asked)
    facts: Asked = field(default_factory=Asked)
    count: Few = 64
    samples: Few = 4
    pairs: Few = 128
    temperature: Positive = 1.0
    max_new_tokens: Tokens = 256
    seed: Seed = 0


TABLES_HOLD = {  # of stages that a recipe may lack
    "sft": "its start policy is the base, and `dpo` needs nothing more",
    "reward": "name ratings in [reward.ratings.NAME] or preferences in [reward.pairs]",
    "rsf": "it names prompts, and bounds in [rsf.directions]",
}


@dataclass(frozen=True)
class Recipe:
    """A whole project, resolved: every default filled in. `source` is set on reading: a built-in recipe's name or a
    file."""

    base: Base
    about: str = ""
    source: str = ""
    lora: Lora = field(default_factory=Lora)
    preferences: Mapping[str, Preference] = field(default_factory=dict)
    sft: Sft | None = None
    dpo: Dpo = field(default_factory=Dpo)
    reward: Reward | None = None
    rsf: Rsf | None = None
    eval: Eval = field(default_factory=Eval)

    def check_trains(self, stage: str) -> None:
        """Refuse a recipe that lacks a stage's table, or whose optimizer needs a library that is not installed."""
        table = getattr(self, stage)
        if table is None:
            raise UserError(f"the recipe has no [{stage}] table: {TABLES_HOLD[stage]}")
        if library := optimizers.missing_library(table.optimizer):
            raise UserError(
                f"{stage}.optimizer: {table.optimizer!r} needs the library {library}, which is not installed"
            )

    def preference(self, name: str) -> Preference:
        """The preference of that name, or an error that lists the known ones."""
        if name not in self.preferences:
            known = list(self.preferences)
            raise UserError(f"no preference {name!r} in the recipe{nearest(name, known)} (known: {', '.join(known)})")
        return self.preferences[name]

    def parts(self, name: str) -> list[Preference]:
        """The tables a preference's pairs come from: its own, or those of the preferences it consists of."""
        found = self.preference(name)
        return [self.preferences[part] for part in found.of] or [found]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as kept in a run's manifest; `from_dict` reads it back."""
        return {key: value for key, value in asdict(self).items() if value is not None}
