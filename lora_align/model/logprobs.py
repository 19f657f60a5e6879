"""Log-probabilities of given answers under a model.

Logits are computed only at positions that predict an answer's token, a chunk at a time. Answers to one prompt share the
pass over the prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_align.errors import RunFailedError, UserError
from lora_align.model.memory_budget import MemoryBudget
from lora_align.model.packing import Backbone, tolerance

Answered = tuple[list[int], list[int]]  # token ids of a prompt and of its answer
Shared = tuple[list[int], Sequence[list[int]]]  # a prompt and several answers to it
Result = TypeVar("Result")
TOKENS = 8192  # tokens computed at once by default
MAX_LOGITS = 2**24  # logits computed at once: positions × vocabulary


@dataclass(frozen=True)
class Head:
    """A model's output head: cap · tanh(scale · layer(states) / cap), without the tanh if `cap` is 0."""

    layer: nn.Module
    scale: float
    cap: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """Return a model's head. Check first that its logits equal the model's own."""
        head = cls.unchecked(model)
        ids = torch.arange(4, 12, device=model.device)[None]
        with torch.no_grad():
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours = head.logits(states)
        if theirs.isnan().any():
            raise _not_finite(model)
        if not torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), atol=tolerance(model, theirs)):
            raise UserError(f"{type(model).__name__} computes its logits in an unsupported way; use another base.model")
        return head

    @classmethod
    def unchecked(cls, model: PreTrainedModel) -> "Head":
        """Return the head that the model's configuration describes."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None) or 0.0)

    def logits(self, states: Tensor) -> Tensor:
        """Map states [n, d] to logits [n, v] in float32."""
        logits = self.layer(states.to(self._dtype(states))).float() * self.scale
        capped: Tensor = self.cap * (logits / self.cap).tanh() if self.cap else logits
        return capped

    def logprobs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p of each target [n] after its state [n, d], in float32, and whether it is the likeliest token."""
        frozen = type(self.layer) is nn.Linear and not self.layer.weight.requires_grad and self.layer.bias is None
        if frozen:
            return _Logprobs.apply(states, self.layer.weight, targets, self.scale, self.cap)  # type: ignore[no-any-return, no-untyped-call]
        logits = self.logits(states)
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return logprobs, logits.argmax(-1) == targets

    def _dtype(self, states: Tensor) -> torch.dtype:
        weight = getattr(self.layer, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else states.dtype


class _Logprobs(torch.autograd.Function):
    """log p(target) of a frozen linear head.

    The forward pass also computes the gradient for the states, W[target] − Σ p W, a chunk of positions at a time. So
    logits are neither stored nor computed twice. The buffers are allocated once and reused: allocating them for every
    chunk takes longer than computing their content.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        cap: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(states), dtype=torch.float32, device=states.device)
        likeliest = torch.empty(len(states), dtype=torch.bool, device=states.device)
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        rows = max(1, min(len(states), MAX_LOGITS // len(weight)))
        logits_buffer = torch.empty(rows, len(weight), dtype=weight.dtype, device=states.device)
        p_buffer = torch.empty(logits_buffer.shape, dtype=torch.float32, device=states.device)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            wanted = targets[part, None]
            logits = torch.mm(states[part].to(weight.dtype) * scale, weight.T, out=logits_buffer[: len(wanted)])
            if cap:
                logits = cap * (logits.float() / cap).tanh_()
            p = torch.softmax(logits, -1, dtype=torch.float32, out=p_buffer[: len(wanted)])
            highest, target = logits.amax(-1).float(), logits.gather(-1, wanted)[:, 0].float()
            logprobs[part] = target - highest + p.amax(-1).log_()
            likeliest[part] = target == highest
            if slopes is not None:
                wanted_row = weight[wanted[:, 0]]
                if cap:
                    tanh_slope = 1 - (logits / cap).square_()
                    p, wanted_row = p.mul_(tanh_slope), wanted_row * tanh_slope.gather(-1, wanted).to(weight.dtype)
                slopes[part] = ((wanted_row - p.to(weight.dtype) @ weight) * scale).to(states.dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(likeliest)
        return logprobs, likeliest

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(slopes.dtype), None, None, None, None


@dataclass(frozen=True)
class Reader:
    """Computes log-probabilities of answers to prompts."""

    head: Head
    backbone: Backbone

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Reader":
        """Return a reader for a model. Check the model's head, and whether the model can pack rows."""
        return cls(Head.of(model), Backbone.of(model))

    @classmethod
    def unchecked(cls, model: PreTrainedModel) -> "Reader":
        """Return the reader that the model's configuration allows. The model may be on the meta device."""
        return cls(Head.unchecked(model), Backbone.unchecked(model))

    def padded(self) -> "Reader":
        """Return a reader that pads rows. Compiled layers need it: packing would recompile them for every batch."""
        return replace(self, backbone=replace(self.backbone, longest=0))

    def length(self, row: Shared) -> int:
        """Return how many tokens a prompt with its answers takes in a pass."""
        return self.backbone.length([row[0], *row[1]])

    def sums(self, rows: Sequence[Shared]) -> tuple[Tensor, Tensor]:
        """Return log π of every answer in order [a], and how many of its tokens are the likeliest [a]."""
        read, lengths = self._read(rows)
        sums, hits = (torch.stack([part.sum() for part in of.split(lengths)]) for of in read)
        return sums, hits

    def tokens(self, rows: Sequence[Answered]) -> Tensor:
        """Return log π of every token of the answers in order [n]."""
        return self._read([(prompt, [answer]) for prompt, answer in rows])[0][0]

    def _read(self, rows: Sequence[Shared]) -> tuple[tuple[Tensor, Tensor], list[int]]:
        """Return log π of every answer token, whether it is the likeliest, and the answers' lengths."""
        states, targets, lengths = self.predicting(rows)
        return self.head.logprobs(states, targets), lengths

    def predicting(self, rows: Sequence[Shared]) -> tuple[Tensor, Tensor, list[int]]:
        """Return the states [n, d] that predict the answers' tokens, these tokens [n], and the answers' lengths."""
        states = self.backbone.states([[prompt, *answers] for prompt, answers in rows])
        at, targets, lengths, start = list[int](), list[int](), list[int](), 0
        for prompt, answers in rows:
            begin = start + len(prompt)
            for answer in answers:
                at += [start + len(prompt) - 1, *range(begin, begin + len(answer) - 1)][: len(answer)]
                targets += answer
                lengths.append(len(answer))
                begin += len(answer)
            start = begin
        return *_picked(states, at, targets), lengths

    def predicted(self, states: Sequence[Tensor], at: Sequence[int], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return log p of each target after position `at` of the concatenated states, and whether it is likeliest."""
        return self.head.logprobs(*_picked(states, at, targets))


def _picked(states: Sequence[Tensor], at: Sequence[int], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    whole = torch.cat(list(states))
    where, ids = (torch.tensor(of, dtype=torch.long, device=whole.device) for of in (at, targets))
    return whole[where], ids


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Group rows of similar length, the longest first. Yield the row indices of each batch.

    Padded to equal length, a batch holds at most `budget` tokens. A longer row is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, budget // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count


def in_parts(
    lengths: Sequence[int], budget: MemoryBudget, work: Callable[[list[int]], Result]
) -> Iterator[tuple[list[int], Result]]:
    """Call `work` on rows in parts. Yield each part and its result. If memory runs out, halve `budget` and retry."""
    left = list(range(len(lengths)))
    while left:
        done: set[int] = set()
        for picked in batches_by_length([lengths[i] for i in left], budget.size):
            part = [left[i] for i in picked]
            result = budget.attempt(lambda _: (work(part),), smallest=lengths[part[0]])  # noqa: B023 - called in this iteration
            if result is None:  # the part was too large: regroup the remaining rows
                break
            done.update(part)
            yield part, result[0]
        left = [i for i in left if i not in done]


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel,
    rows: Sequence[Shared],
    budget: MemoryBudget,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return log π(answer | prompt) of every answer in order, float32, on the CPU.

    `report` is called with the number of rows done.
    """
    if not rows:
        return torch.empty(0)
    reader = Reader.of(model)
    logprobs: dict[int, Tensor] = {}

    def some(part: list[int]) -> Tensor:
        return reader.sums([rows[i] for i in part])[0].cpu()

    for part, sums in in_parts([reader.length(row) for row in rows], budget, some):
        logprobs.update(zip(part, sums.split([len(rows[i][1]) for i in part]), strict=True))
        report(len(logprobs))
    return torch.cat([logprobs[i] for i in range(len(rows))])


@torch.no_grad()
def guided_logprobs(
    model: PreTrainedModel, rows: Sequence[Shared], plain: Sequence[Shared], strength: float, budget: MemoryBudget
) -> Tensor:
    """Return log π of every answer in order, for logits (1 − s) · plain + s · guided, float32, on the CPU.

    `rows` has the answers after the guided prompts, and `plain` the same answers after the plain prompts.
    """
    if not rows:
        return torch.empty(0)
    reader, logprobs = Reader.of(model), dict[int, Tensor]()

    def some(part: list[int]) -> Tensor:
        (guided, targets, lengths), (unguided, _, _) = (
            reader.predicting([of[i] for i in part]) for of in (rows, plain)
        )
        chunk = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
        read = []
        for of in zip(*(tensor.split(chunk) for tensor in (guided, unguided, targets)), strict=True):
            logits = strength * reader.head.logits(of[0]) + (1 - strength) * reader.head.logits(of[1])
            read.append(logits.log_softmax(-1).gather(-1, of[2][:, None])[:, 0])
        return torch.stack([answer.sum() for answer in torch.cat(read).split(lengths)]).cpu()

    for part, sums in in_parts([reader.length(row) for row in rows], budget, some):
        logprobs.update(zip(part, sums.split([len(rows[i][1]) for i in part]), strict=True))
    return torch.cat([logprobs[i] for i in range(len(rows))])


def _not_finite(model: PreTrainedModel) -> UserError:
    """Return the error for logits that are not finite. It names the first weight that is not finite."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if any(".lora_" in name for name in broken):
        return RunFailedError(
            f"the adapter's weights are not finite ({broken[0]}): training diverged; train again with a lower "
            "learning_rate or weight_decay"
        )
    overflow = 'its weights are finite, so the logits overflow: set base.dtype = "bfloat16" or "float32"'
    why = f"its weights are not finite ({broken[0]}); fetch the base again" if broken else overflow
    return UserError(f"{type(model).__name__} computes logits that are not finite; {why}")
