"""Train the online-RL baseline: TRL's RLOO from the start policy, with a weighted sum of a reward model's objectives.

The result is an ordinary adapter for `eval`, `merge` and the other commands. This script alone trains RLOO; no command
does. To train a policy against a reward model, use `rsf`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from lora_align import runs
from lora_align.data.rows import Message
from lora_align.demo.measurement import LONGEST
from lora_align.model import base as bases
from lora_align.model.memory_budget import MemoryBudget
from lora_align.policy import start_policy
from lora_align.recipe import Recipe
from lora_align.train import lora_trainer, reward

# the second of two settings tried on another seed: 60 steps at 1e-2 broke the language
STEPS, PROMPTS, ANSWERS = 40, 16, 4  # steps, prompts a step, answers to each prompt
LEARNING_RATE = 4e-3
NAT = 1.0  # the KL penalty for each nat from the start policy, in the reward model's points


def train(project: Recipe, judge: Path, wanted: Mapping[str, float], prompts: Sequence[str], folder: Path) -> float:
    """Train an adapter into a folder; return the training seconds without the reward model's."""
    base = bases.find(project.base)
    start = start_policy.adapter(project, folder.parent)
    judged = reward.load(base, runs.read(judge))
    columns = [judged.objectives.index(name) for name in wanted]
    budget = MemoryBudget(PROMPTS * ANSWERS)

    def paid(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        conversations = ([Message(turn["role"], turn["content"]) for turn in prompt] for prompt in prompts)
        rows = [(base.chat.prompt_ids(of), list(ids)) for of, ids in zip(conversations, completion_ids, strict=True)]
        scores = judged.score(rows, budget)[:, columns].tolist()
        return [sum(weight * one for weight, one in zip(wanted.values(), of, strict=True)) for of in scores]

    trainer = RLOOTrainer(
        model=start_policy.load(base, start),
        reward_funcs=paid,
        args=RLOOConfig(
            output_dir=str(folder / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=PROMPTS * ANSWERS,
            num_generations=ANSWERS,
            max_completion_length=LONGEST,
            temperature=1.0,
            beta=NAT,
            normalize_advantages=True,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            gradient_checkpointing=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts]),
        processing_class=base.chat.tokenizer,
        peft_config=lora_trainer.adapter_config(project.lora, base),
    )
    lora_trainer.initialise(trainer.model, project.lora.init_seed)
    began = time.perf_counter()
    trainer.train()
    lora_trainer.save_adapter(trainer.model, folder)
    return time.perf_counter() - began
