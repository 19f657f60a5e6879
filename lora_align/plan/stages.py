"""The rows and the objective of each stage, for the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from lora_align.console import Screen
from lora_align.data.rows import Prompt, with_system_prompt
from lora_align.errors import NotFetchedError
from lora_align.model.base import Base
from lora_align.model.decoding import Sampling
from lora_align.model.logprobs import Reader
from lora_align.model.reward_model import Heads
from lora_align.model.tokenise import TokenPair, TokenText
from lora_align.plan import shapes
from lora_align.recipe import Lora, Recipe, Reward, Training
from lora_align.rsf import inputs, sampling_requests
from lora_align.rsf.candidates import AT_ONCE
from lora_align.train import dpo, reward, reward_loss, sft
from lora_align.train import token_rows as materials
from lora_align.train.row_files import LazyRows, concat
from lora_align.train.stepper import Loss

TUNED, LOOKS = 48, 8  # pairs of each preference that `tune` reads, and about how many passes it makes over them
UNKNOWN_ROWS = 1000  # rows of a source, if neither the data nor a limit gives the number


@dataclass(frozen=True)
class SamplingWork:
    """The answers that a stage samples, and some of the prompts that it samples them for."""

    answers: int  # in all, over all policies
    asked: Sequence[Prompt]
    each: int  # answers to a prompt
    sampling: Sampling


@dataclass(frozen=True)
class Stage:
    """A stage's settings, rows and objective."""

    name: str
    settings: Training
    lora: Lora
    rows: Sequence[Any]
    objective: Callable[[PreTrainedModel], Loss[Any]]
    passes: int  # over the rows; each trains one adapter
    referenced: bool = False  # the start policy's log-probabilities are computed first
    assumed: str = ""  # why the plan assumes rows instead of reading them
    drawing: SamplingWork | None = None
    trains: bool = True  # False: tune trains no adapter, it runs existing vectors

    @property
    def table(self) -> str:
        """The recipe's table that holds the settings."""
        return self.name if self.trains else "dpo"


def stage_of(recipe: Recipe, name: str, base: Base, screen: Screen) -> Stage | None:
    """Return a stage, or None if the recipe does not have it.

    If the data or the base's tokenizer is not available, rows of the maximum length are assumed.
    """
    if not (recipe.preferences if name in ("dpo", "tune") else getattr(recipe, name)):
        return None
    try:
        if shapes.is_shipped(base):
            raise NotFetchedError("the base's tokenizer is not available")
        return _STAGES[name](recipe, base, screen)
    except NotFetchedError as fault:
        why = f"rows of the maximum length are assumed ({UNKNOWN_ROWS:,} of each source without a limit): {fault}"
        return replace(_ASSUMED[name](recipe, base), assumed=why)


