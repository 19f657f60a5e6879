"""The tables of a recipe as dataclasses, with defaults and bounds."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from lora_align import distributed
from lora_align.errors import NotFetchedError, UserError, nearest
from lora_align.rankers import Ranker, Winner
from lora_align.recipe import optimizers

# Upper bounds exceed any practical use. They catch typos that would end in an overflow or an endless run.
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
    """The `[base]` table: the frozen base model."""

    model: str
    """A hub id (`owner/name`), a local folder, a GGUF file (local or `owner/name/file.gguf`), or `demo`."""
    revision: str = ""
    """A branch, tag or commit of the model on the hub; empty means its default branch."""
    quantization: Literal["nf4", "none"] = "nf4"
    """The format of the weights: 4-bit NF4, or that of `dtype`."""
    double_quant: bool = True
    """Quantise the scales of NF4 as well, which saves memory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of activations; `auto` means float32 on a CPU or an Apple GPU, and bfloat16 or
    float16 on another GPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """transformers' attention implementation; `auto` means the model's own choice."""
    fsdp: bool = False
    """Shard the 4-bit base over the training processes, for a base that does not fit on one GPU."""
    chat_template: str = ""
    """A Jinja chat template, or a `.jinja` file beside the recipe; empty means the model's own."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking`."""


@dataclass(frozen=True)
class Lora:
    """The `[lora]` table: the shape of every adapter."""

    rank: Annotated[int, Ge(1), Le(16_384)] = 16
    """The rank of the adapter in every adapted module."""
    alpha: Annotated[float, Gt(0), Le(1e6)] = 32.0
    """LoRA's alpha: the update is scaled by `alpha / rank`."""
    dropout: Share = 0.0
    """The probability that LoRA dropout drops an input during training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules to adapt; `all-linear` means every linear layer but the output layer."""
    init_seed: Seed = 0
    """The seed of the initial A. All preferences and both directions start from the same A."""


@dataclass(frozen=True)
class Training:
    """The keys that all training stages share."""

    epochs: Positive = 1.0
    """Passes over the training rows."""
    learning_rate: Positive = 5e-5
    """The highest learning rate of the schedule."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """transformers' learning-rate schedule after the warm-up."""
    warmup: Annotated[float, Ge(0), Le(1e7)] = 0.03
    """Warm-up steps; a value below 1 is a share of all steps."""
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.0
    """The optimizer's weight decay."""
    max_grad_norm: Annotated[float, Gt(0), Le(1e9)] = 1.0
    """The norm to which larger gradients are clipped."""
    batch_size: Few = 16
    """Rows in an optimizer step, over all processes together; a row of `dpo` is a pair."""
    tokens_per_batch: Tokens = 4096
    """Tokens computed at once; the value changes results only by rounding and by dropout's draws."""
    max_length: Annotated[Tokens, Ge(8)] = 1024
    """The maximum number of tokens of a prompt with its answer; longer answers are truncated, and
    longer prompts are dropped."""
    optimizer: str = "adamw_torch_fused"
    """The optimizer, by its name in transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs time."""
    compile: bool = False
    """Compile the base's layers with `torch.compile`; `plan --measure` shows whether it saves time."""
    seed: Seed = 0
    """The seed of row order and dropout, and of sampling in `rsf`."""
    held_out: Share = 0.05
    """The share of prompts that are held out; small sources hold out more, except in `rsf`."""
    save_minutes: Annotated[float, Ge(0), Le(1e6)] = 10.0
    """Minutes between checkpoints."""
    limit: Rows | None = None
    """The maximum number of training rows of a source, or of prompts in `rsf`; unset means all."""
    report_to: tuple[str, ...] = ()
    """transformers' experiment trackers, such as `tensorboard`."""


