"""The rows, passes and training job of each stage of a recipe, as the estimate needs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from lora_align.console import Screen
from lora_align.data import sources
from lora_align.data.rows import Prompt, with_system_prompt
from lora_align.errors import NotFetchedError
from lora_align.model.base import Base
from lora_align.model.logprobs import Reader
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.tokenise import TokenPair, TokenText
from lora_align.plan import shapes
from lora_align.recipe import Lora, Recipe, Sft, Source, Training
from lora_align.rsf import finetune, inputs, sampling_requests
from lora_align.rsf.candidates import BATCH
from lora_align.train import dpo, reward, reward_loss, sft, token_rows
from lora_align.train.job import Job
from lora_align.train.lora_trainer import MEASURE_AT_MOST
from lora_align.train.row_files import LazyRows, concat
from lora_align.train.stepper import Loss

TUNE_PAIRS, TUNE_PASSES = 48, 8  # pairs of each preference that `tune` reads, and about how often
SAMPLED_ROWS = 1000  # rated answers whose lengths are counted; the others are assumed to be like them
UNKNOWN_ROWS = 1000  # assumed rows of a source if the data is not available and the recipe sets no limit
Lengths = tuple[int, int]  # tokens of a prompt and of its answer


@dataclass(frozen=True)
class SamplingWork:
    """The answers that a stage samples, and some of the prompts that it samples them for."""

    answers: int  # total over all policies
    prompts: Sequence[Prompt]
    per_prompt: int
    sampling: Sampling


@dataclass(frozen=True)
class Stage:
    """A stage's training job, and how often it runs."""

    name: str
    job: Job[Any]
    passes: int  # over the rows: one for each direction in `dpo`
    referenced: bool = False  # whether the start policy's log-probabilities of all rows are computed first
    judged: Sequence[Any] = ()  # rows read without training after each pass: held-out rows, or answers that are scored
    readings: int = 1  # forward passes over the judged rows
    assumed: str = ""  # why the plan assumes rows instead of reading them
    sampling_work: SamplingWork | None = None
    trains: bool = True  # False: tune trains no adapter, it runs existing vectors

    @property
    def settings(self) -> Training:
        return self.job.settings

    def with_settings(self, lora: Lora | None = None, **settings: Any) -> "Stage":
        """Return the stage with other settings, and another LoRA shape if one is given."""
        job = replace(self.job, settings=replace(self.settings, **settings), lora=lora or self.job.lora)
        return replace(self, job=job)

    def loss(self, model: PreTrainedModel) -> Loss[Any]:
        """Return the loss over a model, which may be on the meta device."""
        return self.job.loss(model, Reader.unchecked(model))

    @property
    def table(self) -> str:
        """Return the recipe's table that holds the settings."""
        return self.name if self.trains else "dpo"


def stage_of(recipe: Recipe, name: str, base: Base, screen: Screen) -> Stage | None:
    """Return a stage, or None if the recipe does not have it.

    If the data or the base's tokenizer is not available, rows of the maximum length are assumed.
    """
    if not (recipe.preferences if name in ("dpo", "tune") else getattr(recipe, name)):
        return None
    try:
        for source in _sources(recipe, name):
            sources.refuse_missing(source.data)
        if shapes.is_shipped(base):
            raise NotFetchedError("the base's tokenizer is not available")
        return _STAGES[name](recipe, base, screen)
    except NotFetchedError as fault:
        why = f"rows of the maximum length are assumed ({UNKNOWN_ROWS:,} of each source without a limit): {fault}"
        return replace(_ASSUMED[name](recipe, base), assumed=why)


def _sources(recipe: Recipe, name: str) -> list[Source]:
    """Return the data sources of a stage that are not combined from others."""
    tables: list[Source | None] = [recipe.sft if name == "sft" else recipe.rsf]
    if name == "reward" and recipe.reward:
        ranked = [recipe.preferences[of] for of in recipe.reward.pairs.values()]
        tables = [*recipe.reward.ratings.values(), *ranked]
    elif name in ("dpo", "tune"):
        tables = list(recipe.preferences.values())
    return [table for table in tables if table and table.data]