def _sft(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    assert recipe.sft is not None
    found = materials.read_token_texts(recipe.sft, base, screen).train
    packs = sft.packed(found, recipe.sft, base)
    return Stage("sft", recipe.sft, recipe.sft.lora or recipe.lora, packs, _sft_loss(base), 1)


def _dpo(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    found = [dpo.prepare(recipe, name, base, screen).train for name in recipe.preferences]
    return Stage("dpo", recipe.dpo, recipe.lora, concat(found), _dpo_loss(recipe, base), 2, referenced=True)


def _tune(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    found = [dpo.prepare(recipe, name, base, screen).train[:TUNED] for name in recipe.preferences]
    return _tune_stage(recipe, base, concat(found))


def _tune_stage(recipe: Recipe, base: Base, rows: Sequence[TokenPair]) -> Stage:
    """Return the stage of `tune`: forward and backward through all vectors, each made of two adapters."""
    settings = replace(recipe.dpo, epochs=1.0)
    lora = replace(recipe.lora, rank=2 * recipe.lora.rank * len(recipe.preferences))
    return Stage("tune", settings, lora, rows, _dpo_loss(recipe, base), LOOKS, trains=False)


def _reward(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    settings = recipe.reward
    assert settings is not None
    found = reward.prepare(recipe, settings, base, screen)
    return Stage(
        "reward", settings, settings.lora or recipe.lora, found.train, _reward_loss(found.heads, settings, base), 1
    )


def _rsf(recipe: Recipe, base: Base, screen: Screen) -> Stage:
    settings = recipe.rsf
    assert settings is not None
    halves = inputs.answers_of(settings, base).halves
    requested = [
        sampling_requests.for_directions(settings, sampling_requests.prompts(settings, halves[(t - 1) % 2], t), t)
        for t in range(1, settings.iterations + 1)
    ]
    answers = sum(len(requests) * sampling_requests.each(settings, t) for t, requests in enumerate(requested, 1))
    some = [with_system_prompt(of.system, of.prompt) for of in requested[-1][: max(1, AT_ONCE // settings.samples)]]
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed)
    drawing = SamplingWork(answers, some, sampling_requests.each(settings, settings.iterations), sampling)
    why = "rows of the maximum length are assumed, because rsf samples its rows while it runs"
    return replace(_rsf_stage(recipe, base, max(map(len, requested))), assumed=why, drawing=drawing)


def _rsf_stage(recipe: Recipe, base: Base, rows: int) -> Stage:
    """Return the stage of `rsf`: every policy, the SteerLM-style one included, trains on `rows` rows of the maximum
    length."""
    settings = recipe.rsf
    assert settings is not None
    longest = min(settings.max_length, base.max_length)
    same = LazyRows(rows, lambda _: _texts(longest, several=settings.packing))
    return Stage("rsf", settings, settings.lora or recipe.lora, same, _sft_loss(base), settings.iterations + 1)


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
    longest = min(settings.max_length, base.max_length)
    rows = LazyRows(settings.limit or UNKNOWN_ROWS, lambda _: _texts(longest, several=settings.packing))
    return Stage("sft", settings, settings.lora or recipe.lora, rows, _sft_loss(base), 1)


def _assumed_dpo(recipe: Recipe, base: Base) -> Stage:
    rows = _longest_pairs(recipe, base, recipe.dpo.limit or UNKNOWN_ROWS)
    return Stage("dpo", recipe.dpo, recipe.lora, rows, _dpo_loss(recipe, base), 2, referenced=True)


def _assumed_tune(recipe: Recipe, base: Base) -> Stage:
    return _tune_stage(recipe, base, _longest_pairs(recipe, base, TUNED))


def _longest_pairs(recipe: Recipe, base: Base, each: int) -> LazyRows[TokenPair]:
    """Return `each` pairs of the maximum length for each preference."""
    longest = min(recipe.dpo.max_length, base.max_length)
    prompt = longest // 4
    pair = TokenPair([0] * prompt, [0] * (longest - prompt), [0] * (longest - prompt), (0.0, 0.0))
    return LazyRows(each * len(recipe.preferences), lambda _: pair)


def _assumed_reward(recipe: Recipe, base: Base) -> Stage:
    settings = recipe.reward
    assert settings is not None
    longest = min(settings.max_length, base.max_length)
    rated = [of.prefix + name for of in settings.ratings.values() for name in of.attributes or ("rating",)]
    heads = dict.fromkeys((*rated, *settings.pairs), reward.UNRATED)
    example = reward_loss.Example((([0] * (longest // 4), [0] * (longest - longest // 4)),), (0.0,) * len(heads))
    rows = LazyRows((settings.limit or UNKNOWN_ROWS) * len((*settings.ratings, *settings.pairs)), lambda _: example)
    return Stage("reward", settings, settings.lora or recipe.lora, rows, _reward_loss(heads, settings, base), 1)


def _assumed_rsf(recipe: Recipe, base: Base) -> Stage:
    assert recipe.rsf is not None
    return _rsf_stage(recipe, base, (recipe.rsf.prompts or recipe.rsf.limit or UNKNOWN_ROWS) * recipe.rsf.per_prompt)


_ASSUMED: dict[str, Callable[[Recipe, Base], Stage]] = {
    "sft": _assumed_sft,
    "dpo": _assumed_dpo,
    "reward": _assumed_reward,
    "rsf": _assumed_rsf,
    "tune": _assumed_tune,
}


def _texts(length: int, *, several: bool) -> list[TokenText]:
    parts = [length // 2, length - length // 2] if several else [length]
    return [TokenText([0] * part, [0] * part) for part in parts]


def _sft_loss(base: Base) -> Callable[[PreTrainedModel], Loss[Any]]:
    return lambda model: sft.SftLoss(Reader.unchecked(model), base.chat)


def _reward_loss(
    known: Mapping[str, tuple[float, float]], settings: Reward, base: Base
) -> Callable[[PreTrainedModel], Loss[Any]]:
    def objective(model: PreTrainedModel) -> reward_loss.RewardLoss:
        means, deviations = ({name: pair[i] for name, pair in known.items()} for i in (0, 1))
        heads = Heads(model.config.get_text_config().hidden_size, means, deviations)
        return reward_loss.RewardLoss(Reader.unchecked(model), heads, settings.lm_weight, base.chat)

    return objective


def _dpo_loss(recipe: Recipe, base: Base) -> Callable[[PreTrainedModel], Loss[Any]]:
    settings = recipe.dpo
    return lambda model: dpo.DpoLoss(Reader.unchecked(model), base.chat, settings.beta, settings.label_smoothing)
