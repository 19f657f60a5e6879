"""Whether two answers of a pair should share their prompt: seconds of a step both ways, beside what the rule says.

Prompts grow as in conversations of several turns. Both ways in turns on the same rows, forwards and backwards.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from report import once, save

BASES = {"the built-in base": None, "8 layers of 256": (8, 256)}
PROMPTS, ANSWERS = (32, 128, 256, 512, 1024), (32, 128, 384)  # tokens
TOKENS = 4096  # of a step, about
ROUNDS = 3
SOME = 12  # real conversations


def compared(size: tuple[int, int] | None, work: Path) -> dict[str, Any]:
    """Of each shape: the time with a shared prompt in parts of the time without, and what the rule chooses."""
    from peft import get_peft_model
    from planning import base_of

    from lora_align import recipe
    from lora_align.model import base as bases
    from lora_align.model.logprobs import Reader
    from lora_align.model.tokenise import TokenPair
    from lora_align.stages import training
    from lora_align.stages.dpo import Preferring

    base = bases.find(recipe.Base(base_of(size, work)))
    model = base.load()
    policy = get_peft_model(model, training.fresh_adapter(recipe.Lora(rank=8), base)).train()
    rule = Reader.of(model)
    ways = {"shared": replace(rule, look=0.0), "apart": replace(rule, longest_shared=0)}
    found: dict[str, Any] = {}
    by_rule = by_best = always = never = 0.0
    for prompt in PROMPTS:
        for answer in ANSWERS:
            if prompt + 2 * answer > base.max_length:
                continue
            count = max(1, TOKENS // (2 * (prompt + answer)))
            rows = [TokenPair([5 + i % 90] * prompt, [7] * answer, [9] * answer, (-9.0, -9.0)) for i in range(count)]
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUNDS + 1):
                for way, reader in ways.items():
                    objective = Preferring(reader, base.chat, 0.1)
                    began = time.perf_counter()
                    policy.zero_grad()
                    objective.part(rows, [float(count)]).loss.backward()
                    seconds[way].append(time.perf_counter() - began)
            best = {way: min(taken[1:]) for way, taken in seconds.items()}
            shares = rule.shares(rows[0].shared())
            found[f"prompt {prompt}, answers {answer}"] = {
                "shared, of apart": round(best["shared"] / best["apart"], 3),
                "the rule": "shared" if shares else "apart",
            }
            by_rule += best["shared" if shares else "apart"]
            by_best += min(best.values())
            always, never = always + best["shared"], never + best["apart"]
    found["all of them, of the better way each"] = {
        "by the rule": round(by_rule / by_best, 3),
        "always shared": round(always / by_best, 3),
        "never shared": round(never / by_best, 3),
    }
    return found


def conversations(work: Path) -> dict[str, Any]:
    """Real pairs behind several turns, on a base they fit: each way's time, of that with nothing shared."""
    from collections import Counter

    from peft import get_peft_model
    from training import recipe_of

    from lora_align.data.pairs import read_pairs
    from lora_align.model import base as bases
    from lora_align.model import tokenise
    from lora_align.model.logprobs import Reader
    from lora_align.stages import training
    from lora_align.stages.dpo import Preferring

    project = recipe_of("real", work)
    base = bases.find(project.base)
    read = read_pairs(project.preference("first"), 0.0, None, Counter())
    several = [pair for pair, _ in read if sum(message.role == "user" for message in pair.prompt) > 1]
    rows = [row for row in tokenise.pairs(several, base.chat, project.dpo.max_length, Counter()) if row]
    rows = [replace(row, reference=(-9.0, -9.0)) for row in rows[:SOME]]
    policy = get_peft_model(base.load(), training.fresh_adapter(project.lora, base)).train()
    rule = Reader.of(policy.get_base_model())
    ways = {"never": replace(rule, longest_shared=0), "by the rule": rule, "always": replace(rule, look=0.0)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for way, reader in ways.items():
            objective = Preferring(reader, base.chat, 0.1)
            began = time.perf_counter()
            for row in rows:
                policy.zero_grad()
                objective.part([row], [1.0]).loss.backward()
            seconds[way].append(time.perf_counter() - began)
    best = {way: min(taken[1:]) for way, taken in seconds.items()}
    shared = sum(rule.shares(row.shared()) for row in rows)
    times = {f"{way}, of never": round(took / best["never"], 3) for way, took in best.items() if way != "never"}
    return {"pairs": len(rows), "of which the rule shares": shared, **times}


def main() -> None:
    """Each base."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("sharing"))
    parser.add_argument("--conversations", action="store_true", help="real pairs of several turns, and nothing else")
    options = parser.parse_args()
    work = options.work
    if options.conversations:
        save("sharing_conversations", once(work, "conversations", lambda: conversations(work)))
        return
    save("sharing", {name: once(work, name, lambda size=size: compared(size, work)) for name, size in BASES.items()})


if __name__ == "__main__":
    main()
