"""What a policy answers when asked for something, and what the reward model says of that: batch by batch, on disk."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_align import processes
from lora_align.adapters import peft_format
from lora_align.console import Screen, count
from lora_align.data.rows import Prompt, prompt_key, with_system_prompt
from lora_align.data.shards import KEY, Shards
from lora_align.model.base import Base
from lora_align.model.decoding import Sampling
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.mixer import Mixer
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.model.sampler import LocalSampler, SampledText, Sampler
from lora_align.model.sampling import ROWS
from lora_align.rankers import SCORE
from lora_align.rsf.selection import Candidate
from lora_align.runs import Run
from lora_align.want import Want

WANT = "want_"  # before an objective's name: its weight in the direction that was asked for
AT_ONCE = 512  # answers between two files: what a kill may cost
JUDGED_AT_ONCE = 64  # where memory allows it


@dataclass(frozen=True)
class Request:
    """A prompt, the system message that asks for something, and which of the prompt's requests it is."""

    prompt: Prompt
    system: str
    number: int
    want: Want | None = None

    @property
    def key(self) -> str:
        """Names it among all requests of an iteration."""
        return f"{prompt_key(self.prompt)} {self.number}"


@dataclass(frozen=True)
class Budgets:
    """How many answers are sampled and judged at once: found out by one policy, remembered for the next."""

    sampled: MemoryBudget = field(default_factory=lambda: MemoryBudget(ROWS))
    judged: MemoryBudget = field(default_factory=lambda: MemoryBudget(JUDGED_AT_ONCE))


class SamplerAndJudge:
    """One loaded base that answers as a policy and judges as the reward model, each with its adapter."""

    def __init__(
        self,
        base: Base,
        reward: Run,
        start: Run | None = None,
        policy: Run | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        adapters = {"reward": reward, "start": start, "policy": policy}
        for run in filter(None, adapters.values()):
            run.check_files()
        model = base.load()
        self.mixer = Mixer(
            model, {name: peft_format.load(run.path, whole=True) for name, run in adapters.items() if run}, {}
        )
        heads = Heads.load(reward.path).to(model.device)
        self.judge = RewardModel(base, model, heads, reward.manifest.method["objectives"])
        budgets = budgets or Budgets()
        self.base, self.embedded, self.room = base, LocalSampler(model, base, budgets.sampled), budgets.judged

    def fits(self, prompt: Prompt) -> bool:
        """As a sampler."""
        return self.embedded.fits(prompt)

    def draw(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[list[SampledText]]:
        """As a sampler; not while it judges."""
        self.mixer.set({"start": 1.0, "policy": 1.0})
        yield from self.embedded.draw(prompts, n, sampling)

    def score(self, said: Sequence[tuple[Prompt, str]], report: Callable[[int], None] = lambda done: None) -> Tensor:
        """Points [n, objectives] for answers to prompts; `report` hears how many different ones were judged."""
        places = {row: place for place, row in enumerate(dict.fromkeys(said))}  # a sure policy repeats itself
        rows = []
        for prompt, answer in places:
            ids = self.base.chat.prompt_ids(prompt)
            rows.append((ids, self.base.chat.answer_ids(prompt, answer)[: max(1, self.base.max_length - len(ids))]))
        self.mixer.set({"reward": 1.0})
        return self.judge.score(rows, self.room, report)[[places[row] for row in said]]


def collect_candidates(
    requests: Sequence[Request],
    n: int,
    sampling: Sampling,
    sampler: Sampler,
    panel: SamplerAndJudge,
    store: Shards,
    screen: Screen,
    label: str,
    figures: Callable[[Sequence[Request], Sequence[Mapping[str, Any]]], dict[str, str]],
) -> None:
    """Draw and judge n answers to every request that has none yet; a file of them at a time, `figures` shown of it."""
    done = store.keys()
    left = [request for request in requests if request.key not in done]
    if done:
        screen.note(f"{label}: {len(requests) - len(left):,} of {count(len(requests), 'request')} were answered before")
    left = left[processes.rank() :: processes.world_size()]
    at_once = max(1, AT_ONCE // n)
    with screen.progress(label, len(left)) as progress:
        for begin in range(0, len(left), at_once):
            batch = left[begin : begin + at_once]
            asked = [with_system_prompt(request.system, request.prompt) for request in batch]
            found = [answer for some in sampler.draw(asked, n, sampling) for answer in some]
            rows = _judged(batch, found, panel) if found else []
            if rows:
                store.append(rows)
            progress.show(begin + len(batch), figures(batch, rows))
    processes.barrier()
    store.look()


def candidates_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Candidate]]:
    """The candidates of every request, in the order of their numbers."""
    found: dict[str, list[tuple[int, Candidate]]] = {}
    for row in rows:
        rewards = {name.removeprefix(SCORE): value for name, value in row.items() if name.startswith(SCORE)}
        found.setdefault(row[KEY], []).append((row["number"], Candidate(row["response"], row["ended"], rewards)))
    return {key: [candidate for _, candidate in sorted(rows, key=lambda row: row[0])] for key, rows in found.items()}


def _judged(batch: Sequence[Request], found: Sequence[SampledText], panel: SamplerAndJudge) -> list[dict[str, Any]]:
    """Rows of answers with their scores. The judge sees the prompt as it is, without what was asked for."""
    scores = panel.score([(batch[answer.prompt].prompt, answer.text) for answer in found]).tolist()
    rows = []
    for answer, values in zip(found, scores, strict=True):
        request = batch[answer.prompt]
        row = {
            KEY: request.key,
            "prompt": [{"role": m.role, "content": m.content} for m in request.prompt],
            "asked": request.system,
            "number": answer.number,
            "response": answer.text,
            "ended": answer.ended,
        }
        wanted = {WANT + name: weight for name, weight in (request.want.weights.items() if request.want else ())}
        scored = {SCORE + name: value for name, value in zip(panel.judge.objectives, values, strict=True)}
        rows.append(row | wanted | scored)
    return rows
