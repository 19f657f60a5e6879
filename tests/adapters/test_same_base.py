"""Adapters of one base are accepted; adapters of different bases are recognised by their files."""

from pathlib import Path

import pytest
import torch

from lora_align.adapters import peft_format
from lora_align.adapters.delta import Factors
from lora_align.adapters.peft_config import BaseInfo
from lora_align.adapters.peft_format import Adapter
from lora_align.adapters.same_base import check_same_base
from lora_align.errors import UserError


def adapter(
    folder: Path, base: str = "llama", deep: int = 3, wide: int = 8, kinds: str = "q", plain: bool = True
) -> Adapter:
    modules = {
        f"model.layers.{layer}.{kind}_proj": Factors(torch.ones(wide, 2), torch.ones(2, wide))
        for layer in range(deep)
        for kind in kinds
    }
    about = BaseInfo(base, targets=tuple(f"{kind}_proj" for kind in kinds) if plain else ())
    peft_format.save(folder, modules.items(), list(modules), about)
    return Adapter(folder)


def test_different_targets_of_one_base_are_accepted(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "a", kinds="qv"), adapter(tmp_path / "b", kinds="vo")
    check_same_base([one, two], same_base=False)


@pytest.mark.parametrize("accepted", [False, True])
def test_different_shapes_and_depths_are_always_refused(accepted: bool, tmp_path: Path) -> None:
    one = adapter(tmp_path / "a")
    with pytest.raises(
        UserError, match=r"different bases .*: .*q_proj is 16 × 16 in the first and 8 × 8 in the second"
    ):
        check_same_base([one, adapter(tmp_path / "b", wide=16)], same_base=accepted)
    with pytest.raises(
        UserError, match=r"different bases .*: the last q_proj is in layer 4 in the first and in layer 2 in the"
    ):
        check_same_base([one, adapter(tmp_path / "c", deep=5)], same_base=accepted)
    two, three = adapter(tmp_path / "d", kinds="v"), adapter(tmp_path / "e", wide=16, kinds="v")
    with pytest.raises(UserError, match="different bases"):  # only the second and third share modules
        check_same_base([one, two, three], same_base=accepted)


def test_adapter_of_selected_layers_may_stop_early(tmp_path: Path) -> None:
    check_same_base([adapter(tmp_path / "a"), adapter(tmp_path / "b", deep=2, plain=False)], same_base=False)


def test_unnamed_bases_need_same_base(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not name its base, nor does"):
        check_same_base([adapter(tmp_path / "a", base=""), adapter(tmp_path / "b", base="")], same_base=False)


def test_different_base_names_need_same_base(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "a"), adapter(tmp_path / "b", base="/mnt/llama\x1b[31m")
    with pytest.raises(UserError, match="add --same-base") as raised:
        check_same_base([one, two], same_base=False)
    assert "\x1b" not in str(raised.value)
    check_same_base([one, two], same_base=True)