@dataclass(frozen=True)
class Source:
    """The keys that all data sources share."""

    data: str = ""
    """A file, a hub id (`owner/name`), or a registered source such as `demo:pairs`; required, except in `[eval]` and
    with `of` or `more`."""
    _: KW_ONLY
    split: str = "train"
    """The split of a hub dataset."""
    revision: str = ""
    """A branch, tag or commit of a hub dataset; empty means its default branch."""
    subset: str = ""
    """A configuration of a hub dataset, or one of its folders."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The names in your data of the columns that lora-align expects, as in `{ prompt = "question" }`."""
    skip_bad: bool = False
    """Count and skip rows that cannot be read or ranked; by default the first one ends the command."""


@dataclass(frozen=True, kw_only=True)
class Sft(Training, Source):
    """The `[sft]` table: train the start policy's adapter on conversations."""

    data: Annotated[str, Len(1)] = field()
    """Conversations."""
    answers_only: bool = True
    """Limit the loss to the assistant's turns; otherwise it covers all tokens."""
    packing: bool = False
    """Let several texts share a row of up to `max_length` tokens."""
    lora: Lora | None = None
    """The LoRA shape of this stage; unset means that of `[lora]`."""


@dataclass(frozen=True)
class Dpo(Training):
    """The `[dpo]` table: train preference adapters."""

    beta: Positive = 0.1
    """DPO's β; a smaller value lets the adapter move further from the start policy."""
    label_smoothing: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """The assumed probability that a label is wrong."""


Descriptions = str | tuple[str, ...]


@dataclass(frozen=True)
class Preference(Source):
    """One `[preferences.NAME]` table: where pairs come from and how they are ranked.

    Pairs come from `data`, from other preferences (`of`), or from a description (`more`).
    """

    rank: str = "label"
    """The ranker that finds the better answer; see [rankers](your-data.md#rankers)."""
    margin: Annotated[float, Ge(0), Le(1e9)] = 0.0
    """The smallest difference of two ratings or scores, or of two lengths in characters; closer pairs are dropped."""
    labels: Mapping[str, Winner] = field(default_factory=dict)
    """The answer that each value of a label column prefers, as in `{ A = "first", B = "second", C = "tie" }`."""
    of: tuple[str, ...] = ()
    """Preferences whose pairs are combined; `of` replaces all other keys."""
    more: Descriptions = ()
    """The preferred behaviour, in place of `data`: the system prompt for the chosen answers. The texts of a list are
    spread over the prompts."""
    less: Descriptions = ()
    """A description of the opposite, for the rejected answers; without it, they are sampled without a system prompt."""
    prompts: str = ""
    """Prompts for the described pairs: a file, a hub id or a registered source; empty means a built-in list."""
    limit: Rows = 200
    """The maximum number of prompts for the described pairs."""
    match_length: bool = False
    """Pair answers of similar length, and drop prompts that have none."""
    judge: str = ""
    """Keep only pairs with which a judge agrees: `base`, the URL of a server, `text:MEASURE`, `pair:PREFERENCE` or
    `REWARD:OBJECTIVE`."""

    @property
    def described(self) -> bool:
        """Return whether a description replaces the data."""
        return bool(self.more)

    @property
    def ranker(self) -> Ranker:
        """Return the parsed `rank`."""
        return Ranker.parse(self.rank)


@dataclass(frozen=True)
class Pairs:
    """The `[pairs]` table: how `lora-align pairs` samples the answers of described preferences."""

    samples: Few = 1
    """Answers sampled under each description; with more than one, `match_length` has a choice."""
    temperature: Positive = 1.0
    """The sampling temperature."""
    max_new_tokens: Tokens = 128
    """The longest answer, in tokens; of an unfinished answer, only complete sentences are used."""
    seed: Seed = 0
    """The seed of sampling."""


@dataclass(frozen=True)
class Ratings(Source):
    """One `[reward.ratings.NAME]` table: rated answers on a scale."""

    data: Annotated[str, Len(1)] = field()
    """Rated answers."""
    low: Points = 0.0
    """The lowest rating of the scale."""
    high: Points = 4.0
    """The highest rating of the scale."""
    attributes: tuple[str, ...] = ()
    """The rated attributes to read; empty means all."""
    prefix: str = ""
    """Text that is prepended to each attribute in the name of its head."""


