"""The command `score`: add a judge's scores to the answers of a data source."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from lora_align.console import Screen, count
from lora_align.data import row_reader, shards, sources
from lora_align.data.rows import Comparison, Rated
from lora_align.data.shards import KEY
from lora_align.errors import RunFailedError, UserError
from lora_align.model import base as bases
from lora_align.policy import judges
from lora_align.policy.judges import Judge
from lora_align.policy.policy_set import PolicySet
from lora_align.rankers import SCORE
from lora_align.recipe import Recipe

BATCH = 64  # rows in a file of scores; a kill loses at most the rows of the file being written


@dataclass(frozen=True)
class ScoreRow:
    """A row to score: its columns as they were read, and its answer or pair."""

    key: str
    row: Mapping[str, Any]
    content: Comparison | Rated

    @property
    def answers(self) -> tuple[str, ...]:
        return self.content.answers if isinstance(self.content, Comparison) else (self.content.answer,)

    def columns(self, objective: str) -> list[str]:
        """Return the column of an objective's score for each answer, with suffixes that `rank = "score:…"` reads."""
        suffixes = ("",) if isinstance(self.content, Rated) else row_reader.rating_suffixes(self.row)
        return [SCORE + objective + suffix for suffix in suffixes]


@dataclass(frozen=True)
class ObjectiveScores:
    """The scores of one objective over a file, and how often a pair's labels agree with the higher score."""

    mean: float
    deviation: float  # standard deviation
    agreement: Mapping[str, float]


@dataclass(frozen=True)
class ScoredFile:
    """The result of `score`."""

    out: str
    rows: int
    too_long: int  # rows without a score, because the prompt fills the context
    objectives: Mapping[str, ObjectiveScores]

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return a line about the file and one for each objective."""
        unscored = f", {self.too_long:,} without a score: the prompt fills the context" if self.too_long else ""
        lines = [f"{self.out}  {count(self.rows, 'row')}{unscored}"]
        for name, scores in self.objectives.items():
            agreed = (f"agrees with {label} in {share:.0%} of pairs" for label, share in scores.agreement.items())
            lines.append(
                "  ".join(
                    [f"  {name}", f"mean {scores.mean:.3g}", f"standard deviation {scores.deviation:.3g}", *agreed]
                )
            )
        return "\n".join(lines)


def score_file(recipe: Recipe, runs_dir: Path, data: str, out: Path, by: str, screen: Screen) -> ScoredFile:
    """Score every row of a source. Rows that an interrupted call scored are not scored again."""
    shards.check_out_file(out)
    unread: Counter[str] = Counter()
    work = list(_work(data, unread))
    for warning in sources.unread_warnings(unread, sources.RENAME_IN_FILE):
        screen.warn(f"{data}: {warning}")
    if not work:
        raise UserError(f"{data}: no rows to score; check the file")
    base = bases.find(recipe.base)
    judge = judges.find(by, base, recipe, runs_dir)
    for doubt in judge.doubts:
        screen.warn(doubt)
    policies = PolicySet(base, [], None, {by: judge})
    with shards.shards_for(out, {"data": data, "judge": judge.identity}) as parts:
        parts.fill(work, BATCH, lambda items, _: _scored(items, policies, by), screen, "score")
        scores = {row[KEY]: json.loads(row["scores"]) for row in parts.rows()}
        rows = [{**item.row, **scores[item.key]} for item in work]
        scored = [
            (item, row)
            for item, row in zip(work, rows, strict=True)
            if row[item.columns(judge.objectives[0])[0]] is not None
        ]
        if not scored:
            raise RunFailedError(f"{data}: every prompt fills the base's {base.max_length} tokens; shorten the prompts")
        shards.finish(rows, out)
    return ScoredFile(str(out), len(rows), len(rows) - len(scored), _objective_scores(scored, judge))


# --- rows ---


def _work(data: str, unread: Counter[str]) -> Iterator[ScoreRow]:
    """Yield a source's work in order. A row that occurs twice is scored twice; a row of several answers is split."""
    read = sources.read_all(data, lambda row, where: list(_pieces(row, where)), unread)
    for number, (row, content) in enumerate(piece for _, pieces in read for piece in pieces):
        text = json.dumps(row, sort_keys=True, default=str)
        yield ScoreRow(f"{number} {hashlib.sha256(text.encode()).hexdigest()}", row, content)


def _pieces(row: sources.Row, where: str) -> Iterator[tuple[Mapping[str, Any], Comparison | Rated]]:
    """Yield a row's answer or pair; for UltraFeedback's several answers, one row each in HelpSteer's form."""
    if "completions" in row:
        for answer in row_reader.rated(row, where):
            ratings = {name: value for name, value in answer.ratings.items() if not math.isnan(value)}
            yield {"prompt": row["instruction"], "response": answer.answer, **ratings}, answer
    elif "response" in row and not isinstance(row["response"], list):
        yield row, row_reader.rated(row, where)[0]
    else:
        [pair] = row_reader.comparisons(row, where)
        yield row, pair


def _scored(items: Sequence[ScoreRow], policies: PolicySet, by: str) -> list[dict[str, Any]]:
    """Return each row's key and its scores by column, null if the prompt fills the context."""
    scores = iter(policies.score(by, [(item.content.prompt, answer) for item in items for answer in item.answers]))
    rows = []
    for item in items:
        own = [next(scores) for _ in item.answers]
        columns = {
            column: of_answer.get(name)
            for name in policies.judges[by].objectives
            for column, of_answer in zip(item.columns(name), own, strict=True)
        }
        rows.append({KEY: item.key, "scores": json.dumps(columns)})
    return rows


def _objective_scores(scored: Sequence[tuple[ScoreRow, Mapping[str, Any]]], judge: Judge) -> dict[str, ObjectiveScores]:
    """Compute mean and standard deviation of each objective, and how often labels agree with the higher score."""
    results = {}
    for name in judge.objectives:
        values = [row[column] for item, row in scored for column in item.columns(name)]
        agreed: dict[str, list[float]] = {}
        for item, row in scored:
            scores = [row[column] for column in item.columns(name)]
            for label, winner in item.content.labels.items() if isinstance(item.content, Comparison) else ():
                if isinstance(winner, int) and scores[0] != scores[1]:
                    agreed.setdefault(label, []).append(float((scores[1] > scores[0]) == bool(winner)))
        agreement = {label: sum(hits) / len(hits) for label, hits in agreed.items()}
        results[name] = ObjectiveScores(fmean(values), pstdev(values), agreement)
    return results
