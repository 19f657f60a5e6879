"""Continuous batching: answers with different weights, prompts and settings share each forward pass.

A thread reads prompts in parts, and between the parts lets every running answer take one token. An answer joins the
batch when its prompt is read, and leaves it when it ends. Answers in one batch differ only in rounding from answers
that run alone.

All computing happens in this thread, because OpenMP has a team of threads for each thread that computes. If the teams
together have more threads than the machine has cores, they sleep between operations, which slows small models.
"""

import gc
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_align.adapters.delta import LoraDelta
from lora_align.errors import RunFailedError
from lora_align.model.logprobs import TOKENS, Answered, Reader, Shared, answer_logprobs
from lora_align.model.memory_budget import MemoryBudget, is_out_of_memory
from lora_align.model.mixer import Mixer
from lora_align.model.slot_cache import SlotCache, filled_cache, row_of
from lora_align.model.token_sampling import pick
from lora_align.serve.answer import Answer
from lora_align.serve.prefix_store import PrefixStore
from lora_align.serve.reading import Reading, combined

PART_TOKENS = 256  # of prompts that are read between two steps of the running answers
LARGEST_BATCH = 64  # rows
STORED_SHARE = 0.25  # of the token budget, for the keys and values of finished answers
RATE_SECONDS = 10.0  # over which tokens per second are averaged
REGROW_SECONDS = 60.0  # after which a token budget that was halved is doubled, because other programs may have ended
STOPPED = "the server was stopped; send the request again when it runs"
Result = TypeVar("Result")