@dataclass(frozen=True)
class Reward(Training):
    """The `[reward]` table: train a reward model with one head per rated attribute and per name in `pairs`."""

    ratings: Mapping[str, Ratings] = field(default_factory=dict)
    """Sources of rated answers, each a table `[reward.ratings.NAME]`."""
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Heads that learn from pairs, each with the preference whose pairs train it."""
    objectives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Objectives that are means of heads, each with the list of its heads."""
    lm_weight: Weight = 0.1
    """The weight of the language-model loss on the answers; 0 turns it off."""
    lora: Lora | None = None
    """The LoRA shape of this stage; unset means that of `[lora]`."""


@dataclass(frozen=True, kw_only=True)
class Rsf(Training, Source):
    """The `[rsf]` table: rejection-sampling fine-tuning of one policy, conditioned on a direction over objectives.

    A SteerLM-style policy is trained first. Iterations are numbered from 1, as in the paper (arXiv 2402.18571).
    """

    data: Annotated[str, Len(1)] = field()
    """Prompts with answers."""
    directions: Mapping[str, tuple[float, float]]
    """Objectives, each with the lowest and the highest weight in a direction, from -1 to 1."""
    reward: str = "reward"
    """The name of the reward model that scores answers."""
    iterations: Annotated[int, Ge(1), Le(1_000)] = 4
    """The number of policies that are trained after the SteerLM-style one."""
    prompts: Rows | None = None
    """The maximum number of prompts of an iteration, sampled from its half of the data; unset means all."""
    per_prompt: Few = 5
    """Directions sampled for each prompt."""
    samples: Few = 16
    """Answers sampled for each direction, from the second iteration on."""
    bootstrap: Few = 80
    """Answers to each prompt that the SteerLM-style policy samples for iteration 1."""
    pooled: Few = 1
    """The number of initial iterations that choose among all answers to a prompt, not only those to one direction."""
    replay: Share = 0.15
    """The share of training rows that come unchanged from the data, for `learn = "sft"`."""
    temperature: Positive = 1.0
    """The sampling temperature."""
    max_new_tokens: Tokens = 512
    """The longest sampled answer, in tokens."""
    ask: str = "Your response should maximize weighted rating = {{ decimals }}"
    """A Jinja template: the system message for a direction; variables are `want`, `decimals` and `integers`."""
    steer: str = "Your response should be rated {{ listed }}"
    """A Jinja template: the system message for scores; variables are `scores` and `listed`."""
    watch: str = "harmlessness"
    """The objective that is watched: a warning is printed if its mean falls from one policy to the next."""
    learn: Literal["sft", "dpo"] = "sft"
    """The training of an iteration: SFT on the best answers, or DPO of the best over the worst."""
    answers_only: bool = True
    """Limit the SFT loss to the assistant's turns; otherwise it covers all tokens."""
    beta: Positive = 0.1
    """DPO's β, for `learn = "dpo"`."""
    packing: bool = True
    """Let several texts share a row of up to `max_length` tokens."""
    lora: Lora | None = None
    """The LoRA shape of this stage; unset means that of `[lora]`."""


@dataclass(frozen=True)
class EvalSource(Source):
    """A data source of `[eval]`. `prompts = "FILE or hub id"` is short for a table with `data` alone."""

    where: Mapping[str, Any] = field(default_factory=dict)
    """Values that columns of a row must have, as in `{ label = "safe" }`."""


