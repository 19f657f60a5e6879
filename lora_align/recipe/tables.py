"""The tables of a recipe as dataclasses, with defaults and bounds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from lora_align.errors import UserError, nearest
from lora_align.rankers import Ranker, Winner
from lora_align.recipe import optimizers

# Upper bounds exceed any practical use. They catch typing errors that would end in an overflow or an endless run.
Positive = Annotated[float, Gt(0), Le(1_000)]
Share = Annotated[float, Ge(0), Lt(1)]
Rows = Annotated[int, Ge(1), Le(1_000_000_000)]
Few = Annotated[int, Ge(1), Le(100_000)]
Tokens = Annotated[int, Ge(1), Le(10_000_000)]
Weight = Annotated[float, Ge(0), Le(1_000)]
Points = Annotated[float, Ge(-1e9), Le(1e9)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # NumPy's range


@dataclass(frozen=True)
class Base:
    """The base model. An empty `revision` or `chat_template` means the model's own.

    `fsdp` divides a 4-bit base among the training processes if it does not fit on one GPU.
    """

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
    """The shape of every adapter. `init_seed` fixes the initial A for all preferences and both directions."""

    rank: Annotated[int, Ge(1), Le(16_384)] = 16
    alpha: Annotated[float, Gt(0), Le(1e6)] = 32.0
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    init_seed: Seed = 0


@dataclass(frozen=True)
class Training:
    """The keys that all training stages share.

    `batch_size` counts rows. A batch is computed in parts of about `tokens_per_batch` tokens, which affects memory and
    speed only. `limit` is the maximum number of training rows. `warmup` below 1 is a share of the steps, otherwise
    their number. `compile` runs `torch.compile` on the base's layers; `plan --measure` shows if the time pays off. A
    checkpoint is saved every `save_minutes`.
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
    """The `[sft]` table: train the start policy's adapter on conversations."""

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
    """The `[dpo]` table: train preference adapters. `seed` orders the data and does not affect the initial A."""

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Ge(0), Le(0.5)] = 0.0


@dataclass(frozen=True)
class Preference:
    """One `[preferences.NAME]` table: where pairs come from and how they are ranked.

    `margin` is the minimum difference of two ratings or lengths. For a dataset on the hub, `split`, `revision` and
    `subset` (a configuration or a folder) choose the rows. `columns` maps known column names to those in the data.
    With `skip_bad`, unreadable rows are counted and skipped. `labels` sets the answer that each value of a label
    column prefers, as in { A = "first", B = "second", C = "tie" }. `of` combines the pairs of other preferences and
    replaces `data`.
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
        """Return the parsed `rank`."""
        return Ranker.parse(self.rank)


@dataclass(frozen=True)
class Ratings:
    """One `[reward.ratings.NAME]` table: rated answers on a scale from `low` to `high`.

    Empty `attributes` means all attributes of the data. `prefix` is put before the names of the heads.
    """

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
    """The `[reward]` table: train a reward model with one head per rated attribute and per name in `pairs`.

    `pairs` maps a head to the preference whose pairs train it. `objectives` defines means of heads. `lm_weight` is the
    weight of the language-model loss.
    """

    ratings: Mapping[str, Ratings] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    objectives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lm_weight: Weight = 0.1
    lora: Lora | None = None


@dataclass(frozen=True, kw_only=True)
class Rsf(Training):
    """The `[rsf]` table: rejection-sampling finetuning of one policy, conditioned on a direction over objectives.

    `directions` bounds the weight of each objective. `iterations` counts as in the paper, after the SteerLM-style
    policy. Each iteration uses `prompts` of its half of the data (default: all). It samples `per_prompt` directions
    for each prompt and `samples` answers for each direction. The first iteration learns from `bootstrap` answers per
    prompt, sampled from the SteerLM-style policy. The first `pooled` iterations choose among all answers to a prompt;
    later ones among the answers to one direction.

    `ask` and `steer` are Jinja templates of the system messages for a direction and for scores. `ask` may use `want`
    (the weight of each objective), `decimals` and `integers` (the weights as text); `steer` may use `scores` and
    `listed`. `watch` names the objective whose drop is reported. `beta` applies to `learn = "dpo"`.
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
class EvalSource:
    """A data source of `[eval]`; `prompts = "FILE or hub id"` is the short form.

    `where` selects rows by the values of their columns, as in `where = { label = "safe" }`.
    """

    data: str = ""
    split: str = "train"
    revision: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Eval:
    """The `[eval]` table: the test set of every policy.

    A policy gives `samples` answers to `count` of the `prompts` and to `count` of the `risky` prompts, which it should
    refuse. The loss of `text` should not rise. Up to `pairs` of the `facts` should stay known. Up to `pairs` held-out
    pairs of each preference are scored. Without `prompts`, the prompts of held-out pairs are used. Prompts that the
    recipe trains on are skipped.
    """

    prompts: EvalSource = field(default_factory=EvalSource)
    risky: EvalSource = field(default_factory=EvalSource)
    text: EvalSource = field(default_factory=EvalSource)
    facts: EvalSource = field(default_factory=EvalSource)
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
    """A whole recipe with every default filled in. `source` is the built-in recipe's name or the file it comes from."""

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
        """Return a preference by name; the error for an unknown name lists the known ones."""
        if name not in self.preferences:
            known = list(self.preferences)
            raise UserError(f"no preference {name!r} in the recipe{nearest(name, known)} (known: {', '.join(known)})")
        return self.preferences[name]

    def parts(self, name: str) -> list[Preference]:
        """Return the tables that a preference's pairs come from: those named in `of`, or else its own."""
        found = self.preference(name)
        return [self.preferences[part] for part in found.of] or [found]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as stored in a run's manifest; `from_dict` reads it back."""
        return {key: value for key, value in asdict(self).items() if value is not None}
