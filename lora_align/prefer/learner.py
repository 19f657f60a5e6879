"""Choose the questions to ask, sample answers ahead, and learn from picks."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

from torch import Tensor

from lora_align.data.rows import Prompt
from lora_align.errors import RunFailedError
from lora_align.prefer.arena import Arena, Question, ScoredAnswer, spreads
from lora_align.prefer.posterior import Posterior, Weight
from lora_align.prefer.size import sized

MIXES = 4  # answers to a prompt
FIRST = 4  # prompts that are answered before the first question
AHEAD = 2  # prompts that are answered while the person reads
TRIES = 10  # times that answers are sampled again if all were equal


@dataclass(frozen=True)
class Choice:
    """Two answers to a prompt, from which a person picks."""

    prompt: Prompt
    first: ScoredAnswer
    second: ScoredAnswer

    @property
    def difference(self) -> dict[str, float]:
        """Return the scores of the first answer minus those of the second."""
        return {name: score - self.second.scores[name] for name, score in self.first.scores.items()}


@dataclass(frozen=True)
class Learned:
    """The weights that a person prefers, with intervals, sized by a KL budget."""

    weights: Mapping[str, Weight]
    picks: int
    kl: float

    @property
    def mix(self) -> dict[str, float]:
        """Return the weights without those that round to 0."""
        return {name: round(of.mean, 2) for name, of in self.weights.items() if round(of.mean, 2)}

    @property
    def unsure(self) -> list[str]:
        """Return the names of weights whose sign is not known."""
        return [name for name, of in self.weights.items() if of.low < 0 < of.high]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        weights = {name: {"mean": of.mean, "low": of.low, "high": of.high} for name, of in self.weights.items()}
        return {"weights": weights, "picks": self.picks, "kl": self.kl}


@dataclass
class Learner:
    """Asks a person about answers to prompts, and learns the weights."""

    arena: Arena
    prompts: Iterator[Prompt]
    budget: float  # KL per token
    seed: int = 0
    patient: bool = False  # wait for all answers ahead, so that a simulation can be repeated
    pool: list[Question] = field(default_factory=list)
    _ahead: "list[Future[Question | None]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "answers")
        names = self.arena.names
        start = [self.arena.ask(prompt, [{}] * MIXES) for prompt in self._next(FIRST)]
        if not any(question.answers for question in start):
            raise RunFailedError("all answers to the prompts are empty; give other prompts")
        self.tokens: Mapping[str, Tensor] = self.arena.token_scores(start)
        alone = [sized(self.tokens, {name: sign}, self.budget) for name in names for sign in (1.0, -1.0)]
        for place, question in enumerate(start):
            mixes = [alone[(place * MIXES + i) % len(alone)] for i in range(MIXES)]
            self.pool.append(self._merged(question, self.arena.ask(question.prompt, mixes)))
        self.pool = [question for question in self.pool if len(question.answers) > 1]
        if not self.pool:
            raise RunFailedError("all answers to the prompts are equal; raise --temperature, or give other prompts")
        self.posterior = Posterior(spreads(self.pool), self.seed)

    def choice(self) -> Choice:
        """Return the choice that tells most about the weights. Then sample the answers to the next prompts."""
        self._collect()
        for _ in range(TRIES):
            if not self.pool:
                self._look_ahead()
                self._collect(wait=True)
        choices = [Choice(question.prompt, *two) for question in self.pool for two in combinations(question.answers, 2)]
        if not choices:
            raise RunFailedError("all answers to a prompt are equal; raise --temperature, or give other prompts")
        told = self.posterior.information([choice.difference for choice in choices])
        best = choices[int(told.argmax())]
        self.pool = [question for question in self.pool if question.prompt != best.prompt]
        self._look_ahead()
        return best

    def learn(self, choice: Choice, won: float) -> None:
        """Learn from a pick: 1 for the first answer, 0 for the second, 0.5 for neither."""
        self.posterior.update(choice.difference, won)

    def learned(self) -> Learned:
        """Return the weights, sized by the budget."""
        direction = self.posterior.direction()
        some = direction if any(direction.values()) else dict.fromkeys(direction, 1.0)
        size = sum(map(abs, sized(self.tokens, some, self.budget).values()))
        weights = {}
        for name, of in self.posterior.weights().items():
            mean = size * direction[name]  # normalised, so that it may lie outside of the interval
            weights[name] = Weight(mean, min(size * of.low, mean), max(size * of.high, mean))
        return Learned(weights, len(self.posterior.wins), self.budget)

    def close(self) -> None:
        """Stop sampling ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _next(self, count: int) -> list[Prompt]:
        return list(islice(self.prompts, count))

    def _answered(self, prompt: Prompt, mixes: Sequence[Mapping[str, float]]) -> Question | None:
        question = self.arena.ask(prompt, mixes)
        return question if len(question.answers) > 1 else None

    def _look_ahead(self) -> None:
        """Let the thread answer the next prompts with mixes that the picks so far leave open."""
        mixes = [sized(self.tokens, direction, self.budget) for direction in self.posterior.sample(MIXES)]
        while len(self._ahead) < AHEAD:
            self._ahead += [self._thread.submit(self._answered, prompt, mixes) for prompt in self._next(1)]

    def _collect(self, *, wait: bool = False) -> None:
        """Move the questions that are ready into the pool."""
        for future in [future for future in self._ahead if wait or self.patient or future.done()]:
            self._ahead.remove(future)
            if question := future.result():
                self.pool.append(question)

    def _merged(self, one: Question, other: Question) -> Question:
        texts = {answer.text: answer for answer in [*one.answers, *other.answers]}
        return Question(one.prompt, list(texts.values()))
