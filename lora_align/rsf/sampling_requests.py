"""The requests of a round of rejection sampling, and the system messages that answers are learned behind."""

import random
from collections.abc import Mapping, Sequence

from lora_align import want
from lora_align.data.rows import Conversation, Message, Prompt, Rated, prompt_key, with_system_prompt
from lora_align.errors import UserError
from lora_align.recipe import Rsf
from lora_align.rsf.candidates import Request
from lora_align.rsf.selection import Candidate, Choice
from lora_align.want import Want

EXAMPLES = 20  # wishes put into words to see what a template does
Scores = Mapping[str, float]


def check(settings: Rsf) -> None:
    """Refuse a region without directions, templates that do not tell one wish from another, and pairs of one answer."""
    if settings.learn == "dpo" and settings.samples < 2:
        raise UserError('rsf.samples: rsf.learn = "dpo" sets one answer against another, and needs 2 or more')
    if settings.bootstrap % settings.per_prompt:
        raise UserError(
            f"rsf.bootstrap: {settings.bootstrap} answers a prompt do not divide among its {settings.per_prompt} "
            "requests (rsf.per_prompt)"
        )
    draw = random.Random(0)
    scores = [{name: draw.uniform(0, 100) for name in settings.directions} for _ in range(EXAMPLES)]
    steers = {want.scores_prompt(of, settings.steer) for of in scores}
    for key, texts in (("ask", examples(settings)), ("steer", steers)):
        if len(texts) == 1:
            raise UserError(f"rsf.{key}: says {texts.pop()!r} whatever is wanted")


def examples(settings: Rsf) -> set[str]:
    """What asks for some directions of the region."""
    draw = random.Random(0)
    return {want.sample_direction(settings.directions, draw).asked(settings.ask) for _ in range(EXAMPLES)}


def prompts(settings: Rsf, half: Sequence[Rated], t: int) -> list[Prompt]:
    """As many of a half's prompts as the recipe wants answered, each time others, in the order of the data."""
    found = list(dict.fromkeys(row.prompt for row in half))
    draw = random.Random(f"{settings.seed} prompts {t}")
    kept = sorted(draw.sample(range(len(found)), min(settings.prompts or len(found), len(found))))
    return [found[index] for index in kept]


def each(settings: Rsf, t: int) -> int:
    """Return how many answers a request of an iteration gets; the first iteration asks the SteerLM-style policy."""
    return settings.samples if t > 1 else max(1, settings.bootstrap // settings.per_prompt)


def for_scores(settings: Rsf, asked: Sequence[Prompt], seen: Sequence[Scores]) -> list[Request]:
    """What the SteerLM-style policy is asked for: scores, each some answer's own, so that none is out of reach."""
    requests: list[Request] = []
    for prompt in asked:
        draw = random.Random(f"{settings.seed} targets {prompt_key(prompt)}")
        texts = (want.scores_prompt(draw.choice(seen), settings.steer) for _ in range(settings.per_prompt))
        requests += (Request(prompt, system, number) for number, system in enumerate(texts))
    return requests


def for_directions(settings: Rsf, asked: Sequence[Prompt], t: int) -> list[Request]:
    """What a conditioned policy is asked for."""
    return [
        Request(prompt, of.asked(settings.ask), number, of)
        for prompt in asked
        for number, of in enumerate(_wants(settings, prompt, t))
    ]


def wanted_pools(
    settings: Rsf, requests: Sequence[Request], candidates: Mapping[str, Sequence[Candidate]], t: int
) -> list[tuple[Prompt, Want, Sequence[Candidate]]]:
    """Each prompt with a direction drawn for it and the answers to choose from: those asked for that direction.

    In the first `pooled` iterations the candidates are all answers to the prompt: an early policy may satisfy one
    direction when asked for another.
    """
    if t > settings.pooled:
        return [(of.prompt, of.want, candidates.get(of.key, ())) for of in requests if of.want]
    pools: dict[Prompt, list[Candidate]] = {}
    for request in requests:
        pools.setdefault(request.prompt, []).extend(candidates.get(request.key, ()))
    return [(prompt, of, pool) for prompt, pool in pools.items() for of in _wants(settings, prompt, t)]


def as_asked(settings: Rsf, choice: Choice) -> Prompt:
    """The prompt under the message that asks for what was wanted."""
    return with_system_prompt(choice.want.asked(settings.ask), choice.prompt)


def best(settings: Rsf, choice: Choice) -> tuple[Prompt, Conversation]:
    """The best answer, behind what was asked."""
    return choice.prompt, Conversation((*as_asked(settings, choice), Message("assistant", choice.best.text)))


def _wants(settings: Rsf, prompt: Prompt, t: int) -> list[Want]:
    """A prompt's directions in an iteration."""
    draw = random.Random(f"{settings.seed} {t} {prompt_key(prompt)}")
    return [want.sample_direction(settings.directions, draw) for _ in range(settings.per_prompt)]
