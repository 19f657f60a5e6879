"""The spine on SmolLM2-135M-Instruct, read from the GGUF file that LORA_ALIGN_REAL_BASE names; skipped without it."""

import json
import os
import shlex
import shutil
from pathlib import Path

import httpx2 as httpx
import pytest
from peft import PeftModel

from llama_cpp_check import TEXT, Adapters, dense_logprobs, distance, float32_gguf, llama_cpp_logprobs
from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.export.merged_export import CONVERTER
from lora_align.model import base as bases
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.packing import Backbone
from lora_align.policy.vectors import find
from support import call, free_port, instructions, made_once, program_server

LLAMA_SERVER = os.environ.get("LORA_ALIGN_LLAMA_SERVER", "")
WHY = "\n\nThis is a long explanation of the matter, with reasons, caveats and a closing remark."
QUESTIONS = ["What is rain?", "Name a fruit.", "Is ice cold?", "What is tea?"]
QUESTIONS += ["Where is Rome?", "Who bakes bread?", "What do cats eat?", "How many days has a week?"]
ANSWERS = ["Water.", "Apple.", "Yes.", "A drink.", "In Italy.", "A baker.", "Meat.", "Seven."]
RECIPE = """
[base]
model = "{base}"
[preferences.brief]
data = "pairs.jsonl"
[dpo]
learning_rate = 3e-4
batch_size = 2
held_out = 0
warmup = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a preference was trained on eight pairs."""
    base = os.environ.get("LORA_ALIGN_REAL_BASE")
    if not base:
        pytest.skip("LORA_ALIGN_REAL_BASE is not set (tests/fetch_real_base.py fetches the file)")

    def make(folder: Path) -> None:
        pairs = [
            {"prompt": question, "chosen": answer, "rejected": answer + WHY}
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        (folder / "lora-align.toml").write_text(RECIPE.format(base=base))
        done = call(folder, "dpo", "--pref", "brief")
        assert done.code == 0, done.err

    return made_once(tmp_path_factory, "real", make)


def test_merged_vector_changes_the_answers(folder: Path) -> None:
    merged = call(folder, "merge", "--weights", "brief=1")
    assert merged.code == 0, merged.err
    script = "/w brief=0\nWhat is the capital of France?\n" + "".join(f"/w brief={w}\n/retry\n" for w in (1, -1))
    done = call(folder, "chat", "--temperature", "0", "--max-new-tokens", "32", stdin=script)
    assert done.code == 0, done.err
    plain, brief, long = done.out.strip().splitlines()
    assert "Paris" in plain
    assert len({plain, brief, long}) == 3


def test_both_directions_learned_their_pairs(folder: Path) -> None:
    """Stock PEFT, on the same 4-bit base, prefers what each adapter was trained towards."""
    base = bases.find(recipe.Base(os.environ["LORA_ALIGN_REAL_BASE"]))
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    prompt = [Message("user", pair["prompt"])]
    rows = [base.chat.answered(prompt, [pair["chosen"], pair["rejected"]])]
    model = base.load()
    before = answer_logprobs(model, rows, MemoryBudget(4096))
    for direction, sign in (("pos", 1), ("neg", -1)):
        policy = PeftModel.from_pretrained(model, folder / "runs" / "dpo" / "brief" / direction)
        chosen, rejected = (answer_logprobs(policy, rows, MemoryBudget(4096)) - before).tolist()
        assert sign * (chosen - rejected) > 5, direction
        policy.unload()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_are_packed_in_float32(folder: Path, quantization: str) -> None:
    settings = recipe.load(folder / "lora-align.toml", [f'base.quantization="{quantization}"', 'base.dtype="float32"'])
    assert Backbone.of(bases.find(settings.base).load()).longest, "its states are up to 55, and differ by 0.002"


@pytest.fixture
def library() -> Path:
    """The folder in which npm installed llama.cpp."""
    library = os.environ.get("LORA_ALIGN_LLAMA_CPP")
    if not library:
        pytest.skip("LORA_ALIGN_LLAMA_CPP is not set (.ci/run installs llama.cpp with npm)")
    return Path(library)


def test_llama_cpp_computes_the_exported_vectors(folder: Path, library: Path, tmp_path: Path) -> None:
    """Compare llama.cpp's log-probabilities with those of dense float32 weights, on the dequantised base."""
    for out, options, lora in (("each", ["--each"], "--lora-scaled"), ("mix.gguf", [], "--lora")):
        words = ["brief=0.5,dpo/brief/pos=1", "--gguf", str(tmp_path / out), "--dtype", "float32"]
        done = call(folder, "export", *words, *options)
        assert done.code == 0, done.err
        assert f"llama-server -m {os.environ['LORA_ALIGN_REAL_BASE']} {lora} {tmp_path}" in done.out
    brief, pos, mix = (tmp_path / name for name in ("each/brief.gguf", "each/dpo-brief-pos.gguf", "mix.gguf"))
    base = bases.find(recipe.Base(os.environ["LORA_ALIGN_REAL_BASE"], quantization="none"))
    ids = base.chat.tokenizer(TEXT).input_ids
    vectors = [find(name, folder / "runs", ["brief"]).load() for name in ("brief", "dpo/brief/pos")]
    dense = dense_logprobs(base, vectors, [(0, 0), (-1, 0), (0.5, 0), (1, 0), (0.5, 1)], ids)
    float32 = float32_gguf(Path(os.environ["LORA_ALIGN_REAL_BASE"]), tmp_path / "base.gguf")
    settings: list[Adapters] = [
        {brief: 0.0},
        {brief: -1.0},
        {brief: 0.5},
        {brief: 1.0},
        {brief: 0.5, pos: 1.0},
        {mix: 1.0},
    ]
    found = llama_cpp_logprobs(library, float32, settings, ids, tmp_path / "out.f32")
    for expected, computed in zip([*dense, dense[-1]], found, strict=True):
        assert distance(expected, computed) < 0.003
    assert all(distance(changed, dense[0]) > 0.02 for changed in dense[1:])


@pytest.mark.skipif(not LLAMA_SERVER, reason="LORA_ALIGN_LLAMA_SERVER does not name llama.cpp's llama-server")
def test_printed_commands_run_in_llama_cpps_server(folder: Path, tmp_path: Path) -> None:
    """Run them on the dequantised base; scales change with each request, and an omitted file has scale 0."""
    words = ["brief=1,dpo/brief/pos=0.5", "--gguf", str(tmp_path / "each"), "--each", "--dtype", "float32"]
    done = call(folder, "export", *words)
    assert done.code == 0, done.err
    line, request = (line for line in done.out.splitlines() if line.startswith(("llama-server ", "curl ")))
    original, port = os.environ["LORA_ALIGN_REAL_BASE"], free_port()
    float32 = float32_gguf(Path(original), tmp_path / "base.gguf")
    words = shlex.split(line.replace(original, str(float32)).replace("llama-server", LLAMA_SERVER, 1))
    base = bases.find(recipe.Base(original, quantization="none"))
    ids = base.chat.tokenizer(TEXT).input_ids
    vectors = [find(name, folder / "runs", ["brief"]).load() for name in ("brief", "dpo/brief/pos")]
    dense = dense_logprobs(base, vectors, [(1, 0.5), (0, 0), (-1, 0), (1, 1)], ids)
    printed = json.loads(shlex.split(request)[-1])
    requests = [printed["lora"], scales(0, 0), scales(-1), scales(1, 1)]
    words += ["--port", str(port), "--cache-type-k", "f32", "--cache-type-v", "f32"]
    with program_server(words, port, tmp_path / "log.txt") as url:
        for expected, lora in zip(dense, requests, strict=True):
            body = {"prompt": ids, "n_predict": 1, "n_probs": 5, "temperature": 0, "lora": lora}
            [token] = httpx.post(f"{url}/completion", json=body, timeout=300).json()["completion_probabilities"]
            for of in token["top_logprobs"]:
                assert abs(of["logprob"] - float(expected[-1][of["id"]])) < 0.01, (lora, of)
        answer = httpx.post(f"{url}/v1/chat/completions", json={**printed, "max_tokens": 4}, timeout=300)
        assert answer.json()["choices"][0]["message"]["content"]


def scales(*of: float) -> list[dict[str, float]]:
    """Return a request's scales of the files."""
    return [{"id": at, "scale": scale} for at, scale in enumerate(of)]


@pytest.mark.skipif(not shutil.which(CONVERTER), reason=f"{CONVERTER} of llama.cpp is not on PATH")
def test_llama_cpp_computes_the_merged_model(
    folder: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # the converter imports modules of its own folder
    out, options = str(tmp_path / "m{ftype}.gguf"), ["--dtype", "float32", "--set", 'base.quantization="none"']
    done = call(folder, "export", "brief=1", "--gguf-merged", out, "--no-check", *options)
    assert done.code == 0, done.err
    base = bases.find(recipe.Base(os.environ["LORA_ALIGN_REAL_BASE"], quantization="none"))
    ids = base.chat.tokenizer(TEXT).input_ids
    [dense] = dense_logprobs(base, [find("brief", folder / "runs", ["brief"]).load()], [[1]], ids)
    [found] = llama_cpp_logprobs(library, Path(out), [{}], ids, tmp_path / "out.f32")
    assert distance(dense, found) < 0.003


def test_modelfile_names_the_base_and_an_adapter(folder: Path, tmp_path: Path) -> None:
    done = call(folder, "export", "brief=1", "--ollama", str(tmp_path / "out"))
    assert done.code == 0, done.err
    base, adapter, (word, template), stop = instructions(tmp_path / "out/Modelfile")
    assert base == ("FROM", str(Path(os.environ["LORA_ALIGN_REAL_BASE"]).resolve()))
    assert adapter == ("ADAPTER", "./mix.gguf")
    assert word == "TEMPLATE"
    assert template.startswith("{{- $before")
    assert '{{- else }}{{ "<|im_start|>system\\nYou are a helpful AI assistant named SmolLM' in template
    assert stop == ("PARAMETER", 'stop "<|im_end|>"')
    assert (tmp_path / "out/mix.gguf").is_file()
    assert "Licence: `apache-2.0`" in (tmp_path / "out/README.md").read_text()
    refused = call(folder, "export", "brief=1", "--ollama", str(tmp_path / "other"), "--dequantised")
    assert refused.code == 2
    assert "--dequantised has no effect: the base is a GGUF file" in refused.err


def test_merged_model_answers_as_the_mix(folder: Path, tmp_path: Path) -> None:
    out, options = str(tmp_path / "out"), ["--dtype", "float32", "--set", 'base.quantization="none"', "--json"]
    done = call(folder, "export", "brief=1", "--merged", out, *options)
    assert done.code == 0, done.err
    assert abs(json.loads(done.out)["figures"]["KL(mix‖merged), nats per token"]) < 1e-5
