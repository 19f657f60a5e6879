"""Measure the cost of 4-bit weights on a real base: the loss on ordinary text of a GGUF file's weights in three forms.

    python tests/benchmarks/gguf_quality.py --base FILE.gguf --splits FOLDER

splits.py writes FOLDER. The texts are chosen answers of UltraFeedback's development pairs. The reference is the file's
weights dequantised to float32, because a quantised file has no more exact form.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import splits
from report import save

from lora_align import recipe
from lora_align.metrics.intervals import ratio
from lora_align.model import base as bases
from lora_align.model.logprobs import answer_logprobs
from lora_align.model.memory_budget import MemoryBudget

FORMS = {
    "float32": recipe.Base("", quantization="none", dtype="float32"),
    "bfloat16": recipe.Base("", quantization="none", dtype="bfloat16"),
    "nf4": recipe.Base("", quantization="nf4", dtype="float32"),
}
TEXTS, TOKENS = 100, 256


def losses(base: recipe.Base, texts: list[str]) -> tuple[list[float], list[int]]:
    """Return each text's negative log-likelihood without its first token, in nats, and its number of tokens."""
    found = bases.find(base)
    encode = found.chat.tokenizer
    ids = [encode(text, add_special_tokens=False)["input_ids"][:TOKENS] for text in texts]
    sums = answer_logprobs(found.load(), [(row[:1], [row[1:]]) for row in ids], MemoryBudget(4096))
    return (-sums).tolist(), [len(row) - 1 for row in ids]


def main() -> None:
    """Measure every form on the same texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--splits", type=Path, required=True)
    words = parser.parse_args()
    rows = splits.file_of(words.splits, "ultrafeedback", "development").read_text(encoding="utf-8").splitlines()[:TEXTS]
    texts = [json.loads(row)["chosen"] for row in rows]
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in texts]
    figures: dict[str, Any] = {"texts": len(texts), "tokens of a text at most": TOKENS}
    reference: list[float] = []
    for name, form in FORMS.items():
        nats, tokens = losses(replace(form, model=words.base), texts)
        reference = reference or nats
        places = range(len(texts))
        more = [after - before for after, before in zip(nats, reference, strict=True)]
        figures[name] = {
            "loss": asdict(ratio(nats, tokens, places)),
            "more than float32": asdict(ratio(more, tokens, places)),
        }
    save("gguf_quality", figures)


if __name__ == "__main__":
    main()
