"""The requests of an `rsf` iteration: prompts with sampled directions and their system messages."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_align.data.rows import Conversation, Message, Prompt, Rated, prompt_key, with_system_prompt
from lora_align.errors import UserError
from lora_align.recipe import Rsf
from lora_align.rsf.selection import Candidate, Choice, Pool
from lora_align.want_direction import Want, sample_direction, scores_message

EXAMPLES = 20  # random directions or scores with which a template is checked
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Request:
    """A prompt, a system message that requests a direction or scores, and the request's number among the prompt's."""

    prompt: Prompt
    system: str
    number: int
    want: Want | None = None

    @property
    def key(self) -> str:
        """Return a key that is unique in an iteration."""
        return f"{prompt_key(self.prompt)} {self.number}"


def check_settings(settings: Rsf) -> None:
    """Refuse one answer per request for DPO, a bootstrap that per_prompt does not divide, and constant templates."""
    if settings.learn == "dpo" and settings.samples < 2:
        raise UserError('rsf.samples: rsf.learn = "dpo" compares two answers; set rsf.samples to 2 or more')
    if remainder := settings.bootstrap % settings.per_prompt:
        lower = settings.bootstrap - remainder
        multiples = " or ".join(str(number) for number in (lower, lower + settings.per_prompt) if number)
        raise UserError(
            f"rsf.bootstrap: {settings.bootstrap} is not a multiple of rsf.per_prompt ({settings.per_prompt}); "
            f"set it to {multiples}"
        )
    rng = random.Random(0)
    scores = [{name: rng.uniform(0, 100) for name in settings.directions} for _ in range(EXAMPLES)]
    steers = {scores_message(of, settings.steer) for of in scores}
    for key, texts, variable in (("ask", example_messages(settings), "decimals"), ("steer", steers, "listed")):
        if len(texts) == 1:
            what = "direction" if key == "ask" else "request for scores"
            raise UserError(
                f"rsf.{key}: the template gives {texts.pop()!r} for every {what}; use {{{{ {variable} }}}} in it"
            )


def example_messages(settings: Rsf) -> set[str]:
    """Return system messages for some directions of the region."""
    rng = random.Random(0)
    return {sample_direction(settings.directions, rng).system_message(settings.ask) for _ in range(EXAMPLES)}


def prompts(settings: Rsf, half: Sequence[Rated], t: int) -> list[Prompt]:
    """Sample `rsf.prompts` of a half's prompts, in the order of the data; each iteration samples anew."""
    unique = list(dict.fromkeys(row.prompt for row in half))
    rng = random.Random(f"{settings.seed} prompts {t}")
    indices = sorted(rng.sample(range(len(unique)), min(settings.prompts or len(unique), len(unique))))
    return [unique[i] for i in indices]


def answers_per_request(settings: Rsf, t: int) -> int:
    """Return the number of answers to each request of an iteration. The first iteration samples from θ₀."""
    return settings.samples if t > 1 else max(1, settings.bootstrap // settings.per_prompt)


def for_scores(settings: Rsf, prompts: Sequence[Prompt], known: Sequence[Scores]) -> list[Request]:
    """Return requests to θ₀. Each requests the scores of a known answer, so that the scores are possible."""
    requests: list[Request] = []
    for prompt in prompts:
        rng = random.Random(f"{settings.seed} targets {prompt_key(prompt)}")
        texts = (scores_message(rng.choice(known), settings.steer) for _ in range(settings.per_prompt))
        requests += (Request(prompt, system, number) for number, system in enumerate(texts))
    return requests


def for_directions(settings: Rsf, prompts: Sequence[Prompt], t: int) -> list[Request]:
    """Return requests to a conditioned policy, each for a sampled direction."""
    return [
        Request(prompt, direction.system_message(settings.ask), number, direction)
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


def with_direction(settings: Rsf, choice: Choice) -> Prompt:
    """Return the prompt after a system message that requests the direction."""
    return with_system_prompt(choice.want.system_message(settings.ask), choice.prompt)


def best_example(settings: Rsf, choice: Choice) -> tuple[Prompt, Conversation]:
    """Return the prompt, and the conversation to train on: the request, then the best answer."""
    return choice.prompt, Conversation((*with_direction(settings, choice), Message("assistant", choice.best.text)))


def _directions(settings: Rsf, prompt: Prompt, t: int) -> list[Want]:
    """Sample a prompt's directions in an iteration."""
    rng = random.Random(f"{settings.seed} {t} {prompt_key(prompt)}")
    return [sample_direction(settings.directions, rng) for _ in range(settings.per_prompt)]
