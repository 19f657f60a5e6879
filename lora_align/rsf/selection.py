"""The best and the worst of several answers in the eyes of somebody who wants a direction."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from lora_align.data.rows import Prompt
from lora_align.errors import RunFailedError
from lora_align.want import Want

TOO_MANY = 0.5  # share of requests without a usable answer from which on nothing is to be learned


@dataclass(frozen=True)
class Candidate:
    """An answer, whether it came to its own end, and what the reward model gives it."""

    text: str
    ended: bool
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """A prompt, what is wanted of it, and the best and the worst answer found."""

    prompt: Prompt
    want: Want
    best: Candidate
    worst: Candidate


@dataclass(frozen=True)
class Chosen:
    """The choices of an iteration, and figures about what they were chosen from."""

    choices: list[Choice]
    figures: dict[str, Any]


def choose(asked: Sequence[tuple[Prompt, Want, Sequence[Candidate]]], watch: str) -> Chosen:
    """The best and the worst candidate for each direction; directions without candidates are counted.

    Several directions may share their candidates; those are counted once.
    """
    choices = []
    dropped: Counter[str] = Counter()
    drawn, values = [], []
    pools = {id(candidates): candidates for *_, candidates in asked}
    good_of = {key: usable(pool, dropped) for key, pool in pools.items()}
    for prompt, want, candidates in asked:
        good = good_of[id(candidates)]
        if not good:
            dropped["requests without a usable answer"] += 1
            continue
        best, worst = extremes(good, want)
        choices.append(Choice(prompt, want, best, worst))
        drawn += good
        values += [want.value(candidate.rewards) for candidate in good]
    if not choices or 1 - len(choices) / len(asked) > TOO_MANY:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise RunFailedError(f"{len(asked) - len(choices)} of {len(asked)} requests have no usable answer ({reasons})")
    wanted = list(choices[0].want.weights)
    kept = [choice.best for choice in choices]
    shown = [*wanted, *([watch] if watch in kept[0].rewards and watch not in wanted else [])]
    figures = {
        "answers": sum(map(len, pools.values())),
        "kept": len(kept),
        "dropped": dict(dropped),
        "drawn_value": fmean(values),
        "kept_value": fmean(choice.want.value(choice.best.rewards) for choice in choices),
        "drawn_mean": {name: fmean(candidate.rewards[name] for candidate in drawn) for name in shown},
        "kept_mean": {name: fmean(candidate.rewards[name] for candidate in kept) for name in shown},
    }
    if watch in shown and len(kept) > 1:
        figures["watched"] = spread([candidate.rewards[watch] for candidate in kept])
    return Chosen(choices, figures)


def glimpse(asked: Sequence[tuple[Prompt, Want, Sequence[Candidate]]]) -> dict[str, str]:
    """Of a few choices while more are drawn: the last direction, the value of all answers and of those kept, as text.

    The share is that of the answers that somebody keeps.
    """
    drawn = {id(pool): len(pool) for *_, pool in asked}
    values: list[float] = []
    kept: list[float] = []
    best: set[tuple[Prompt, str]] = set()
    for prompt, want, pool in asked:
        good = usable(pool, Counter())
        if good:
            chosen, _ = extremes(good, want)
            values += [want.value(candidate.rewards) for candidate in good]
            kept.append(want.value(chosen.rewards))
            best.add((prompt, chosen.text))
    if not kept:
        return {}
    return {
        "at": ",".join(f"{weight:.2f}" for weight in asked[-1][1].weights.values()),
        "drawn": f"{fmean(values):.1f}",
        "kept": f"{fmean(kept):.1f}",
        "share": f"{len(best) / sum(drawn.values()):.0%}",
    }


def usable(candidates: Sequence[Candidate], dropped: Counter[str]) -> list[Candidate]:
    """Those one may learn from, in their order, each text once; the others are counted by reason."""
    kept: dict[str, Candidate] = {}
    for candidate in candidates:
        if not candidate.text.strip():
            dropped["empty"] += 1
        elif not candidate.ended:
            dropped["cut off"] += 1
        elif not all(map(math.isfinite, candidate.rewards.values())):
            dropped["reward not finite"] += 1
        elif candidate.text in kept:
            dropped["said twice"] += 1
        else:
            kept[candidate.text] = candidate
    return list(kept.values())


def extremes(candidates: Sequence[Candidate], want: Want) -> tuple[Candidate, Candidate]:
    """The best and the worst by vᵀr; of equal ones the first."""
    values = [want.value(candidate.rewards) for candidate in candidates]
    return candidates[values.index(max(values))], candidates[values.index(min(values))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """A mean and its standard error."""
    return {"mean": fmean(values), "error": stdev(values) / math.sqrt(len(values))}


def fell(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether a mean is lower than another beyond chance."""
    return before["mean"] - now["mean"] > 2 * math.hypot(before["error"], now["error"])
