"""The reward model learns from ratings and pairs, ignores missing labels, and scores the same after loading."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from lora_align import recipe, runs
from lora_align.console import Screen
from lora_align.data.rows import Message
from lora_align.demo import world
from lora_align.errors import UserError
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.logprobs import Reader
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.reward_model import Heads, RewardModel
from lora_align.recipe import Recipe
from lora_align.train import reward, reward_loss
from lora_align.train.reward_loss import Example, RewardLoss
from support import made_once

QUIET = Screen(quiet=True)
SETTINGS = [
    "reward.learning_rate=5e-3",
    "reward.batch_size=32",
    "reward.max_length=128",
    "reward.held_out=0.2",
    'reward.ratings.demo.data="demo:ratings?rows=480"',
    'reward.pairs.shorter="brief"',
    "reward.limit=320",
    'reward.objectives.manner=["politeness", "warmth"]',
]


def demo(*overrides: str) -> Recipe:
    return recipe.load(recipe.builtin()["demo"], [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def base() -> Base:
    return bases.find(recipe.Base("demo"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    made = made_once(tmp_path_factory, "reward", lambda folder: reward.train_reward_model(demo(), folder, QUIET))
    return runs.read(made / "reward" / "reward")


@pytest.fixture(scope="module")
def model(base: Base, trained: runs.Run) -> RewardModel:
    return reward.load(base, trained)


def _answers(base: Base, count: int) -> list[tuple[list[int], list[int]]]:
    rows = []
    for row in world.ratings(seed=9, count=count, part="dev"):
        prompt = [Message("user", str(row["prompt"]))]
        rows.append((base.chat.prompt_ids(prompt), base.chat.answer_ids(prompt, str(row["response"]))))
    return rows


def test_reward_model_learns_from_ratings_and_pairs(trained: runs.Run) -> None:
    heads = trained.manifest.metrics["held_out"]["heads"]
    assert heads["verbosity"]["spearman"] > 0.5
    assert heads["shorter"]["accuracy"] > 0.7
    assert heads["verbosity"]["ordered"] > 0.7
    assert heads["shorter"]["length"] < -0.3 < 0.3 < heads["verbosity"]["length"]
    assert imread(trained.path / "held_out.png").std() > 0


def test_a_fresh_process_computes_the_same_scores(base: Base, model: RewardModel, trained: runs.Run) -> None:
    program = f"""
import json
from pathlib import Path
from lora_align import recipe, runs
from lora_align.model import base as bases
from lora_align.model.memory_budget import MemoryBudget
from lora_align.train import reward
rows = json.loads(input())
model = reward.load(bases.find(recipe.Base("demo")), runs.read(Path({str(trained.path)!r})))
print(json.dumps([model.objectives, model.score(rows, MemoryBudget(1)).tolist()]))
"""
    rows = _answers(base, 12)
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(rows), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objectives, theirs = json.loads(done.stdout)
    ours = model.score(rows, MemoryBudget(12))
    assert objectives == [*world.RATINGS, "shorter", "manner"]
    assert torch.equal(model.score(rows, MemoryBudget(1)), torch.tensor(theirs)), (
        "one at a time, they are the very same"
    )
    assert ours.std(0).min() > 0
    padded = base.chat.tokenizer.padding_side
    base.chat.tokenizer.padding_side = "left" if padded == "right" else "right"
    turned = model.score(_answers(base, 12)[::-1], MemoryBudget(5)).flip(0)
    base.chat.tokenizer.padding_side = padded
    for other in (torch.tensor(theirs), turned):
        assert ((ours - other).abs() / 100).max() < 1e-4 / 10  # points out of 100


def test_derived_objective_is_the_mean_of_its_heads(base: Base, model: RewardModel) -> None:
    scores = dict(zip(model.objectives, model.score(_answers(base, 5), MemoryBudget(5)).T, strict=True))
    assert torch.allclose(scores["manner"], (scores["politeness"] + scores["warmth"]) / 2)


def test_sources_with_different_attributes_share_a_model(tmp_path: Path, base: Base) -> None:
    """A label a row lacks is nan, and a head's scale comes from the rows that have it."""
    rows = list(world.ratings(seed=1, count=40))
    file = tmp_path / "others.jsonl"
    file.write_text("\n".join(json.dumps({k: row[k] for k in ("prompt", "response", "warmth")}) for row in rows))
    project = demo(
        'reward.ratings.demo.attributes=["verbosity"]',
        f'reward.ratings.others.data="{file}"',
        'reward.ratings.others.prefix="their_"',
        "reward.objectives={}",
    )
    assert project.reward is not None
    material = reward.prepare(project, project.reward, base, QUIET)
    assert list(material.heads) == ["verbosity", "their_warmth", "shorter"]
    ratings = torch.tensor([example.ratings for example in material.train])
    known = ~ratings.isnan()
    assert known.sum(1).max() == 1
    assert known.sum(0)[2] == 0
    mean, deviation = material.heads["their_warmth"]
    assert float(ratings[known[:, 1], 1].mean()) == pytest.approx(mean, rel=1e-5)
    assert float(ratings[known[:, 1], 1].std(correction=0)) == pytest.approx(deviation, rel=1e-5)
    assert 0 <= ratings[known].min() <= ratings[known].max() <= 100
    assert set(material.facts) == {"ratings demo", "ratings others", "pairs shorter"}


