"""`inspect` on the command line: its figures against dense float64 matrices."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from lora_align.adapters import peft_format
from support import call


@pytest.fixture(scope="module")
def dense(trained: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Adapter → module → ΔW."""
    matrices = {}
    for name in ("helpful", "harmless"):
        for side in ("pos", "neg"):
            delta = peft_format.load(trained / "runs" / "dpo" / name / side)
            matrices[f"{name} {side}"] = {module: f.B.double() @ f.A.double() for module, f in delta.items()}
    for name in ("helpful", "harmless"):
        pos, neg = matrices[f"{name} pos"], matrices[f"{name} neg"]
        matrices[name] = {module: pos[module] - neg[module] for module in pos}
    return matrices


def flat(matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([matrix.flatten() for matrix in matrices.values()])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_figures_equal_those_of_dense_matrices(workspace: Path, dense: dict[str, dict[str, torch.Tensor]]) -> None:
    done = call(workspace, "inspect", "--json", "--picture", "map.png")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert list(printed["vectors"]) == ["harmless", "helpful"]
    for name, figures in printed["vectors"].items():
        assert figures["norm"] == pytest.approx(float(flat(dense[name]).norm()), rel=1e-5)
        sides = [flat(dense[f"{name} {side}"]) for side in ("pos", "neg")]
        assert figures["cos_pos_neg"] == pytest.approx(cosine(*sides), abs=1e-5)
        by_place = [norm for layers in figures["by_place"].values() for norm in layers.values()]
        assert math.hypot(*by_place) == pytest.approx(figures["norm"], rel=1e-5)
        squares = {module: torch.linalg.svdvals(matrix).square() for module, matrix in dense[name].items()}
        entropies = [torch.special.entr(s / s.sum()).nan_to_num().sum().exp() for s in squares.values()]
        assert figures["effective"] == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-3)
        energy = sum(float(s.sum()) for s in squares.values())
        assert sum(figures["shares"]) == pytest.approx(1)
        assert figures["shares"][0] == pytest.approx(sum(float(s[0]) for s in squares.values()) / energy, rel=1e-3)
        shares = [sum(float(s[:rank].sum()) for s in squares.values()) / energy for rank in range(figures["rank"] + 1)]
        assert shares[figures["for_99"] - 1] < 0.99 <= shares[figures["for_99"]] + 1e-9
    expected = cosine(flat(dense["harmless"]), flat(dense["helpful"]))
    assert printed["cosines"]["harmless"][1] == pytest.approx(expected, abs=1e-5)
    assert (workspace / "map.png").stat().st_size > 5_000


def test_interference_and_overlaps_equal_those_of_dense_matrices(
    workspace: Path, dense: dict[str, dict[str, torch.Tensor]]
) -> None:
    printed = json.loads(call(workspace, "inspect", "harmless", "helpful", "--json").out)
    raw, by_size, outputs, angles = [], [], [], []
    for module in dense["helpful"]:
        directions = [_directions(dense[name][module]) for name in ("harmless", "helpful")]
        U = torch.cat([u[:, :8] for u, _, _ in directions], 1)
        S = torch.cat([s[:8] for _, s, _ in directions])
        Vt = torch.cat([v[:8] for _, _, v in directions])
        one = torch.eye(len(S), dtype=S.dtype)
        raw.append(float(((U.T @ U - one) @ S.diag() @ (Vt @ Vt.T - one)).abs().sum()))
        by_size.append(raw[-1] / float(S.sum()))
        (a, *_), (b, *_) = directions
        angles.append(math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(a.T @ b)[0])))))
        outputs.append(float((a.T @ b).square().sum() / min(a.shape[1], b.shape[1])))
    assert printed["interference"]["raw"] == pytest.approx(sum(raw) / len(raw), rel=1e-3)
    assert printed["interference"]["by_size"] == pytest.approx(sum(by_size) / len(by_size), rel=1e-3)
    assert printed["overlaps"][0]["outputs_angle"] == pytest.approx(sum(angles) / len(angles), rel=1e-3)
    assert printed["overlaps"][0]["outputs"] == pytest.approx(sum(outputs) / len(outputs), rel=1e-3)


def _directions(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular directions without those that are rounding errors."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    real = S / S[0] > 1e-6
    return U[:, real], S[real], Vt[real]


def test_weights_that_a_mix_holds(workspace: Path) -> None:
    exact = json.loads(call(workspace, "inspect", "-w", "helpful=1,harmless=0.5", "--json").out)["mix"]
    assert exact["weights"]["helpful"]["held"] == pytest.approx(1, abs=1e-4)
    assert exact["weights"]["harmless"]["held"] == pytest.approx(0.5, abs=1e-4)
    assert exact["cosine_with_sum"] == pytest.approx(1, abs=1e-6)
    cut = json.loads(call(workspace, "inspect", "-w", "helpful=1,harmless=0.5", "--rank", "1", "--json").out)["mix"]
    assert cut["left_out"] > 0
    assert cut["weights"]["helpful"]["held"] < 1
    assert cut["cosine_with_sum"] == pytest.approx(math.sqrt(1 - cut["left_out"]), rel=1e-3)
    text = call(workspace, "inspect", "-w", "helpful=1,harmless=0.5").out
    assert "effective weight" in text
    assert max(map(len, text.splitlines())) <= 100


def test_shares_sum_to_1_and_runs_of_a_preference_are_compared(workspace: Path) -> None:
    shutil.copytree(workspace / "runs" / "dpo" / "helpful", workspace / "runs" / "dpo" / "again")
    done = call(workspace, "inspect", "helpful", "again", "harmless", "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["agreement"] == {"helpful": [pytest.approx(1)]}
    for figures in printed["vectors"].values():
        for by in ("kind", "layer"):
            assert sum(figures["shares_by"][by].values()) == pytest.approx(1)
        layer = [layers["0"] for layers in figures["by_place"].values()]
        assert figures["shares_by"]["layer"]["0"] == pytest.approx(math.hypot(*layer) ** 2 / figures["norm"] ** 2)
    assert "helpful: cosines between its runs are 1.000" in call(workspace, "inspect", "helpful", "again").out


def test_adapters_of_different_bases_are_measured_with_a_warning(workspace: Path) -> None:
    other = workspace / "other"
    shutil.copytree(workspace / "runs" / "dpo" / "helpful" / "pos", other)
    (other / "manifest.json").unlink()
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "else/where"}))
    done = call(workspace, "inspect", "helpful", "./other")
    assert done.code == 0, done.err
    assert "these adapters name different bases" in done.err


def test_too_small_vector_is_a_doubt(workspace: Path) -> None:
    assert call(workspace, "merge", "-w", "helpful=0.001", "--name", "little").code == 0
    done = call(workspace, "inspect", "helpful", "little")
    assert done.code == 0, done.err
    assert "little is too small to have an effect" in done.err


def test_inspect_refuses_an_empty_folder_and_a_wrong_picture(tmp_path: Path) -> None:
    done = call(tmp_path, "inspect")
    assert done.code == 2
    assert "no preference is trained in runs/" in done.err
    done = call(tmp_path, "inspect", "--picture", "map.gif")
    assert done.code == 2
    assert "expected a file name that ends in .png, .pdf or .svg" in done.err
