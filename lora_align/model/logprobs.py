"""How likely a model finds given answers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

Answered = tuple[list[int], list[int]]  # token ids of a prompt, and of the answer behind it


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel, rows: Sequence[Answered], batch: int, report: Callable[[int], None] = lambda done: None
) -> Tensor:
    """log π(answer | prompt), summed over the answer's tokens: [n] float32 on the CPU; `report` hears how far it is."""
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    result = torch.empty(len(rows))
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        result[picked] = _batch_logprobs(model, [rows[i] for i in picked]).cpu()
        report(start + len(picked))
    return result


def _batch_logprobs(model: PreTrainedModel, rows: Sequence[Answered]) -> Tensor:
    """[b]. Rows are padded on the right; positions before the shortest prompt's end never reach the head."""
    sequences = [torch.tensor(prompt + answer) for prompt, answer in rows]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
    seen = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        seen[i, : len(sequence)] = 1
    skipped = min(len(prompt) for prompt, _ in rows) - 1
    kept = ids.shape[1] - skipped
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=kept).logits
    sums = []
    for i, (prompt, answer) in enumerate(rows):
        first, last = len(prompt) - 1 - skipped, len(prompt) + len(answer) - 1 - skipped
        targets = ids[i, len(prompt) : len(prompt) + len(answer)]
        log_p = logits[i, first:last].float().log_softmax(-1)  # position t predicts token t + 1
        sums.append(log_p.gather(-1, targets[:, None]).sum())
    return torch.stack(sums)
