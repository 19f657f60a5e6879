"""Candidates of an iteration: answers sampled from a policy and scored by the reward model, stored batch by batch."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_align import distributed
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta, total
from lora_align.adapters.peft_config import BaseInfo
from lora_align.adapters.peft_format import Adapter
from lora_align.console import Progress, count
from lora_align.data import shards
from lora_align.data.rows import Rated, with_system_prompt
from lora_align.data.shards import KEY, Shards
from lora_align.model.sampler_protocol import SampledText, Sampler, Sampling
from lora_align.policy.policy_set import PolicySet
from lora_align.rankers import SCORE
from lora_align.rsf import sampling_requests
from lora_align.rsf.inputs import JUDGE, STEERLM, RsfInputs
from lora_align.rsf.sampling_requests import Request
from lora_align.rsf.selection import Candidate, running_figures
from lora_align.rsf.serving import serve_command
from lora_align.runs import Run
from lora_align.train import checkpoints
from lora_align.train.job import Target

WANT = "want_"  # prefix of the columns with a direction's weights
SCORED = 64  # answers scored between two updates of the progress
BATCH = 512  # answers in one file; a kill loses at most one file


@contextmanager
def open_candidates(rsf: RsfInputs, t: int, teacher: Run) -> Iterator[Shards]:
    """Open the stored candidates of an iteration; refuse those of other settings, data or teacher."""
    folder = rsf.folder / f".t{t}.samples"
    if rsf.force:
        shards.delete(folder)
    with shards.opened(folder) as store:
        settings = {f"rsf.{key}": of for key, of in asdict(rsf.settings).items() if key not in checkpoints.MAY_DIFFER}
        inputs = {"teacher": teacher.manifest.files, "data": rsf.answers.fingerprint}
        shards.check_settings(folder, {**inputs, **settings})
        yield store


def sample_and_score(
    rsf: RsfInputs, t: int, teacher: Run, requests: Sequence[Request], store: Shards, target: Target
) -> None:
    """Sample and score answers to every request without answers. The reward model always runs locally."""
    settings, screen, label = rsf.settings, target.screen, f"{target.label} sampling"
    n = sampling_requests.answers_per_request(settings, t)
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, settings.seed + t)
    policies = rsf.policies(None if rsf.server else teacher)
    server: Sampler | None = None
    if rsf.server:
        adapter = distributed.on_rank_0(lambda: _with_start(rsf, teacher, store.folder))
        server = rsf.server.load_adapter(adapter, teacher.path.name, serve_command(rsf.recipe))

    def sample(batch: Sequence[Request], before: int, progress: Progress) -> list[SampledText]:
        if not server:
            policies.activate(policies.policies[0])
        prompts = [with_system_prompt(request.system, request.prompt) for request in batch]
        sampled: list[SampledText] = []
        for answers in (server or policies.sampler).draw(prompts, n, sampling):
            sampled += answers
            if len(sampled) < n * len(batch):
                progress.show(before + len(sampled) // n, {})
        return sampled

    done = store.keys()
    left = [request for request in requests if request.key not in done]
    if done:
        screen.note(f"{label}: answered before: {len(requests) - len(left):,} of {count(len(requests), 'request')}")
    left = left[distributed.rank() :: distributed.world_size()]
    batch_size = max(1, BATCH // n)
    with screen.progress(label, len(left)) as progress:
        for begin in range(0, len(left), batch_size):
            batch = left[begin : begin + batch_size]
            rows = _scored(batch, sample(batch, begin, progress), policies)
            if rows:
                store.append(rows)
            pools = sampling_requests.pools(settings, batch, by_request(rows), t)
            progress.show(begin + len(batch), running_figures(pools))
    distributed.barrier()
    store.refresh()


def scores_of(rsf: RsfInputs, answers: Sequence[Rated], target: Target) -> list[Mapping[str, float]]:
    """Return the scores of answers: from the data, where `lora-align score` wrote them, else from the reward model."""
    scores: list[Mapping[str, float]] = [
        {name.removeprefix(SCORE): value for name, value in row.ratings.items() if name.startswith(SCORE)}
        for row in answers
    ]
    left = [i for i, score in enumerate(scores) if not rsf.settings.directions.keys() <= score.keys()]
    if len(left) < len(answers):
        scored = f"{len(answers) - len(left):,} of {count(len(answers), 'answer')}"
        target.note(f"scores in the data are used for {scored}")
    if left:
        policies, mine = rsf.policies(), left[distributed.rank() :: distributed.world_size()]
        computed = []
        with target.screen.progress(f"{STEERLM} scores", len(mine)) as progress:
            for begin in range(0, len(mine), SCORED):
                batch = [answers[i] for i in mine[begin : begin + SCORED]]
                computed += policies.score(JUDGE, [(row.prompt, row.answer) for row in batch])
                progress.show(begin + len(batch), {})
        for indices, rank_scores in distributed.all_gather((mine, computed)):
            for i, score in zip(indices, rank_scores, strict=True):
                scores[i] = {name: math.nan if value is None else value for name, value in score.items()}
    return scores


def by_request(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Candidate]]:
    """Group rows into the candidates of each request, ordered by their numbers."""
    numbered: dict[str, list[tuple[int, Candidate]]] = {}
    for row in rows:
        rewards = {name.removeprefix(SCORE): value for name, value in row.items() if name.startswith(SCORE)}
        numbered.setdefault(row[KEY], []).append((row["number"], Candidate(row["response"], row["ended"], rewards)))
    return {key: [candidate for _, candidate in sorted(of, key=lambda one: one[0])] for key, of in numbered.items()}


def _scored(batch: Sequence[Request], sampled: Sequence[SampledText], policies: PolicySet) -> list[dict[str, Any]]:
    """Return a row for each answer with its scores. The judge sees the prompt without the request's system message."""
    scores = policies.score(JUDGE, [(batch[answer.prompt].prompt, answer.text) for answer in sampled])
    rows = []
    for answer, values in zip(sampled, scores, strict=True):
        request = batch[answer.prompt]
        row = {
            KEY: request.key,
            "prompt": [{"role": m.role, "content": m.content} for m in request.prompt],
            "asked": request.system,
            "number": answer.number,
            "response": answer.text,
            "ended": answer.ended,
        }
        weights = {WANT + name: weight for name, weight in (request.want.weights.items() if request.want else ())}
        rows.append(row | weights | {SCORE + name: value for name, value in values.items()})
    return rows


def _with_start(rsf: RsfInputs, policy: Run, folder: Path) -> Path:
    """Return an adapter folder for a server: the policy's own or, with a start adapter, the sum of both."""
    if rsf.start is None:
        return policy.path
    adapters = [Adapter(run.path, whole=True) for run in (rsf.start, policy)]
    both = total([LoraDelta.of(adapter) for adapter in adapters])
    about = BaseInfo.common([adapter.config for adapter in adapters])
    peft_format.save(folder / "adapter", both.items(), list(both), about)
    return folder / "adapter"
