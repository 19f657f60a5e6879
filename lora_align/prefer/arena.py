"""Answers of mixes to prompts, and each vector's score of them: how much likelier the vector makes an answer."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import pstdev

from torch import Tensor

from lora_align.data.rows import Prompt
from lora_align.model.base import Base
from lora_align.model.logprobs import Answered, Shared
from lora_align.model.sampler_protocol import Sampling
from lora_align.serve.answer import Answer, AnswerSettings, Context, Piece
from lora_align.serve.batcher import Batcher
from lora_align.serve.catalogue import Catalogue

LEAST_SPREAD = 1e-3  # nats
SECONDS = 600.0  # for the answers to a question


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its score by each vector: log π(answer) − log π_start(answer), in nats, at weight 1."""

    text: str
    scores: Mapping[str, float]
    ended: bool = True  # whether it reached a stop token


@dataclass(frozen=True)
class Question:
    """A prompt with several answers."""

    prompt: Prompt
    answers: Sequence[ScoredAnswer]


@dataclass(frozen=True)
class Arena:
    """Samples and scores answers in the batcher's thread. Several mixes share a batch."""

    catalogue: Catalogue
    keys: Mapping[str, str]  # vector → the name of its update in the batcher
    start: Mapping[str, float]  # weight of the start adapter, if there is one
    sampling: Sampling

    @classmethod
    def of(cls, catalogue: Catalogue, names: Sequence[str], sampling: Sampling) -> "Arena":
        """Let the batcher load the vectors."""
        served = catalogue.serve("", dict.fromkeys(names, 1.0), None)
        keys = dict(zip(served.policy.weights, served.weights, strict=False))  # the start adapter comes last
        start = {key: weight for key, weight in served.weights.items() if key not in keys.values()}
        return cls(catalogue, keys, start, sampling)

    @property
    def base(self) -> Base:
        """Return the base."""
        return self.catalogue.base

    @property
    def batcher(self) -> Batcher:
        """Return the batcher that computes."""
        return self.catalogue.batcher

    @property
    def names(self) -> list[str]:
        """Return the names of the vectors."""
        return list(self.keys)

    def _weights(self, mix: Mapping[str, float]) -> dict[str, float]:
        return {**self.start, **{self.keys[name]: weight for name, weight in mix.items()}}

    def ask(self, prompt: Prompt, mixes: Sequence[Mapping[str, float]]) -> Question:
        """Return the distinct answers of some mixes to a prompt."""
        texts = {text: ended for text, ended in self.sample([(prompt, mix) for mix in mixes]) if text.strip()}
        return self.scored(prompt, texts)

    def scored(self, prompt: Prompt, texts: Mapping[str, bool]) -> Question:
        """Score answers to a prompt. `texts` says for each whether it reached a stop token."""
        rows = self.answered(prompt, texts)
        start = self.sums(rows, {})
        columns = {name: self.sums(rows, {name: 1.0}) - start for name in self.names}
        scores = [{name: float(of[i]) for name, of in columns.items()} for i in range(len(texts))]
        scored = zip(texts, scores, texts.values(), strict=True)
        return Question(prompt, [ScoredAnswer(*one) for one in scored])

    def token_scores(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return each vector's score of every token of the answers."""
        rows = [
            row
            for question in questions
            for row in self.answered(question.prompt, {one.text: one.ended for one in question.answers})
        ]
        start = self._tokens(rows, {})
        return {name: self._tokens(rows, {name: 1.0}) - start for name in self.names}

    def answered(self, prompt: Prompt, texts: Mapping[str, bool]) -> list[Answered]:
        """Tokenise answers. An answer that was cut has no stop token, because none was sampled."""
        with self.catalogue.encoding:
            ids, answers = self.base.chat.answered(prompt, list(texts))
        left = max(1, self.base.max_length - len(ids))
        cut = (answer if ended else answer[:-1] for answer, ended in zip(answers, texts.values(), strict=True))
        return [(ids, answer[:left]) for answer in cut]

    def sums(self, rows: Sequence[Answered], mix: Mapping[str, float]) -> Tensor:
        """Return a mix's log-probability of each answer."""
        shared: list[Shared] = [(ids, [answer]) for ids, answer in rows]
        return self.batcher.call(lambda: self.batcher.sums(shared, self._weights(mix))).result()

    def _tokens(self, rows: Sequence[Answered], mix: Mapping[str, float]) -> Tensor:
        return self.batcher.call(lambda: self.batcher.token_logprobs(rows, self._weights(mix))).result()

    def sample(self, asked: Sequence[tuple[Prompt, Mapping[str, float]]]) -> list[tuple[str, bool]]:
        """Sample an answer of each mix to its prompt, in one batch; return also whether it reached a stop token."""
        base, how, deadline = self.base, self.sampling, time.monotonic() + SECONDS
        answers, ended, failed = list[Answer](), threading.Semaphore(0), list[Exception]()

        def send(piece: Piece) -> None:
            if piece.error:
                failed.append(piece.error)
            if piece.error or piece.finish:
                ended.release()

        for number, (prompt, mix) in enumerate(asked):
            with self.catalogue.encoding:
                ids = tuple(base.chat.prompt_ids(prompt))
            most = min(how.max_new_tokens, base.max_length - len(ids))
            settings = AnswerSettings(how.temperature, how.top_p, most, how.seed or 0, self.catalogue.stop_ids)
            context = Context(ids, self._weights(mix))
            answers.append(Answer((context,), settings, number, self.catalogue.decoder, send, deadline=deadline))
        for answer in answers:
            self.batcher.submit([answer])
        for _ in answers:
            ended.acquire()
        if failed:
            raise failed[0]
        return [(answer.text, answer.stop_token is not None) for answer in answers]


def spreads(questions: Sequence[Question]) -> dict[str, float]:
    """Return the standard deviation of each vector's score between the answers to one prompt."""
    names = questions[0].answers[0].scores
    return {
        name: max(
            LEAST_SPREAD,
            sum(pstdev([answer.scores[name] for answer in question.answers]) for question in questions)
            / len(questions),
        )
        for name in names
    }
