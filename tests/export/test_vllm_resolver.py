"""The plug-in of vLLM: weights in a model's name. LORA_ALIGN_VLLM names the vllm command for the last test."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from peft import PeftModel
from pyarrow.parquet import read_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.adapters.module_names import parse_name
from lora_align.demo import BASE
from lora_align.errors import UserError
from lora_align.export.vllm_resolver import MERGES, MixResolver
from support import VLLM, Cli, greedy_answer, small_disk, vllm_answer, vllm_server

MIXED, QUESTION = 20, "Tell me about rain."
RANK_20 = "helpful=1,harmless=1,dpo/helpful/pos=1"

UNLOCKED = """
import filelock, os
class OwnLock(filelock.FileLock):
    def __init__(self, path, *more, **others):
        super().__init__(f"{path}.{os.getpid()}", *more, **others)
filelock.FileLock = OwnLock
"""
OF_VLLM = {"regex", "filelock", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "rich"}
LIGHT = f"""
import sys
from pathlib import Path
import safetensors.torch
before = set(sys.modules)
from lora_align.export.vllm_resolver import MixResolver
MixResolver(Path("runs"), 9).folder(sys.argv[1], "helpful=1,harmless=-0.5")
more = [module for name, module in sys.modules.items() if name not in before]
installed = [module.__name__ for module in more if "site-packages" in (getattr(module, "__file__", None) or "")]
others = {{name.partition(".")[0] for name in installed}} - {OF_VLLM} - {{"lora_align"}}
assert not others, others
"""


@pytest.fixture
def resolver(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MixResolver:
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path / "cache"))
    return MixResolver(workspace / "runs", 9)


def test_folder_holds_the_mix_at_a_rank_that_vllm_accepts(resolver: MixResolver, workspace: Path) -> None:
    folder = resolver.folder(str(BASE), "helpful=1,harmless=-0.5")
    signs = {"helpful/pos": 1.0, "helpful/neg": -1.0, "harmless/pos": -0.5, "harmless/neg": 0.5}
    parts = [(peft_format.load(workspace / "runs/dpo" / name), sign) for name, sign in signs.items()]
    made = peft_format.load(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] in (8, 16, 32, 64)
    for module, factors in made.items():
        expected = sum(sign * (part[module].B.double() @ part[module].A.double()) for part, sign in parts)
        assert torch.allclose(factors.B.double() @ factors.A.double(), torch.as_tensor(expected), atol=1e-6)


def test_folder_is_that_of_merge(resolver: MixResolver, workspace: Path, cli: Cli) -> None:
    name = "helpful=1,harmless=-0.5"
    assert cli("merge", "--weights", name, "--fit", "vllm", "--out", "merged").code == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resolver.folder(str(BASE), name) / file).read_bytes() == (workspace / "merged" / file).read_bytes()


def test_equal_mixes_share_a_folder(resolver: MixResolver) -> None:
    first = resolver.folder(str(BASE), "helpful=1,harmless=-0.5")
    stamp = (first / "manifest.json").stat().st_mtime_ns
    for name in ("harmless=-0.5,helpful=1.0", "helpful=1.001,harmless=-0.5"):  # the grid is 1/64
        assert resolver.folder(str(BASE), name) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    assert resolver.folder(str(BASE), "helpful=1.01,harmless=-0.5") != first


def test_requests_that_want_one_mix_make_it_once(resolver: MixResolver) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(lambda _: resolver.folder(str(BASE), "helpful=0.25"), range(16)))
    [folder] = folders
    assert list(folder.parent.glob("[!.]*")) == [folder]


def test_processes_that_want_one_mix_make_it_once(workspace: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORA_ALIGN_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", LIGHT, str(BASE)]
    several = [subprocess.Popen(words, cwd=workspace, env=environment) for _ in range(3)]
    assert [process.wait(120) for process in several] == [0, 0, 0]
    assert len(list((tmp_path / "cache/mixes").glob("[!.]*"))) == 1


def test_nodes_whose_locks_do_not_see_each_other_make_one_mix(workspace: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORA_ALIGN_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", UNLOCKED + LIGHT, str(BASE)]
    several = [subprocess.Popen(words, cwd=workspace, env=environment) for _ in range(3)]
    assert [process.wait(120) for process in several] == [0, 0, 0]
    [folder] = (tmp_path / "cache/mixes").glob("[!.]*")
    runs.read(folder).check_files()


def test_full_disk_leaves_no_mix(
    resolver: MixResolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path / "disk"))
    with small_disk(tmp_path / "disk", "400k") as disk:
        assert asyncio.run(resolver.resolve_lora(str(BASE), "helpful=1,harmless=-0.5")) is None
        assert not [file for file in (disk / "mixes").rglob("*") if file.suffix == ".safetensors"]
    assert "No space left on device" in caplog.text


def test_cancelled_requests_do_not_raise_the_number_of_merges(resolver: MixResolver) -> None:
    under_way, most, merge = Counter[str](), [], resolver._merge

    def counted(*of: Any) -> None:
        under_way["now"] += 1
        most.append(under_way["now"])
        merge(*of)
        time.sleep(0.2)  # long enough for other requests to begin, if they may
        under_way["now"] -= 1

    async def ask() -> None:
        for weight in range(1, 7):
            request = asyncio.create_task(resolver.resolve_lora(str(BASE), f"helpful={weight}"))
            await asyncio.sleep(0.05)
            request.cancel()  # as vLLM does when a client leaves
        while under_way["now"]:
            await asyncio.sleep(0.05)

    resolver._merge = counted  # type: ignore[method-assign]
    asyncio.run(ask())
    assert max(most) == MERGES


def test_error_of_the_system_does_not_delete_a_folder(resolver: MixResolver) -> None:
    folder = resolver.folder(str(BASE), "helpful=1")
    weights = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()  # reading it is an OSError, as with too many open files
    with pytest.raises(UserError, match="damaged"):
        resolver.folder(str(BASE), "helpful=1")
    assert (folder / "adapter_model.safetensors").is_file()
    (folder / "manifest.json").rmdir()
    (folder / "manifest.json").write_bytes(weights)
    assert resolver.folder(str(BASE), "helpful=1") == folder


def test_folder_without_a_manifest_is_made_anew(resolver: MixResolver) -> None:
    folder = resolver.folder(str(BASE), "helpful=1")
    (folder / "manifest.json").unlink()
    assert resolver.folder(str(BASE), "helpful=1") == folder
    assert (folder / "manifest.json").is_file()


def test_name_that_no_file_can_have_is_refused(resolver: MixResolver) -> None:
    assert asyncio.run(resolver.resolve_lora(str(BASE), f"{'a' * 5000}=1")) is None


def test_damaged_folder_is_made_anew(resolver: MixResolver) -> None:
    folder = resolver.folder(str(BASE), "helpful=1")
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert resolver.folder(str(BASE), "helpful=1") == folder
    assert weights.read_bytes() == good
    assert list(folder.parent.glob("[!.]*")) == [folder]


@pytest.mark.parametrize(
    ("served", "name", "message"),
    [
        (str(BASE), "kind=1", "no preference or run 'kind'"),
        (str(BASE), "helpful=x", "expected NAME=NUMBER"),
        (str(BASE), "/etc=1", "'/etc' is not the name of a preference or a run"),
        (str(BASE), "../other=1", "'../other' is not the name of a preference or a run"),
        (str(BASE), "other=1", "'other' is not the name of a preference or a run"),
        (str(BASE), "helpful=0.001", "do not all round to 0"),
        (str(BASE), "helpful=1e300", "expected weights up to ±64"),
        (str(BASE), "helpful=1e308", "expected weights up to ±64"),
        ("owner/name", "helpful=1", "the vectors were trained on demo, but this server runs owner/name"),
    ],
)
def test_names_that_are_no_mix_are_refused(
    resolver: MixResolver, workspace: Path, monkeypatch: pytest.MonkeyPatch, served: str, name: str, message: str
) -> None:
    shutil.copytree(workspace / "runs/dpo/helpful/pos", workspace / "other")
    monkeypatch.chdir(workspace)
    with pytest.raises(UserError, match=message):
        resolver.folder(served, name)
    assert not resolver.names


def test_name_may_select_layers(resolver: MixResolver) -> None:
    folder = resolver.folder(str(BASE), "helpful@0-0=1")
    assert {parse_name(module).layer for module in peft_format.load(folder)} == {0}  # type: ignore[union-attr]


def test_names_are_limited(resolver: MixResolver) -> None:
    resolver.most = 2
    for weight in (0.5, 1.0):
        resolver.folder(str(BASE), f"helpful={weight}")
    with pytest.raises(UserError, match="2 mixes were named already; raise LORA_ALIGN_MIXES, or restart the server"):
        resolver.folder(str(BASE), "helpful=2")
    resolver.folder(str(BASE), "helpful=0.5")


def test_other_models_are_left_to_other_resolvers(resolver: MixResolver) -> None:
    assert asyncio.run(resolver.resolve_lora(str(BASE), "gpt-4")) is None


def test_resolver_needs_only_libraries_that_vllm_needs(workspace: Path, tmp_path: Path) -> None:
    """vLLM pins its own transformers, and its environment has neither PEFT nor bitsandbytes."""
    environment = {**os.environ, "LORA_ALIGN_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", LIGHT, str(BASE)]
    done = subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not VLLM, reason="LORA_ALIGN_VLLM does not name a vllm command")
def test_vllm_answers_each_request_with_its_mix(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """Clients ask for twenty mixes at the same time. The answers are those of stock PEFT on the merged adapters."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    weights = [f"helpful={30 * math.cos(turn):.3f},harmless={30 * math.sin(turn):.3f}" for turn in range(MIXED)]
    settings = {"LORA_ALIGN_RUNS": str(workspace / "runs"), "LORA_ALIGN_CACHE": str(tmp_path / "cache")}
    for most in (MIXED, 1):  # the second server finds the mixes of the first
        with (
            vllm_server(tmp_path, BASE, "--max-lora-rank", "16", LORA_ALIGN_MIXES=str(most + 1), **settings) as url,
            ThreadPoolExecutor(4) as clients,
        ):
            asked = weights[:most]
            too_large = httpx.post(f"{url}/v1/completions", json={"model": RANK_20, "prompt": QUESTION})
            assert too_large.status_code == httpx.codes.BAD_REQUEST
            answers = dict(zip(asked, clients.map(lambda name: vllm_answer(url, name, QUESTION), asked), strict=True))
            again = dict(zip(asked, clients.map(lambda name: vllm_answer(url, name, QUESTION), asked), strict=True))
            assert again == answers
            for name in ("helpful=2", "nobody=1", "helpful=x"):
                refused = httpx.post(f"{url}/v1/completions", json={"model": name, "prompt": QUESTION})
                assert refused.status_code == httpx.codes.NOT_FOUND
            if most == MIXED:
                words = ("eval", asked[0], "start", "--set", "eval.count=4", "--set", "eval.pairs=4", "--json")
                done = cli(*words, "--endpoint", url, "--model", "demo")
                assert done.code == 0, done.err
                assert json.loads(done.out)["policies"][asked[0]]["KL"]["value"] > 0
                (workspace / "asked.jsonl").write_text(json.dumps({"prompt": QUESTION}))
                words = ("generate", "--endpoint", url, "--weights", asked[0], "--prompts", "asked.jsonl")
                done = cli(*words, "--out", "answers.jsonl", "--temperature", "0")
                assert done.code == 0, done.err
                tables = [read_table(file).to_pylist() for file in workspace.glob("runs/eval/*/answers.parquet")]
                assert len(tables) == 2
                for row in (row for table in tables for row in table):
                    assert tokenizer.decode(row["ids"], skip_special_tokens=True).strip() == row["answer"] != ""
                first, made = answers, {folder.name for folder in (tmp_path / "cache/mixes").glob("[!.]*")}
                stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache/mixes").rglob("manifest.json")}
    log = (tmp_path / "log.txt").read_text()
    assert "'helpful=2': 21 mixes were named already" in log
    assert "'nobody=1': no preference or run" in log
    assert len(made) == MIXED + 1
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert answers.items() <= first.items()
    assert len(set(first.values())) > 4  # the mixes answer differently
    monkeypatch.setenv("LORA_ALIGN_CACHE", settings["LORA_ALIGN_CACHE"])
    resolver = MixResolver(workspace / "runs", MIXED)
    for name, answer in first.items():
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), resolver.folder(str(BASE), name)
        )
        assert greedy_answer(model, QUESTION) == answer, name
