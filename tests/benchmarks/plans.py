"""Record the plans of built-in recipes on common cards. Nothing is measured on a card.

python tests/benchmarks/plans.py
"""

import os
from datetime import UTC, datetime

os.environ["HF_HUB_OFFLINE"] = "1"  # so that the shipped shapes are used, as on a machine without a network

from report import RESULTS, save

from lora_align import recipe
from lora_align.console import Screen
from lora_align.plan import planner

PLANS = [  # recipe, card, number of cards
    ("qwen3-4b", "rtx-4060", 1),
    ("llama-3.2-3b", "rtx-4060", 1),
    ("llama-3.2-3b", "rtx-3060", 1),
    ("mistral-7b", "rtx-3060", 1),
    ("qwen3-8b", "rtx-4060", 1),
    ("qwen3-8b", "rtx-3090", 1),
    ("qwen3-8b", "rtx-4090", 1),
    ("llama-3.1-8b", "rtx-4090", 1),
    ("qwen3-14b", "rtx-4090", 1),
    ("qwen3-32b-two-cards", "rtx-4090", 2),
]


def main() -> None:
    """Write plans.txt for readers, and plans.json with the figures that README.md shows."""
    texts = [
        f"Plans, calculated {datetime.now(UTC).date()} without a network, from the shapes of bases that come with "
        "lora-align.\nNothing was measured on a card."
    ]
    rows = []
    for name, card, cards in PLANS:
        settings = recipe.load(recipe.builtin()[name])
        plan = planner.plan_stages(settings, ["dpo", "tune"], Screen(quiet=True), card=card, cards=cards)
        option = f" --cards {cards}" if cards > 1 else ""
        texts.append(f"$ lora-align plan --recipe {name} --card {card}{option}\n{plan.summary()}")
        dpo = plan.as_json()["stages"][0]
        rows.append(
            {
                "recipe": name,
                "card": card,
                "cards": cards,
                "GB": round(dpo["total"] / 1e9, 1),
                "fits": dpo["fits"],
                "hours": round(dpo["seconds"] / 3600, 1),
            }
        )
    (RESULTS / "plans.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    save("plans", {"dpo of three preferences, both directions": rows})


if __name__ == "__main__":
    main()
