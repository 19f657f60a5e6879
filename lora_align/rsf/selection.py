"""The choice of the best and the worst candidate for a direction, and figures about the choices."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from lora_align.console import count
from lora_align.data.pairs import reasons
from lora_align.data.rows import Prompt
from lora_align.errors import RunFailedError
from lora_align.want_direction import Want

UNUSABLE = "requests without a usable answer"  # a key of the figures
TOO_MANY = 0.5  # share of requests without a usable answer above which a run fails


@dataclass(frozen=True)
class Candidate:
    """An answer, whether it ended by itself, and its rewards by objective."""

    text: str
    ended: bool
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class Pool:
    """A prompt, a direction, and the candidates to choose from. Pools of a prompt may share one candidate list."""

    prompt: Prompt
    want: Want
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Choice:
    """A prompt, a direction, and the best and the worst candidate."""

    prompt: Prompt
    want: Want
    best: Candidate
    worst: Candidate


@dataclass(frozen=True)
class Chosen:
    """The choices of an iteration, and figures about all candidates and the chosen ones."""

    choices: list[Choice]
    figures: dict[str, Any]


def choose(pools: Sequence[Pool], watch: str) -> Chosen:
    """Choose the best and the worst usable candidate of each pool. Skip and count pools without a usable candidate.

    A candidate list that several pools share counts once in `answers` and `dropped`, and once per pool in the means.
    """
    choices = []
    dropped: Counter[str] = Counter()
    sampled, values, unusable = [], [], 0
    lists = {id(pool.candidates): pool.candidates for pool in pools}
    usable_of = {key: usable(candidates, dropped) for key, candidates in lists.items()}
    for pool in pools:
        good = usable_of[id(pool.candidates)]
        if not good:
            unusable += 1
            continue
        best, worst = extremes(good, pool.want)
        choices.append(Choice(pool.prompt, pool.want, best, worst))
        sampled += good
        values += [pool.want.value(candidate.rewards) for candidate in good]
    if not choices or 1 - len(choices) / len(pools) > TOO_MANY:
        raise RunFailedError(
            f"no usable answer for {unusable:,} of {count(len(pools), 'request')} ({reasons(dropped)}); "
            "raise rsf.max_new_tokens, or sample more answers: rsf.bootstrap for t1, rsf.samples for later policies"
        )
    objectives = list(choices[0].want.weights)
    chosen = [choice.best for choice in choices]
    shown = [*objectives, *([watch] if watch in chosen[0].rewards and watch not in objectives else [])]
    figures = {
        "answers": sum(map(len, lists.values())),
        "chosen": len(chosen),
        "dropped": {**dropped, **({UNUSABLE: unusable} if unusable else {})},
        "sampled_value": fmean(values),
        "chosen_value": fmean(choice.want.value(choice.best.rewards) for choice in choices),
        "sampled_mean": {name: fmean(candidate.rewards[name] for candidate in sampled) for name in shown},
        "chosen_mean": {name: fmean(candidate.rewards[name] for candidate in chosen) for name in shown},
    }
    if watch in shown and len(chosen) > 1:
        figures["watched"] = mean_and_error([candidate.rewards[watch] for candidate in chosen])
    return Chosen(choices, figures)


def running_figures(pools: Sequence[Pool]) -> dict[str, str]:
    """Return figures for the progress line: the last direction, and the mean value of all and of the chosen answers.

    `share` is the share of answers that are chosen for some direction.
    """
    sampled = {id(pool.candidates): len(pool.candidates) for pool in pools}
    values: list[float] = []
    chosen: list[float] = []
    best: set[tuple[Prompt, str]] = set()
    for pool in pools:
        good = usable(pool.candidates, Counter())
        if good:
            highest, _ = extremes(good, pool.want)
            values += [pool.want.value(candidate.rewards) for candidate in good]
            chosen.append(pool.want.value(highest.rewards))
            best.add((pool.prompt, highest.text))
    if not chosen:
        return {}
    return {
        "v": ",".join(f"{weight:.2f}" for weight in pools[-1].want.weights.values()),
        "sampled": f"{fmean(values):.1f}",
        "chosen": f"{fmean(chosen):.1f}",
        "share": f"{len(best) / sum(sampled.values()):.0%}",
    }


def usable(candidates: Sequence[Candidate], dropped: Counter[str]) -> list[Candidate]:
    """Return the candidates that can be trained on, each text once. Count the rejected candidates by reason."""
    by_text: dict[str, Candidate] = {}
    for candidate in candidates:
        if not candidate.text.strip():
            dropped["empty answer"] += 1
        elif not candidate.ended:
            dropped["answer not finished"] += 1
        elif not all(map(math.isfinite, candidate.rewards.values())):
            dropped["reward not finite"] += 1
        elif candidate.text in by_text:
            dropped["duplicate answer"] += 1
        else:
            by_text[candidate.text] = candidate
    return list(by_text.values())


def extremes(candidates: Sequence[Candidate], want: Want) -> tuple[Candidate, Candidate]:
    """Return the candidates with the largest and the smallest vᵀr. The first candidate wins a tie."""
    values = [want.value(candidate.rewards) for candidate in candidates]
    return candidates[values.index(max(values))], candidates[values.index(min(values))]


def is_finite(scores: Mapping[str, float], objectives: Iterable[str]) -> bool:
    """Return whether the scores by these objectives are there and finite."""
    return all(math.isfinite(scores.get(name, math.nan)) for name in objectives)


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Return a mean and its standard error."""
    return {"mean": fmean(values), "error": stdev(values) / math.sqrt(len(values))}


def has_fallen(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Return whether a mean fell by more than two standard errors of the difference."""
    return before["mean"] - now["mean"] > 2 * math.hypot(before["error"], now["error"])
