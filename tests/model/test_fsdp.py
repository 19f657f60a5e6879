"""A base sharded over two processes computes the same as a whole one. The two processes run this file as a script."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

TORCHRUN = Path(sys.executable).with_name("torchrun")


def by_two(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", __file__, what, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the report of each process."""
    folder = tmp_path_factory.mktemp("sharded")
    done = by_two("compare", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{number}.json").read_text()) for number in (0, 1)]


def test_sharded_base_computes_the_same_bits(reports: list[dict[str, Any]]) -> None:
    for of in reports:
        assert of["states"] == of["states again, sharded before"] == 0.0
        assert of["gradients"] == of["gradients, checkpointed"] == [0.0, 0.0]
        assert of["dense"] == 0.0
        assert of["4-bit states moved"] >= of["4-bit layers"] > 0, "a card's shard needs its states there, too"


def test_each_process_stores_half_of_the_weights(reports: list[dict[str, Any]]) -> None:
    whole = reports[0]["bytes whole"]
    assert [of["bytes"] for of in reports] == [whole / 2, whole / 2]


def test_dummy_passes_leave_gradients_unchanged(reports: list[dict[str, Any]]) -> None:
    """Rank 0 runs three passes. Rank 1 runs one and then fails."""
    for of in reports:
        assert of["gradients in step"] == 0.0
    assert reports[1]["failed"] == "on purpose"


def test_out_of_memory_in_one_process_ends_both(tmp_path: Path) -> None:
    done = by_two("exhaust", tmp_path)
    assert done.returncode != 0
    assert (tmp_path / "1.json").read_text().startswith('"out of memory with 1,000,000 rows or tokens at once')


# --- what each process runs ---


def adapted(fsdp: bool, checkpointing: bool = False) -> "PeftModel":
    import torch
    from peft import LoraConfig, get_peft_model

    from lora_align import recipe
    from lora_align.model import base as bases

    model = bases.find(replace(recipe.Base("demo"), fsdp=fsdp)).load(cache_from=0)  # cached in 4-bit like a large base
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    lots = torch.Generator().manual_seed(0)
    for _, parameter in sorted(policy.named_parameters()):
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=lots)
    return policy.train()


def states(policy: "PeftModel", ids: "Tensor") -> "Tensor":
    return policy.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def gradients(policy: "PeftModel", batches: "list[Tensor]") -> "Tensor":
    import torch

    policy.zero_grad()
    for ids in batches:
        states(policy, ids).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def texts(*lengths: int) -> "list[Tensor]":
    import torch

    lots = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return [torch.randint(4, 500, (2, length), generator=lots) for length in lengths]


def compare() -> dict[str, Any]:
    import torch
    from bitsandbytes.functional import QuantState
    from torch.distributed.tensor import DTensor

    from lora_align.errors import RunFailedError
    from lora_align.model.fsdp import keep_in_step
    from lora_align.model.nf4 import dense_weight

    facts: dict[str, Any] = {}
    moved: list[Any] = []
    move = QuantState.to
    QuantState.to = lambda state, device: moved.append(device) or move(state, device)
    whole, before = adapted(fsdp=False), len(moved)
    sharded = adapted(fsdp=True)
    facts["4-bit states moved"] = len(moved) - before
    (ids,) = texts(30)
    with torch.no_grad():
        for name in ("states", "states again, sharded before"):
            facts[name] = float((states(whole, ids) - states(sharded, ids)).abs().max())
    wanted = gradients(whole, [ids])
    checkpointed = adapted(fsdp=True, checkpointing=True)
    for name, policy in (("gradients", sharded), ("gradients, checkpointed", checkpointed)):
        facts[name] = [float((gradients(policy, [ids]) - wanted).abs().max()) for _ in range(2)]

    linears = [
        (a.base_layer, b.base_layer)
        for a, b in zip(whole.modules(), sharded.modules(), strict=True)
        if hasattr(a, "lora_A") and hasattr(a, "base_layer")
    ]
    facts["dense"] = max(float((dense_weight(a) - dense_weight(b)).abs().max()) for a, b in linears)
    facts["4-bit layers"] = len(linears)
    facts["bytes whole"] = sum(a.weight.numel() for a, _ in linears)
    parts = [parameter for parameter in sharded.parameters() if isinstance(parameter, DTensor)]
    facts["bytes"] = sum(part.to_local().numel() for part in parts)

    mine = texts(30, 12, 50)[: 3 - 2 * int(os.environ["RANK"])]
    wanted = gradients(whole, mine)
    try:
        with keep_in_step(sharded.get_base_model(), training=True):
            actual = gradients(sharded, mine)
            if len(mine) == 1:
                raise RunFailedError("on purpose")
    except RunFailedError as fault:
        facts["failed"] = str(fault)
    after = torch.cat([p.grad.flatten() for p in sharded.parameters() if p.requires_grad])
    facts["gradients in step"] = max(float((of - wanted).abs().max()) for of in (actual, after))
    return facts


def exhaust() -> str:
    import torch

    from lora_align.errors import OutOfStepError
    from lora_align.model.fsdp import keep_in_step
    from lora_align.model.memory_budget import MemoryBudget

    sharded, tokens = adapted(fsdp=True), 1_000
    if os.environ["RANK"] == "1":
        tokens = 1_000_000
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, resource.RLIM_INFINITY))
    try:
        with torch.no_grad(), keep_in_step(sharded.get_base_model()):
            MemoryBudget(tokens).attempt(lambda size: states(sharded, torch.zeros(size // 100, 100, dtype=torch.long)))
    except OutOfStepError as fault:
        return str(fault)
    return ""


if __name__ == "__main__":
    report = Path(sys.argv[2]) / f"{os.environ['RANK']}.json"
    report.write_text(json.dumps({"compare": compare, "exhaust": exhaust}[sys.argv[1]]()))
    sys.exit(sys.argv[1] == "exhaust")
