"""The requests of an `rsf` iteration: prompts with sampled directions and their system messages."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_align import want
from lora_align.data.rows import Conversation, Message, Prompt, Rated, prompt_key, with_system_prompt
from lora_align.errors import UserError
from lora_align.recipe import Rsf
from lora_align.rsf.selection import Candidate, Choice, Pool
from lora_align.want import Want

EXAMPLES = 20  # directions or scores that a template is checked with
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Request:
    """A prompt, the system message that asks for something, and the request's number among those of the prompt."""

    prompt: Prompt
    system: str
    number: int
    want: Want | None = None

    @property
    def key(self) -> str:
        """Return a key that is unique in an iteration."""
        return f"{prompt_key(self.prompt)} {self.number}"


def check(settings: Rsf) -> None:
    """Refuse settings that cannot work: one answer for DPO, an uneven bootstrap, constant templates."""
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
    """Return system messages for some directions of the region."""
    draw = random.Random(0)
    return {want.sample_direction(settings.directions, draw).asked(settings.ask) for _ in range(EXAMPLES)}


def prompts(settings: Rsf, half: Sequence[Rated], t: int) -> list[Prompt]:
    """Sample `rsf.prompts` of a half's prompts, in the order of the data; each iteration samples anew."""
    unique = list(dict.fromkeys(row.prompt for row in half))
    draw = random.Random(f"{settings.seed} prompts {t}")
    places = sorted(draw.sample(range(len(unique)), min(settings.prompts or len(unique), len(unique))))
    return [unique[place] for place in places]


def answers_per_request(settings: Rsf, t: int) -> int:
    """Return how many answers each request of an iteration gets; the first iteration asks θ₀."""
    return settings.samples if t > 1 else max(1, settings.bootstrap // settings.per_prompt)


def for_scores(settings: Rsf, prompts: Sequence[Prompt], known: Sequence[Scores]) -> list[Request]:
    """Return requests to θ₀. Each asks for the scores of some known answer, so that they can be reached."""
    requests: list[Request] = []
    for prompt in prompts:
        draw = random.Random(f"{settings.seed} targets {prompt_key(prompt)}")
        texts = (want.scores_prompt(draw.choice(known), settings.steer) for _ in range(settings.per_prompt))
        requests += (Request(prompt, system, number) for number, system in enumerate(texts))
    return requests


def for_directions(settings: Rsf, prompts: Sequence[Prompt], t: int) -> list[Request]:
    """Return requests to a conditioned policy, each for a sampled direction."""
    return [
        Request(prompt, direction.asked(settings.ask), number, direction)
        for prompt in prompts
        for number, direction in enumerate(_directions(settings, prompt, t))
    ]


def pools(
    settings: Rsf, requests: Sequence[Request], candidates: Mapping[str, Sequence[Candidate]], t: int
) -> list[Pool]:
    """Return each prompt with a sampled direction and the candidates to choose from: the answers to that request.

    In the first `pooled` iterations the candidates are all answers to the prompt: an early policy may satisfy one
    direction when asked for another.
    """
    if t > settings.pooled:
        return [Pool(of.prompt, of.want, candidates.get(of.key, ())) for of in requests if of.want]
    of_prompt: dict[Prompt, list[Candidate]] = {}
    for request in requests:
        of_prompt.setdefault(request.prompt, []).extend(candidates.get(request.key, ()))
    return [
        Pool(prompt, of, answers) for prompt, answers in of_prompt.items() for of in _directions(settings, prompt, t)
    ]


def with_request(settings: Rsf, choice: Choice) -> Prompt:
    """Return the prompt behind the system message that asks for the direction."""
    return with_system_prompt(choice.want.asked(settings.ask), choice.prompt)


def best(settings: Rsf, choice: Choice) -> tuple[Prompt, Conversation]:
    """Return the prompt, and the conversation of the request and the best answer."""
    return choice.prompt, Conversation((*with_request(settings, choice), Message("assistant", choice.best.text)))


def _directions(settings: Rsf, prompt: Prompt, t: int) -> list[Want]:
    """Sample a prompt's directions in an iteration."""
    draw = random.Random(f"{settings.seed} {t} {prompt_key(prompt)}")
    return [want.sample_direction(settings.directions, draw) for _ in range(settings.per_prompt)]
