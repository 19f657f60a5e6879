"""Vectors of a range of layers: `helpful@0-1`."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_align import recipe, runs
from lora_align.console import Screen
from lora_align.model import base as bases
from lora_align.policy import safe_ranges, vectors
from lora_align.policy.policy import find_policies
from lora_align.policy.policy_set import PolicySet
from support import Cli


@pytest.mark.parametrize(
    ("layers", "count", "names"),
    [
        (4, 2, ["v@0-1", "v@2-3"]),
        (5, 3, ["v@0-0", "v@1-2", "v@3-4"]),
        (2, 4, ["v@0-0", "v@1-1"]),
        (7, 1, ["v@0-6"]),
    ],
)
def test_layer_groups_cover_every_layer_once(layers: int, count: int, names: list[str]) -> None:
    assert vectors.layer_groups("v", layers, count) == names


def test_layer_ranges_add_up_to_the_vector(workspace: Path, cli: Cli) -> None:
    whole = vectors.find("helpful", workspace / "runs").load()
    parts = [vectors.find(name, workspace / "runs").load() for name in ("helpful@0-1", "helpful@2", "helpful@3-9")]
    assert sum(map(len, parts)) == len(whole)
    assert all(
        (whole[name].B == part[name].B).all() and (whole[name].A == part[name].A).all()
        for part in parts
        for name in part
    )
    assert {name.split(".")[2] for name in parts[1]} == {"2"}
    assert cli("merge", "--weights", "helpful@0-1=1,helpful@2-3=1", "--name", "parts").code == 0
    assert cli("merge", "--weights", "helpful=1", "--name", "whole").code == 0
    tensors = [
        load_file(workspace / "runs" / "mix" / name / "adapter_model.safetensors") for name in ("parts", "whole")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensors[0][key] == tensors[1][key]).all() for key in tensors[0])


def test_mix_of_layer_ranges_is_split_into_them(workspace: Path, cli: Cli) -> None:
    assert cli("merge", "--weights", "helpful@0-1=1,harmless@3=-0.5").code == 0
    done = cli("chat", "--prompt", "Hello", "--max-new-tokens", "2", "--json")
    assert done.code == 0, done.err
    assert "as a whole" not in done.err
    [mix] = [run for run in runs.list_runs(workspace / "runs") if run.manifest.stage == "mix"]
    assert [parent["name"] for parent in mix.manifest.parents] == ["helpful@0-1", "harmless@3"]


def test_layers_beyond_the_last_are_rejected(workspace: Path, cli: Cli) -> None:
    done = cli("merge", "--weights", "helpful@7-9=1")
    assert done.code == 2
    assert "helpful@7-9: the adapter has no layers 7 to 9; its last layer is 3" in done.err
    assert "no preference or run 'helpfull'" in cli("merge", "--weights", "helpfull@1=1").err


def test_layer_range_has_a_lineage_of_its_own(workspace: Path) -> None:
    project = recipe.load(recipe.builtin()["demo"])
    words = ["helpful=1", "helpful@0-3=1", "helpful@0-1=1"]
    runs_dir, quiet = workspace / "runs", Screen(quiet=True)
    chosen = find_policies(words, project, runs_dir, quiet)
    policies = PolicySet.of(chosen, project, bases.find(project.base), runs_dir, quiet)
    known = [str(policies.lineage(policy)) for policy in policies.policies]
    assert len(set(known)) == 3
    [far] = safe_ranges.warnings_beyond_reach({"helpful@0-1": 9.0}, policies.vectors, runs_dir)
    assert "far beyond 1, the weight in training" in far