def _sft(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    assert recipe.sft is not None
    texts = token_rows.read_token_texts(recipe.sft, base, screen)
    held_out = [[text] for text in texts.held_out[:MEASURE_AT_MOST]]
    job = sft.sft_job(recipe.sft, recipe.sft.lora or recipe.lora, texts.train, base)
    return Stage("sft", job, 1, judged=held_out, readings=2)


def _dpo(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    pairs = [dpo.prepare(recipe, name, base, screen) for name in recipe.preferences]
    job = dpo.dpo_job(recipe.dpo, recipe.lora, concat([of.train for of in pairs]), base)
    held_out = concat([of.held_out[:MEASURE_AT_MOST] for of in pairs])
    return Stage("dpo", job, 2, referenced=True, judged=held_out)


def _tune(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    pairs = [dpo.prepare(recipe, name, base, screen).train[:TUNE_PAIRS] for name in recipe.preferences]
    return _tune_stage(recipe, base, concat(pairs))


def _tune_stage(recipe: Recipe, base: Base, pairs: Sequence[TokenPair]) -> Stage:
    """Return the stage of `tune`: forward and backward through all vectors, each made of two adapters."""
    settings = replace(recipe.dpo, epochs=1.0)
    lora = replace(recipe.lora, rank=2 * recipe.lora.rank * len(recipe.preferences))
    return Stage("tune", dpo.dpo_job(settings, lora, pairs, base), TUNE_PASSES, trains=False)


def _reward(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    settings = recipe.reward
    assert settings is not None
    data = reward.prepare(recipe, settings, base, screen)
    job = reward.reward_job(settings, settings.lora or recipe.lora, data.heads, data.train, base)
    return Stage("reward", job, 1, judged=reward_loss.sample_held_out(data.held_out))


def _rsf(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    settings = recipe.rsf
    assert settings is not None
    halves = inputs.answers_of(settings, base).halves
    requested = [
        sampling_requests.for_directions(settings, sampling_requests.prompts(settings, halves[(t - 1) % 2], t), t)
        for t in range(1, settings.iterations + 1)
    ]
    per_request = [sampling_requests.answers_per_request(settings, t) for t in range(1, settings.iterations + 1)]
    answers = sum(len(requests) * n for requests, n in zip(requested, per_request, strict=True))
    prompts = [with_system_prompt(of.system, of.prompt) for of in requested[-1][: max(1, BATCH // settings.samples)]]
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed)
    work = SamplingWork(answers, prompts, per_request[-1], sampling)
    why = f"answers of {settings.max_new_tokens} tokens are assumed, because rsf samples its rows while it runs"
    longest = min(settings.max_length, base.max_length)

    def lengths(prompt: Prompt, answer: int) -> Lengths:
        """Return the tokens of a prompt and of its answer, truncated as in training."""
        tokens = min(len(base.chat.prompt_ids(prompt)), longest - 1)
        return tokens, min(answer, longest - tokens)

    asked = [
        lengths(with_system_prompt(of.system, of.prompt), settings.max_new_tokens) for of in max(requested, key=len)
    ]
    request = max(sampling_requests.example_messages(settings), key=len)
    known = halves[1][:: max(1, len(halves[1]) // SAMPLED_ROWS)]
    rated = [
        lengths(with_system_prompt(request, of.prompt), len(base.chat.tokenizer(of.answer)["input_ids"]) + 1)
        for of in known
    ]
    stage = _rsf_stage(recipe, base, asked, _repeated(rated, len(halves[1])), answers)
    return replace(stage, assumed=why, sampling_work=work)


def _rsf_stage(recipe: Recipe, base: Base, asked: Sequence[Lengths], rated: Sequence[Lengths], answers: int) -> Stage:
    """Return the stage of `rsf`, from the tokens of each request's prompt and answer, and of each rated answer.

    The SteerLM-style policy trains on all rated answers, every later policy on one answer for each request. With
    `learn = "sft"`, replayed answers are added; the plan assumes that they are equally long. Rated and sampled answers
    are scored.
    """
    settings = recipe.rsf
    assert settings is not None
    lora, scored = settings.lora or recipe.lora, concat([rated, _repeated(asked, answers)])
    if settings.learn == "dpo":  # rated answers count as pairs with the same number of tokens
        pairs = LazyRows(settings.iterations * len(asked), lambda i: _pair(*asked[i % len(asked)]))
        trained = concat([pairs, LazyRows(len(rated), lambda i: _pair(sum(rated[i]) - 2, 1))])
        job: Job[Any] = dpo.dpo_job(finetune.dpo_settings(settings), lora, trained, base)
        judged = LazyRows(len(scored), lambda i: _pair(sum(scored[i]) - 2, 1))
        return Stage("rsf", job, 1, referenced=True, judged=judged)
    chosen = settings.iterations * (len(asked) + finetune.replayed(settings, len(asked)))
    rows = concat([_repeated(asked, chosen), rated])
    job = sft.sft_job(settings, lora, LazyRows(len(rows), lambda i: _text(*rows[i])), base)
    return Stage("rsf", job, 1, judged=LazyRows(len(scored), lambda i: [_text(*scored[i])]))


def _repeated(rows: Sequence[Lengths], count: int) -> Sequence[Lengths]:
    """Return `count` rows, by repeating some."""
    return LazyRows(count, lambda i: rows[i % len(rows)])


_STAGES: dict[str, Callable[[Recipe, Base, Screen], Stage]] = {
    "sft": _sft,
    "dpo": _dpo,
    "reward": _reward,
    "rsf": _rsf,
    "tune": _tune,
}


def _assumed_sft(recipe: Recipe, base: Base) -> Stage:
    settings = recipe.sft
    assert settings is not None
    job = _longest_texts(settings, settings.lora or recipe.lora, settings.limit or UNKNOWN_ROWS, base)
    return Stage("sft", job, 1, judged=_held_out(job, MEASURE_AT_MOST), readings=2)


def _assumed_dpo(recipe: Recipe, base: Base) -> Stage:
    pairs = _longest_pairs(recipe.dpo, (recipe.dpo.limit or UNKNOWN_ROWS) * len(recipe.preferences), base)
    job = dpo.dpo_job(recipe.dpo, recipe.lora, pairs, base)
    most = MEASURE_AT_MOST * len(recipe.preferences)
    return Stage("dpo", job, 2, referenced=True, judged=_held_out(job, most))


def _held_out(job: Job[Any], most: int) -> Sequence[Any]:
    """Return as many held-out rows as the recipe's share asks for, all of the maximum length."""
    return job.rows[: min(round(job.settings.held_out * len(job.rows)), most)]


def _assumed_tune(recipe: Recipe, base: Base) -> Stage:
    return _tune_stage(recipe, base, _longest_pairs(recipe.dpo, TUNE_PAIRS * len(recipe.preferences), base))


def _longest_pairs(settings: Training, count: int, base: Base) -> LazyRows[TokenPair]:
    """Return `count` pairs of the maximum length."""
    pair = _pair(*_longest(settings, base))
    return LazyRows(count, lambda _: pair)


def _longest(settings: Training, base: Base) -> tuple[int, int]:
    """Return the tokens of the prompt and of the answer in a row of the maximum length."""
    longest = min(settings.max_length, base.max_length)
    return longest // 4, longest - longest // 4


def _pair(prompt: int, answer: int) -> TokenPair:
    """Return a pair with this number of tokens in the prompt and in each answer."""
    return TokenPair([0] * prompt, [0] * answer, [0] * answer, (0.0, 0.0))


def _text(prompt: int, answer: int) -> TokenText:
    """Return a conversation with this number of tokens, all of which count for the loss."""
    return TokenText([0] * (prompt + answer), [0] * (prompt + answer))


def _assumed_reward(recipe: Recipe, base: Base) -> Stage:
    settings = recipe.reward
    assert settings is not None
    prompt, answer = _longest(settings, base)
    rated = [of.prefix + name for of in settings.ratings.values() for name in of.attributes or ("rating",)]
    heads = dict.fromkeys((*rated, *settings.pairs), reward.UNRATED)
    example = reward_loss.Example((([0] * prompt, [0] * answer),), (0.0,) * len(heads))
    rows = LazyRows((settings.limit or UNKNOWN_ROWS) * len((*settings.ratings, *settings.pairs)), lambda _: example)
    job = reward.reward_job(settings, settings.lora or recipe.lora, heads, rows, base)
    return Stage("reward", job, 1, judged=_held_out(job, reward_loss.MEASURE_AT_MOST))


def _assumed_rsf(recipe: Recipe, base: Base) -> Stage:
    settings = recipe.rsf
    assert settings is not None
    prompts = settings.prompts or settings.limit or UNKNOWN_ROWS
    per_request = [sampling_requests.answers_per_request(settings, t) for t in range(1, settings.iterations + 1)]
    asked = [_longest(settings, base)] * prompts * settings.per_prompt
    rated = [_longest(settings, base)] * ((settings.limit or UNKNOWN_ROWS) // 2)
    return _rsf_stage(recipe, base, asked, rated, len(asked) * sum(per_request))


_ASSUMED: dict[str, Callable[[Recipe, Base], Stage]] = {
    "sft": _assumed_sft,
    "dpo": _assumed_dpo,
    "reward": _assumed_reward,
    "rsf": _assumed_rsf,
    "tune": _assumed_tune,
}


def _longest_texts(settings: Sft, lora: Lora, count: int, base: Base) -> Job[Any]:
    """Return a job of `count` rows of the maximum length, with two texts per row if the recipe packs."""
    longest = min(settings.max_length, base.max_length)
    parts = [longest // 2, longest - longest // 2] if settings.packing else [longest]
    row = [_text(0, part) for part in parts]
    return replace(sft.sft_job(settings, lora, [], base), rows=LazyRows(count, lambda _: row))