class Batcher:
    """The running answers on one model.

    Other threads may use `submit`, `call` and `stop`, read counters, and let `call` run `install` and `change`.
    """

    def __init__(self, model: PreTrainedModel, budget: int) -> None:
        self.model, self.mixer = model, Mixer(model, {}, {})
        self.largest = budget  # tokens whose keys and values fit into memory, counted as rows times the longest row
        self.cache, self.store = SlotCache(model), PrefixStore(0)
        self._set_budget(budget)
        self.rows: list[tuple[Answer, int]] = []  # of the cache: an answer, and which of its contexts
        self.waiting: list[Reading] = []
        self.reading: Reading | None = None
        self.sampled = 0  # tokens since the start
        self._requests = 0
        self._progress: deque[tuple[float, int]] = deque()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping, self._ended = threading.Event(), threading.Event()
        self._set: list[Mapping[str, float]] | None = None  # the weights in the mixer

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queue the answers to one prompt."""

        def add() -> None:
            try:
                self._refuse_stopped()
                self._refuse_missing(name for context in answers[0].contexts for name in context.weights)
            except RunFailedError as fault:
                for answer in answers:
                    answer.fail(fault)
                return
            self._requests += 1
            self.waiting.append(Reading(list(answers), self._requests))

        self._post(add)

    def call(self, work: Callable[[], Result]) -> "Future[Result]":
        """Let the batcher's thread do some work between two steps."""
        future: Future[Result] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._refuse_stopped()
                future.set_result(work())
            except Exception as fault:  # noqa: BLE001 - the caller gets every error
                future.set_exception(fault)

        self._post(do)
        return future

    def stop(self) -> None:
        """Fail all answers, and end the thread."""
        self._stopping.set()
        self._inbox.put(lambda: None)

    @torch.inference_mode()
    def run(self) -> None:
        """Answer until `stop` is called."""
        try:
            while not self._stopping.is_set():
                self._listen()
                self._drop()
                failure: Exception | None = None
                try:
                    self._turn()
                except (RuntimeError, MemoryError) as fault:
                    failure = fault.with_traceback(None)  # its frames hold tensors
                if failure is not None:
                    self._recover(failure)
        finally:
            self._stopping.set()
            self._ended.set()
            self._obey()
            for answer in self._everyone():
                answer.fail(RunFailedError(STOPPED))

    def answers(self) -> list[Answer]:
        """Return the running answers."""
        return list(dict.fromkeys(answer for answer, _ in self.rows))

    def tokens_per_second(self) -> float:
        """Return the mean over the last seconds."""
        now = time.monotonic()
        since = [(when, count) for when, count in self._progress.copy() if when > now - RATE_SECONDS]
        return (self.sampled - since[0][1]) / (now - since[0][0]) if since else 0.0

    @torch.inference_mode(False)  # a mixer is also set outside of inference mode
    def install(self, loaders: Mapping[str, Callable[[], LoraDelta]], keep: Iterable[str]) -> None:
        """Load updates and add them to the model. Remove those that no answer uses and that are not in `keep`."""
        used = {name for answer in self._everyone() for context in answer.contexts for name in context.weights}
        old = {name: update for name, update in self.mixer.updates.items() if name in used | set(keep)}
        mixer = Mixer(self.model, {**old, **{name: load() for name, load in loaders.items()}}, {})
        self.mixer.remove()
        self.mixer, self._set = mixer, None

    def sums(self, rows: Sequence[Shared], weights: Mapping[str, float]) -> Tensor:
        """Return log π of every answer in order, for a policy with these weights. Let `call` run this."""
        self._refuse_missing(weights)
        self._set_weights([weights])
        return answer_logprobs(self.model, rows, MemoryBudget(TOKENS))

    def token_logprobs(self, rows: Sequence[Answered], weights: Mapping[str, float]) -> Tensor:
        """Return log π of every token of the answers in order. Let `call` run this."""
        self._refuse_missing(weights)
        self._set_weights([weights])
        return Reader.of(self.model).tokens(rows).cpu()

    def change(self, answers: Sequence[Answer], weights: Mapping[str, float]) -> None:
        """Use other weights for some answers from their next token on. A prompt that is being read is read again."""
        self._refuse_missing(weights)
        for answer in answers:
            answer.set_weights(weights)
        for reading in self._readings():
            if any(answer in answers for answer in reading.answers):
                reading.forget()

    def _post(self, work: Callable[[], None]) -> None:
        """Let the thread do some work, which refuses by itself after the thread's end."""
        self._inbox.put(work)
        if self._ended.is_set():
            self._obey()

    def _refuse_stopped(self) -> None:
        if self._stopping.is_set():
            raise RunFailedError(STOPPED)

    def _refuse_missing(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.mixer.updates:
                raise RunFailedError(f"{name.partition('#')[0]} was removed or trained again; send the request again")

    def _readings(self) -> list[Reading]:
        return [*self.waiting, *([self.reading] if self.reading else [])]

    def _everyone(self) -> list[Answer]:
        return [*(answer for reading in self._readings() for answer in reading.answers), *self.answers()]

    def _listen(self) -> None:
        """Do what other threads asked for. Wait if there is nothing else to do."""
        if not self._everyone():
            self.cache.clear()
            self._inbox.get()()
        self._obey()

    def _obey(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _drop(self) -> None:
        """Drop the answers that were cancelled or are too late."""
        for answer in self._everyone():
            if not answer.ended and answer.expired():
                answer.fail(TimeoutError("the answer took too long; ask for fewer tokens, or raise --deadline"))
        for reading in self._readings():
            reading.answers = [answer for answer in reading.answers if not answer.ended]
        self.waiting = [reading for reading in self.waiting if reading.answers]
        if self.reading and not self.reading.answers:
            self.reading = None
        self._leave()

    def _turn(self) -> None:
        """Read some of the waiting prompts, then sample one token of each running answer."""
        left = PART_TOKENS
        while left > 0 and (reading := self.reading or self._next()):
            self.reading = reading
            if not reading.complete:
                left -= self._read(reading, left)
            if reading.complete:
                self._join(reading)
        if self.rows:
            self._step()
        now = time.monotonic()
        self._progress.append((now, self.sampled))
        while self._progress[0][0] < now - RATE_SECONDS:
            self._progress.popleft()
        if self.budget < self.largest and now > self._resized + REGROW_SECONDS:
            self._set_budget(min(self.largest, 2 * self.budget))

    def _next(self) -> Reading | None:
        """Take the next prompt to read, if its answer fits. The client with the fewest rows comes first."""
        rows = Counter(answer.client for answer, _ in self.rows)
        order = sorted(self.waiting, key=lambda one: (rows[one.answers[0].client], one.number))
        if not order or not self._fits(order[0].answers[0]):
            return None
        self.waiting.remove(order[0])
        return order[0]

    def _fits(self, answer: Answer) -> bool:
        """Return whether there is memory for another answer. An answer always fits an empty batch."""
        rows = len(self.rows) + len(answer.contexts)
        longest = max(one.longest for one in [answer, *self.answers()])
        return not self.rows or (rows <= LARGEST_BATCH and rows * longest <= self.budget)

    def _read(self, reading: Reading, most: int) -> int:
        """Read up to `most` tokens of a prompt, and return how many were read."""
        place = len(reading.logits)
        context = reading.contexts[place]
        if len(reading.caches) == place:
            known = self.store.longest(context.weights, reading.ids(place))
            reading.caches.append(filled_cache(self.model, known))
            reading.left = reading.ids(place)[known[0][0].shape[2] if known else 0 :]
        part = reading.left[:most]
        self._set_weights([context.weights])
        ids, cache = torch.tensor([part], device=self.model.device), reading.caches[place]
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        reading.left = reading.left[most:]
        if not reading.left:
            reading.logits.append(logits)
        return len(part)

    def _join(self, reading: Reading) -> None:
        """Let the answers to a prompt join the batch. If some do not fit, the prompt waits with what was read."""
        logits = combined(torch.stack(reading.logits), reading.contexts)
        while reading.answers and self._fits(reading.answers[0]):
            answer = reading.answers.pop(0)
            self.rows += [(answer, place) for place in range(len(reading.caches))]
            for cache in reading.caches:
                self.cache.insert(row_of(cache))
            self._take([answer], logits[None])
            self._leave()
        self.reading = None
        if reading.answers:
            self.waiting.append(reading)

    def _step(self) -> None:
        """Sample the next token of every running answer."""
        self.cache.reserve()
        self._set_weights([answer.contexts[place].weights for answer, place in self.rows])
        where, mask = self.model.device, self.cache.mask()
        logits = self.model(
            input_ids=torch.tensor([[answer.tokens[-1]] for answer, _ in self.rows], device=where),
            attention_mask=None if mask is None else mask.to(where),
            position_ids=torch.tensor(self.cache.lengths, device=where)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.cache.advance()
        answers = self.answers()
        if len(answers) < len(self.rows):
            rows = {row: place for place, row in enumerate(self.rows)}  # in any order: rows fill gaps
            places = {answer: [rows[answer, of] for of in range(len(answer.contexts))] for answer in answers}
            logits = torch.stack([combined(logits[places[answer]], answer.contexts) for answer in answers])
        self._take(answers, logits)
        self._leave()

    def _take(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Sample one token of each answer from logits [answers, v]."""
        tokens = pick(
            logits,
            torch.tensor([answer.settings.temperature for answer in answers]),
            torch.tensor([answer.settings.top_p for answer in answers]),
            torch.stack([answer.uniforms[len(answer.tokens)] for answer in answers]).to(logits.device),
        )
        for answer, token, row in zip(answers, tokens.tolist(), logits, strict=True):
            answer.take(token, row)
        self.sampled += len(answers)

    def _leave(self) -> None:
        """Remove the rows of answers that have ended, and store their keys and values."""
        for place in reversed(range(len(self.rows))):
            answer, of = self.rows[place]
            if not answer.ended:
                continue
            context = answer.contexts[of]
            if not answer.changed:
                ids = [*context.prompt, *answer.tokens][: self.cache.lengths[place]]
                self.store.add(context.weights, ids, self.cache.extract(place))
            self.cache.remove(place)
            last = self.rows.pop()
            if place < len(self.rows):
                self.rows[place] = last

    def _set_weights(self, rows: list[Mapping[str, float]]) -> None:
        if rows != self._set:
            self.mixer.set_rows(rows)
            self._set = rows

    def _set_budget(self, tokens: int) -> None:
        self.budget, self.store.budget = tokens, int(STORED_SHARE * tokens)
        self._resized = time.monotonic()

    def _recover(self, fault: Exception) -> None:
        """Begin all answers in progress again with half the budget, if memory ran out. Otherwise fail them.

        The answers to a single prompt fail, too.
        """
        again = [Reading([answer], 0) for answer in self.answers() if not answer.ended]
        if self.reading:
            again.append(self.reading)
        self.rows, self.reading = [], None
        self.cache.clear()
        answers = [answer for reading in again for answer in reading.answers]
        if is_out_of_memory(fault) and (self.store.tokens or len(again) > 1):
            self.waiting = [*again, *self.waiting]
            for reading in self.waiting:
                reading.forget()
            self._set_budget(max(1, self.budget // 2))
            self.store.clear()
        else:
            for answer in answers:
                answer.fail(fault)
            self._set_budget(self.largest)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
