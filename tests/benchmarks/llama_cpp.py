"""Compare log-probabilities in llama.cpp with those of dense float32 weights, on a real base and real pairs.

    LORA_ALIGN_LLAMA_CPP=FOLDER python tests/benchmarks/llama_cpp.py --base FILE.gguf --splits FOLDER --work FOLDER

FOLDER has node_modules/node-llama-cpp, as .ci/run installs it. Two vectors are trained on development pairs. The base
is the file itself, and a rewrite of it with dequantised weights. Errors are mean absolute differences of the
log-probabilities of the next token, weighted by the dense model's probabilities, over the tokens of a sentence. Where
llama.cpp's convert_hf_to_gguf.py is on PATH, the merged model is compared as well.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import splits
from report import save
from torch import Tensor

from llama_cpp_check import TEXT, Adapters, dense_logprobs, distance, float32_gguf, llama_cpp_logprobs
from lora_align import recipe
from lora_align.export.merged_export import CONVERTER
from lora_align.model import base as bases
from lora_align.policy.vectors import find
from support import COMMAND

RECIPE = """
[base]
model = "{base}"
quantization = "none"
[preferences.brief]
data = "{pairs}"
rank = "shorter"
margin = 80
skip_bad = true
[preferences.harmless]
data = "{pairs}"
skip_bad = true
[dpo]
limit = 32
held_out = 0
learning_rate = 3e-4
max_length = 256
"""
NAMES = ("brief", "harmless")
SETTINGS = [(0, 0), (-1, 0), (0.5, 0), (1, 0), (1, -0.5)]  # weights of both vectors
LABELS = [f"brief {brief}, harmless {harmless}" for brief, harmless in SETTINGS]
MIX = "brief=1,harmless=-0.5"


@dataclass(frozen=True)
class Comparison:
    """The files, and the log-probabilities of dense weights for each setting."""

    work: Path
    library: Path
    ids: list[int]
    dense: list[Tensor]

    def align(self, *words: str) -> None:
        """Run a command of lora-align in the work folder."""
        subprocess.run([COMMAND, *words, "--quiet"], cwd=self.work, check=True)

    def errors(self, model: Path, adapters: Sequence[Adapters], expected: Sequence[Tensor]) -> list[float]:
        """Return the error of llama.cpp for each setting of adapters."""
        found = llama_cpp_logprobs(self.library, model.resolve(), adapters, self.ids, self.work / "out.f32")
        return [float(f"{distance(*pair):.2g}") for pair in zip(expected, found, strict=True)]

    def adapters(self, model: Path, dtype: str) -> dict[str, float]:
        """Return the errors with one scaled file a vector, and with the mix as one file."""
        folder, mix = self.work / f"each-{dtype}", self.work / f"mix-{dtype}.gguf"
        if not mix.exists():
            self.align("export", MIX, "--gguf", str(folder), "--each", "--dtype", dtype)
            self.align("export", MIX, "--gguf", str(mix), "--dtype", dtype)
        files = [folder / f"{name}.gguf" for name in NAMES]
        scales: list[Adapters] = [dict(zip(files, weights, strict=True)) for weights in SETTINGS]
        errors = self.errors(model, [*scales, {mix: 1.0}], [*self.dense, self.dense[-1]])
        return dict(zip([*LABELS, "the last as one file"], errors, strict=True))

    def merged(self, dtype: str) -> float:
        """Return the error of the merged model."""
        file = self.work / f"merged-{dtype}.gguf"
        if not file.exists():
            self.align("export", MIX, "--gguf-merged", str(file), "--dtype", dtype, "--no-check")
        return self.errors(file, [{}], [self.dense[-1]])[0]


def main() -> None:
    """Compare every setting, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--splits", "--work"):
        parser.add_argument(name, type=Path, required=True)
    words = parser.parse_args()
    work, file = words.work.resolve(), words.base.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pairs = splits.file_of(words.splits.resolve(), "hh-harmless", "development")
    (work / "lora-align.toml").write_text(RECIPE.format(base=file, pairs=pairs))
    base = bases.find(recipe.Base(str(file), quantization="none"))
    ids = base.chat.tokenizer(TEXT).input_ids
    for name in NAMES:
        if not (work / "runs/dpo" / name).exists():
            subprocess.run([COMMAND, "dpo", "--pref", name, "--quiet"], cwd=work, check=True)
    vectors = [find(name, work / "runs", [name]).load() for name in NAMES]
    dense = dense_logprobs(base, vectors, SETTINGS, ids)
    os.environ.pop("PYTHONSAFEPATH", None)  # set for tests; the converter imports modules of its own folder
    compare = Comparison(work, Path(os.environ["LORA_ALIGN_LLAMA_CPP"]), ids, dense)
    figures: dict[str, Any] = {
        "change by the vectors": dict(zip(LABELS, (distance(dense[0], one) for one in dense), strict=True))
    }
    for kind, model in (("float32", float32_gguf(file, work / "float32.gguf")), (file.stem.split(".")[-1], file)):
        for dtype in ("float32", "float16", "q8_0"):
            figures[f"error, base in {kind}, adapters in {dtype}"] = compare.adapters(model, dtype)
    if shutil.which(CONVERTER):
        figures["error, merged model"] = {dtype: compare.merged(dtype) for dtype in ("float32", "bfloat16")}
    release = Path("node_modules/node-llama-cpp/llama/binariesGithubRelease.json")
    versions = json.loads((compare.library / release).read_text())
    save("llama_cpp", {"llama.cpp": versions["release"], "gguf": version("gguf"), **figures})


if __name__ == "__main__":
    main()
