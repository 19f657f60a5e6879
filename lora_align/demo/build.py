"""Train the demo base from scratch: `just demo-base`, or `python -m lora_align.demo.build`."""

import argparse
import itertools
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_align.demo import BASE, world

SHARPER = 1.3  # logits are scaled by this factor after training, because so small a model is too uncertain
END, PAD, ROLES = "<|end|>", "<|pad|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def texts(seed: int, count: int) -> list[str]:
    """Return the training texts: one in six is a plain line, the others are conversations of one to three questions."""
    draw = random.Random(seed)
    talks, lines = world.conversations(seed, 3 * count, topics="all"), world.reading(seed)
    rendered = []
    for _ in range(count):
        if draw.random() < 1 / 6:
            rendered.append(next(lines) + END)
            continue
        turns = [next(talks) for _ in range(draw.choice((1, 1, 1, 1, 1, 1, 2, 3)))]
        messages = [message for row in turns for message in row["messages"]]  # type: ignore[attr-defined]
        rendered.append("".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages))
    return rendered


def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=512)
    fast.add_special_tokens({"additional_special_tokens": list(ROLES)})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model() -> LlamaForCausalLM:
    """Return the untrained model. Every dimension is a multiple of 64, as bitsandbytes' CPU kernels need."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def batches(rows: list[list[int]], size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield padded batches of rows of similar length forever. Each epoch has every row once, in a new order."""
    draw = random.Random(seed)
    while True:
        order = sorted(draw.sample(range(len(rows)), len(rows)), key=lambda row: len(rows[row]) // 8)
        starts = range(0, len(order), size)
        for start in draw.sample(starts, len(starts)):
            picked = [torch.tensor(rows[row]) for row in order[start : start + size]]
            yield torch.nn.utils.rnn.pad_sequence(picked, batch_first=True)


def train(model: LlamaForCausalLM, rows: list[list[int]], steps: int, batch: int, peak: float) -> None:
    """Train by next-token prediction, every token with the same weight: Muon for matrices, AdamW for the rest.

    Muon multiplies in bfloat16. On a CPU without bfloat16 instructions, a step takes up to 1.8 times as long.
    """
    usual = batch * sum(map(len, rows)) / len(rows)
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, peak, total_steps=steps, pct_start=0.05, cycle_momentum=False)
        for o in optimizers
    ]
    started, tokens = time.monotonic(), 0
    for step, ids in enumerate(itertools.islice(batches(rows, batch, seed=0), steps), 1):
        loss = model(input_ids=ids, attention_mask=ids != 0, labels=ids.masked_fill(ids == 0, -100)).loss
        here = int((ids != 0).sum())
        (loss * here / usual).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += here
        if step % 50 == 0:
            took = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {took:.0f} s  {tokens / took:,.0f} tok/s", flush=True)


def main() -> None:
    """Build the tokenizer and the model, and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BASE)
    parser.add_argument("--steps", type=int, default=7000)
    options = parser.parse_args()

    torch.manual_seed(0)
    corpus = texts(seed=0, count=160_000)
    tokenizer = build_tokenizer(corpus)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in corpus]
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, rows, options.steps, batch=64, peak=3e-3)
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPER)

    shutil.rmtree(options.out, ignore_errors=True)
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