def test_reward_loss_equals_its_formula(base: Base, model: RewardModel) -> None:
    """Against scores computed one row at a time, in float64."""
    a, b, other = _answers(base, 3)
    c = (b[0], other[1])
    k = len(model.heads.names)
    ratings = tuple(math.nan if i % 2 else 10.0 * i for i in range(k))
    rows = [Example((a,), ratings), Example((b, c), (math.nan,) * k, head=k - 1)]
    objective = RewardLoss(Reader.of(model.model), model.heads, 0.0, base.chat)
    with torch.no_grad():
        parts = [objective.part(some, objective.weights(rows)).loss for some in (rows, rows[:1], rows[1:])]
    assert float(parts[1] + parts[2]) == pytest.approx(float(parts[0]), rel=1e-5), "each its share of the whole"
    loss = float(parts[0])
    z = torch.stack([model.score([row], MemoryBudget(1))[0, :k] for row in (a, b, c)]).double()
    z = (z - model.heads.mean) / model.heads.deviation
    errors = [(z[0, i] - (10.0 * i - model.heads.mean[i]) / model.heads.deviation[i]) ** 2 for i in range(0, k, 2)]
    margin = z[1, k - 1] - z[2, k - 1]
    expected = (sum(errors) + torch.log1p(torch.exp(-margin))) / (len(errors) + 1)
    assert loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('reward.objectives.kind=["kindness"]', "reward.objectives.kind: no head 'kindness' (heads: helpfulness,"),
        ('reward.objectives.warmth=["politeness"]', "a head has this name"),
        ("reward.ratings.demo.high=2", "demo:ratings?rows=480:"),
        ('reward.ratings.demo.attributes=["wit"]', "no rating 'wit' (the row has: helpfulness"),
        ('reward.pairs.x="hepful"', "reward.pairs.x: no preference 'hepful', did you mean 'helpful'?"),
        (
            "reward.ratings.demo.hihg=5",
            "unknown key 'reward.ratings.demo.hihg', did you mean 'reward.ratings.demo.high'?",
        ),
    ],
)
def test_unusable_reward_settings_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        reward.train_reward_model(demo(override), tmp_path, QUIET)
    assert message in str(refused.value)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_file_without_heads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "heads.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="not a reward model's heads"):
        Heads.load(tmp_path)


def test_heads_worse_than_chance_are_reported_from_20_examples_on() -> None:
    heads = {
        "turned": {"rated": 100, "pairs": 0, "spearman": -0.6},
        "by chance": {"rated": 0, "pairs": 100, "accuracy": 0.52},
        "few": {"rated": 2, "pairs": 1, "spearman": 1.0, "accuracy": 1.0},
    }
    constant = {"constant": {"rated": 100, "pairs": 0, "spearman": math.nan}}
    [reason] = reward_loss.unconverged({"heads": constant})
    assert reason.endswith("the scores are constant or not finite; lower learning_rate")
    worse, chance = reward_loss.unconverged({"heads": heads})
    assert worse.startswith("the rank correlation of turned is -0.60 on 100 held-out answers, worse than chance; lower")
    assert chance.startswith("the accuracy of by chance is 0.52 on 100 held-out pairs, near chance")
    assert reward._quality(heads["few"]) == "2 ratings: too few to judge, 1 pair: too few to judge"