@dataclass(frozen=True)
class Eval:
    """The `[eval]` table: the test set of every policy. Prompts that the recipe trains on are skipped."""

    prompts: EvalSource = field(default_factory=EvalSource)
    """Prompts to answer; if neither `prompts` nor `risky` is set, those of held-out pairs are used."""
    risky: EvalSource = field(default_factory=EvalSource)
    """Prompts that a policy should refuse."""
    text: EvalSource = field(default_factory=EvalSource)
    """Ordinary text; its loss should not rise."""
    facts: EvalSource = field(default_factory=EvalSource)
    """Facts, each with a right answer and wrong ones; they should stay known."""
    count: Few = 64
    """The maximum number of prompts, of risky prompts, and of texts."""
    samples: Few = 4
    """Answers to each prompt."""
    pairs: Few = 128
    """The maximum number of held-out pairs of each preference, and of facts."""
    temperature: Positive = 1.0
    """The sampling temperature."""
    max_new_tokens: Tokens = 256
    """The longest answer, in tokens."""
    seed: Seed = 0
    """The seed of sampling."""


MISSING_TABLE_HINTS = {  # stage → what to do if the recipe has no such table
    "sft": "the start policy is the base, and `dpo` can run at once",
    "reward": "add ratings in [reward.ratings.NAME], or preferences in [reward.pairs]",
    "rsf": "add one with `data`, and with bounds in [rsf.directions]",
}


@dataclass(frozen=True)
class Recipe:
    """A whole recipe: its tables, with every default filled in."""

    base: Base
    """The base model."""
    about: str = ""
    """A line that `lora-align recipes` shows."""
    source: str = ""
    """The name of the built-in recipe, or the file, that was read; never set by hand."""
    lora: Lora = field(default_factory=Lora)
    """The shape of the adapters."""
    preferences: Mapping[str, Preference] = field(default_factory=dict)
    """The preferences, each a table `[preferences.NAME]`."""
    pairs: Pairs = field(default_factory=Pairs)
    """Sampling of pairs from descriptions."""
    sft: Sft | None = None
    """Training of the start policy's adapter; without the table, the start policy is the base."""
    dpo: Dpo = field(default_factory=Dpo)
    """Training of the preference adapters."""
    reward: Reward | None = None
    """Training of the reward model."""
    rsf: Rsf | None = None
    """Training of the conditioned policy."""
    eval: Eval = field(default_factory=Eval)
    """The test set of every policy."""

    def check_trains(self, stage: str) -> None:
        """Refuse a recipe that cannot train a stage: no table, a missing optimizer library, rsf on a sharded base."""
        table = getattr(self, stage)
        if table is None:
            raise UserError(f"the recipe has no [{stage}] table: {MISSING_TABLE_HINTS[stage]}")
        if library := optimizers.missing_library(table.optimizer):
            raise UserError(
                f"{stage}.optimizer: {table.optimizer!r} needs the library {library}; install it, or choose another"
            )
        if stage == "rsf" and self.base.fsdp and distributed.world_size() > 1:
            raise UserError(
                "base.fsdp: rsf cannot sample from a sharded base; start one process, or use a base that one GPU holds"
            )

    def preference(self, name: str) -> Preference:
        """Return a preference by name; the error for an unknown name lists the known ones."""
        if name not in self.preferences:
            known = list(self.preferences)
            raise UserError(
                f"no preference {name!r} in the recipe{nearest(name, known)} (known: {', '.join(known) or 'none'})"
            )
        return self.preferences[name]

    def parts(self, name: str) -> list[Preference]:
        """Return the tables that a preference's pairs come from: those named in `of`, or else its own.

        A described preference whose pairs were not made yet is refused. Its `columns` are those of its prompts.
        """
        parts = {part: self.preferences[part] for part in self.preference(name).of or (name,)}
        for part, table in parts.items():
            if table.described and not table.data:
                raise NotFetchedError(
                    f"preferences.{part}: no pairs were made from this description; `lora-align pairs --pref {part}` "
                    "makes them"
                )
        return [replace(table, columns={}) if table.described else table for table in parts.values()]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as stored in a run's manifest; `from_dict` reads it back.

        The `data` of described preferences is left out, because it is the file of their pairs in the runs folder.
        """
        plain = {key: value for key, value in asdict(self).items() if value is not None}
        for name, table in self.preferences.items():
            if table.described:
                plain["preferences"][name]["data"] = ""
        return plain
