"""Time other servers with the requests of serving.py: 16 clients, 64 greedy tokens each.

    python tests/benchmarks/serving_peers.py --work FOLDER --runs RUNS [--recipe FILE] [--name NAME]
        [--llama-server PROGRAM --base-gguf FILE] [--vllm PROGRAM] [--transformers]

llama.cpp's server gets one adapter a vector and the scales of each request. `transformers serve` has no adapters. vLLM
gets an adapter for each of the 16 weightings, merged beforehand. All run on the base of the recipe in float32 (a GGUF
file has its own type), one after the other, and each beside `lora-align serve` in the same run. The same command
continues after a stop.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx2 as httpx
from report import once, save
from serving import COMMAND, body, median, served, weightings

from lora_align import recipe
from lora_align.mix_weights import parse_weights
from lora_align.model import base as bases

CLIENTS, PORT, CONTEXT = 16, 8765, 512
START_SECONDS = 300


@contextmanager
def started(words: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """Run another server until its list of models answers; yield its address."""
    url = f"http://127.0.0.1:{PORT}"
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env={**os.environ, **environment})
    try:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            try:
                if httpx.get(f"{url}/v1/models", timeout=5).status_code == httpx.codes.OK:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        else:
            raise SystemExit(f"{words[0]} did not start; see {log}")
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class Peers:
    """The other servers, on the base and the vectors of a runs folder."""

    def __init__(self, words: argparse.Namespace) -> None:
        self.words = words
        self.recipe = ["--recipe", words.recipe] if words.recipe else []
        self.folder = bases.find(recipe.load(words.recipe or recipe.builtin()["demo"]).base).folder
        with served(words) as url:
            self.names = [vector["name"] for vector in httpx.get(f"{url}/v1/vectors", timeout=600).json()["vectors"]]
        self.models = weightings(self.names, CLIENTS)
        self.ours = [body(model, number) for number, model in enumerate(self.models)]

    def lora_align(self) -> dict[str, Any]:
        """Time this project's server."""
        with served(self.words) as url:
            return {"tokens/s": median(url, self.ours)}

    def llama_cpp(self) -> dict[str, Any]:
        """Time llama.cpp's server with the scales of each request, and with the scales of one request for all."""
        vectors = self.words.work / "vectors"
        if not vectors.is_dir():
            weights = ",".join(f"{name}=1" for name in self.names)
            self._command("export", weights, "--gguf", str(vectors), "--each", "--dtype", "float32")
        files = [str(vectors / f"{name}.gguf") for name in self.names]
        words = [self.words.llama_server, "-m", self.words.base_gguf, "--lora", ",".join(files), "-t", "2"]
        words += ["-np", str(CLIENTS), "-c", str(CLIENTS * CONTEXT), "--port", str(PORT), "--no-webui"]
        scales = [
            [{"id": i, "scale": of[name]} for i, name in enumerate(self.names)]
            for of in map(parse_weights, self.models)
        ]
        with started(words, self.words.work / "llama.txt") as url:
            different = [{**one, "model": "base", "lora": of} for one, of in zip(self.ours, scales, strict=True)]
            equal = [{**one, "lora": scales[7]} for one in different]
            return {"tokens/s": median(url, different), "tokens/s, one weighting": median(url, equal)}

    def transformers(self) -> dict[str, Any]:
        """Time `transformers serve` without adapters, with and without continuous batching."""
        program = str(Path(sys.executable).with_name("transformers"))
        asked = [{key: of[key] for key in ("messages", "temperature", "max_tokens")} for of in self.ours]
        asked = [{**one, "model": str(self.folder), "temperature": None} for one in asked]
        figures = {}
        for name, more in (("tokens/s", []), ("tokens/s, continuous batching", ["--continuous-batching"])):
            words = [program, "serve", str(self.folder), "--port", str(PORT), "--device", "cpu", "--dtype", "float32"]
            with started([*words, *more], self.words.work / "transformers.txt") as url:
                figures[name] = median(url, asked)
        return figures

    def vllm(self) -> dict[str, Any]:
        """Time vLLM with a merged adapter for each weighting."""
        modules = []
        for number, model in enumerate(self.models):
            folder = self.words.work / f"merged{number}"
            if not folder.is_dir():
                self._command("merge", "--weights", model, "--fit", "vllm", "--out", str(folder))
            modules.append(f"m{number}={folder}")
        words = [self.words.vllm, "serve", str(self.folder), "--port", str(PORT), "--dtype", "float32"]
        words += ["--enforce-eager", "--enable-lora", "--max-loras", str(CLIENTS), "--max-lora-rank", "64"]
        words += ["--max-model-len", str(CONTEXT), "--lora-modules", *modules]
        with started(words, self.words.work / "vllm.txt", VLLM_CPU_KVCACHE_SPACE="1") as url:
            return {"tokens/s": median(url, [{**one, "model": f"m{i}"} for i, one in enumerate(self.ours)])}

    def _command(self, *words: str) -> None:
        runs = ["--runs", str(self.words.runs), *self.recipe]
        subprocess.run([str(COMMAND), *words, *runs], check=True, capture_output=True)


def main() -> None:
    """Time each server that was named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--name", default="serving_peers", help="of the result")
    parser.add_argument("--llama-server")
    parser.add_argument("--base-gguf")
    parser.add_argument("--vllm")
    parser.add_argument("--transformers", action="store_true")
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    peers = Peers(words)
    parts: dict[str, Callable[[], dict[str, Any]]] = {"lora-align serve": peers.lora_align}
    if words.llama_server:
        parts["llama.cpp's server"] = peers.llama_cpp
    if words.transformers:
        parts["transformers serve, no adapters"] = peers.transformers
    if words.vllm:
        parts["vLLM, merged adapters"] = peers.vllm
    figures: dict[str, Any] = {"clients": CLIENTS, "vectors": peers.names}
    for part, measure in parts.items():
        figures[part] = once(words.work, f"{words.name} {part}", measure)
        save(words.name, figures)


if __name__ == "__main__":
    main()
