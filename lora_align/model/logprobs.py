"""How likely a model finds given answers: the log-probabilities of their tokens, and of nothing else.

Only positions that predict an answer's token ever reach the vocabulary, some at a time, and answers to one prompt can
share it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_align import processes
from lora_align.errors import RunFailedError, UserError
from lora_align.model.nf4 import DequantisedLinear4bit, Linear4bit
from lora_align.model.room import Room

Answered = tuple[list[int], list[int]]  # token ids of a prompt, and of the answer behind it
Shared = tuple[list[int], Sequence[list[int]]]  # a prompt, and several answers to it
TOKENS = 8192  # computed at once where nobody says otherwise
LOGITS = 2**24  # computed at once: positions times vocabulary
NOISE = 4  # rounding steps of the dtype that the same logits may differ by, computed in two ways
LEAST = 1e-3  # a nat that they may differ by in any dtype
# What a pass through a base, forwards and backwards, takes beside its tokens: seconds a layer, and tokens where every
# pass dequantises 4-bit weights. The rate turns seconds into tokens. On a CPU measured by benchmarks/padding.py, on a
# card not measured. Fixed figures keep runs repeatable to the bit: a batch's company changes how its sums round.
RATE = {"cpu": 1.5e11, "cuda": 8e13}  # operations a second
LAYER = {"cpu": 4e-3, "cuda": 1e-3}  # seconds
DEQUANTISING = {"cpu": 30, "cuda": 140}  # tokens


@dataclass(frozen=True)
class Head:
    """What makes logits of a backbone's states: a linear layer, times `scale`, then bent so as not to exceed `cap`."""

    layer: nn.Module
    scale: float
    cap: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """A model's own, after it was found to say what the model says."""
        head = cls.unchecked(model)
        ids = torch.arange(4, 12, device=model.device)[None]
        with torch.no_grad():
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours = head.logits(states)
        if theirs.isnan().any():
            raise _not_finite(model)
        if not torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), atol=noise(model, theirs)):
            raise UserError(f"{type(model).__name__} computes its logits in a way that is not supported")
        return head

    @classmethod
    def unchecked(cls, model: PreTrainedModel) -> "Head":
        """A model's own, by its configuration."""
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None) or 0.0)

    def logits(self, states: Tensor) -> Tensor:
        """[n, d] to [n, v] in float32."""
        logits = self.layer(states.to(self._dtype(states))).float() * self.scale
        bent: Tensor = self.cap * (logits / self.cap).tanh() if self.cap else logits
        return bent

    def logprobs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p of each target [n] behind its state [n, d], in float32, and whether it was the likeliest."""
        plain = type(self.layer) is nn.Linear and not self.layer.weight.requires_grad and self.layer.bias is None
        if plain:
            return _Logprobs.apply(states, self.layer.weight, targets, self.scale, self.cap)  # type: ignore[no-any-return, no-untyped-call]
        logits = self.logits(states)
        found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return found, logits.argmax(-1) == targets

    def _dtype(self, states: Tensor) -> torch.dtype:
        weight = getattr(self.layer, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else states.dtype


def noise(model: PreTrainedModel, logits: Tensor) -> float:
    """Return what the same logits may differ by, in nats: rounding grows with the dtype's step and with their size."""
    return max(LEAST, NOISE * torch.finfo(model.dtype).eps * float(logits.abs().max()))


class _Logprobs(torch.autograd.Function):
    """log p_target of a frozen head. The gradient to the states, W[target] − Σ p W, is made on the way, some positions
    at a time, so that no pass over the vocabulary is kept or made twice. The memory for those passes is had once:
    the kernel takes longer to hand out such pages than arithmetic takes to fill them."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        cap: float,
    ) -> tuple[Tensor, Tensor]:
        found = torch.empty(len(states), dtype=torch.float32, device=states.device)
        likeliest = torch.empty(len(states), dtype=torch.bool, device=states.device)
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        rows = max(1, min(len(states), LOGITS // len(weight)))
        made = torch.empty(rows, len(weight), dtype=weight.dtype, device=states.device)
        chances = torch.empty(made.shape, dtype=torch.float32, device=states.device)  # the two are used over and over
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            wanted = targets[part, None]
            logits = torch.mm(states[part].to(weight.dtype) * scale, weight.T, out=made[: len(wanted)])
            if cap:
                logits = cap * (logits.float() / cap).tanh_()
            p = torch.softmax(logits, -1, dtype=torch.float32, out=chances[: len(wanted)])
            highest, said = logits.amax(-1).float(), logits.gather(-1, wanted)[:, 0].float()
            found[part] = said - highest + p.amax(-1).log_()
            likeliest[part] = said == highest
            if slopes is not None:
                wanted_row = weight[wanted[:, 0]]
                if cap:
                    bent = 1 - (logits / cap).square_()
                    p, wanted_row = p.mul_(bent), wanted_row * bent.gather(-1, wanted).to(weight.dtype)
                slopes[part] = ((wanted_row - p.to(weight.dtype) @ weight) * scale).to(states.dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(likeliest)
        return found, likeliest

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(slopes.dtype), None, None, None, None


@dataclass(frozen=True)
class Reader:
    """A model that reads answers behind their prompts."""

    model: PreTrainedModel
    head: Head
    longest_shared: int = 0  # tokens of a sequence up to which answers can share their prompt; 0: never
    look: float = 0.0  # what a token's look at another one takes, where a token's way through all matrices takes 1
    overhead: float = math.inf  # tokens that one more pass through the base is worth; infinite: always a single pass

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Reader":
        """Finds out what the model bears."""
        alone = cls(model, Head.of(model))
        if processes.in_step:
            return alone
        alone = replace(alone, overhead=overhead(model, model.device.type))
        sharing = replace(alone, longest_shared=_window(model))
        if not sharing.longest_shared:
            return alone
        tried: list[Shared] = [(list(range(4, 9)), ([9, 10, 11, 12], [10, 4, 5]))]
        with torch.no_grad():
            try:
                expected, found = alone.sums(tried)[0], sharing.sums(tried)[0]
            except (RuntimeError, ValueError, TypeError):  # a model that takes no such mask
                return alone
        alike = torch.allclose(expected, found, atol=4 * noise(model, expected))
        return replace(sharing, look=_look(model)) if alike else alone

    @classmethod
    def unchecked(cls, model: PreTrainedModel) -> "Reader":
        """By a model's configuration alone, as it need not have weights."""
        return cls(model, Head.unchecked(model), _window(model), _look(model), overhead(model, "cpu"))

    def shares(self, row: Shared) -> bool:
        """Whether its answers are to share their prompt: that saves the prompt's way through the matrices, but under
        a mask of our own every token is held against every other one, also those it must not see."""
        prompt, answers = row
        together = len(prompt) + sum(map(len, answers))
        if len(answers) == 1 or together > self.longest_shared:
            return False
        apart = sum((len(prompt) + len(answer)) ** 2 for answer in answers) / 2
        return (len(answers) - 1) * len(prompt) > self.look * (together**2 - apart)

    def length(self, row: Shared) -> int:
        """Count the tokens of a prompt with its answers, padding between the answers included where they are padded."""
        prompt, answers = row
        if self.shares(row):
            return len(prompt) + sum(map(len, answers))
        if math.isinf(self.overhead):
            return len(answers) * (len(prompt) + max(map(len, answers)))
        return sum(len(prompt) + len(answer) for answer in answers)

    def sums(self, rows: Sequence[Shared]) -> tuple[Tensor, Tensor]:
        """log π of every answer, in their order [a] and how many of its tokens were the likeliest [a]."""
        found = self._answers(rows)
        sums = zip(*((tokens.sum(), hits.sum()) for tokens, hits in found), strict=True)
        return tuple(map(torch.stack, sums))  # type: ignore[return-value]

    def tokens(self, rows: Sequence[Answered]) -> Tensor:
        """log π of every token of the answers, in their order [n]."""
        return torch.cat([tokens for tokens, _ in self._answers([(prompt, [answer]) for prompt, answer in rows])])

    def _answers(self, rows: Sequence[Shared]) -> list[tuple[Tensor, Tensor]]:
        """Return log π of every answer's tokens and whether each was the likeliest, in the order of the answers."""
        sequences: dict[bool, list[tuple[int, int, Shared]]] = {True: [], False: []}  # row, its first answer here
        for i, (prompt, answers) in enumerate(rows):
            if self.shares((prompt, answers)):
                sequences[True].append((i, 0, (prompt, answers)))
            else:
                sequences[False] += ((i, n, (prompt, [answer])) for n, answer in enumerate(answers))
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for shared, some in sequences.items():
            lengths = [len(prompt) + sum(map(len, answers)) for *_, (prompt, answers) in some]
            for batch in batches(lengths, self.overhead):
                layout = _Layout.of([some[at][2] for at in batch])
                given = layout.apart(self.model.dtype) if shared else layout.behind()
                read = self.read(given, layout.at_row, layout.at_place, layout.targets)
                each = [of.split(layout.lengths) for of in read]
                names = [(some[at][0], some[at][1] + n) for at in batch for n in range(len(some[at][2][1]))]
                found |= zip(names, zip(*each, strict=True), strict=True)
        return [found[name] for name in sorted(found)]

    def read(
        self, given: Mapping[str, Tensor], at_row: Tensor, at_place: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p of targets behind places in the model's input, and whether each was the likeliest."""
        where = self.model.device
        on_device = {name: tensor.to(where) for name, tensor in given.items()}
        states = self.model.get_decoder()(**on_device, use_cache=False).last_hidden_state
        return self.head.logprobs(states[at_row.to(where), at_place.to(where)], targets.to(where))


@dataclass(frozen=True)
class _Layout:
    """Rows side by side: ids padded on the right, and where each token of an answer is predicted."""

    ids: Tensor  # [b, t]
    owner: Tensor  # [b, t]: 0 for the prompt, 1 for the first answer and so on; -1 for padding
    places: Tensor  # [b, t]: positions, each answer's going on from the prompt's
    at_row: Tensor  # [n]
    at_place: Tensor  # [n]
    targets: Tensor  # [n]
    lengths: list[int]  # of each answer

    @classmethod
    def of(cls, rows: Sequence[Shared]) -> "_Layout":
        """For each prompt with its answers."""
        ids, owners, places, at_row, at_place, targets, lengths = [], [], [], [], [], [], []
        for number, (prompt, answers) in enumerate(rows):
            begin = len(prompt)
            ids.append(torch.tensor([*prompt, *itertools.chain.from_iterable(answers)]))
            owners.append(torch.tensor([0] * begin + [n for n, a in enumerate(answers, 1) for _ in a]))
            places.append(torch.tensor([*range(begin), *(begin + i for a in answers for i in range(len(a)))]))
            for answer in answers:
                at_place += [len(prompt) - 1, *range(begin, begin + len(answer) - 1)]
                at_row += [number] * len(answer)
                targets += answer
                lengths.append(len(answer))
                begin += len(answer)
        pad = nn.utils.rnn.pad_sequence
        return cls(
            pad(ids, batch_first=True),
            pad(owners, batch_first=True, padding_value=-1),
            pad(places, batch_first=True),
            torch.tensor(at_row),
            torch.tensor(at_place),
            torch.tensor(targets),
            lengths,
        )

    def behind(self) -> dict[str, Tensor]:
        """For a model that reads one answer a row: nothing looks ahead to the padding, so it needs no mask."""
        return {"input_ids": self.ids}

    def apart(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """For several a row: each token sees what stands before it of the prompt and of its own answer."""
        earlier = torch.ones(self.ids.shape[1], self.ids.shape[1]).tril().bool()
        seen = earlier & ((self.owner[:, None] == 0) | (self.owner[:, :, None] == self.owner[:, None]))
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return {"input_ids": self.ids, "attention_mask": mask[:, None], "position_ids": self.places}


def parts(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield indices of rows to compute together, of about one length, the longest first. Padded to one length, a part
    would hold at most `budget` tokens; a row longer than that is computed by itself.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, budget // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count


def batches(lengths: Sequence[int], overhead: float) -> list[list[int]]:
    """Divide sequences into batches, each padded to its longest, so that padding and `overhead` a batch cost least."""
    if not lengths or math.isinf(overhead):
        return [list(range(len(lengths)))] if lengths else []
    order = np.argsort(-np.asarray(lengths), kind="stable")
    width = np.asarray(lengths)[order]
    least, begins = np.zeros(len(order) + 1), []  # the least cost of the first so many, and where its last batch begins
    for end in range(1, len(order) + 1):
        costs = least[:end] + overhead + (end - np.arange(end)) * width[:end]
        begins.append(int(costs.argmin()))
        least[end] = costs[begins[-1]]
    found, end = [], len(order)
    while end:
        found.append(order[begins[end - 1] : end].tolist())
        end = begins[end - 1]
    return found[::-1]


def overhead(model: PreTrainedModel, device: str) -> float:
    """Return how many tokens one more pass through the base is worth on a device of that kind.

    It is infinite where processes share a divided base, as all of them go through it equally often.
    """
    if processes.in_step:
        return math.inf
    config = model.config.get_text_config()
    seconds = LAYER[device] * config.num_hidden_layers
    dequantised = all(isinstance(m, DequantisedLinear4bit) for m in model.modules() if isinstance(m, Linear4bit))
    return seconds * RATE[device] / (4 * max(_matrices(model), 1)) + (0 if dequantised else DEQUANTISING[device])


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel,
    rows: Sequence[Shared],
    room: Room,
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """log π(answer | prompt) of every answer, in their order, in float32 on the CPU; `report` hears of rows done."""
    if not rows:
        return torch.empty(0)
    reader = Reader.of(model)
    lengths = [reader.length(row) for row in rows]
    left = list(range(len(rows)))
    found: dict[int, Tensor] = {}
    while left:
        for picked in parts([lengths[i] for i in left], room.size):
            batch = [left[i] for i in picked]
            sums = room.attempt(
                lambda _, batch=batch: reader.sums([rows[i] for i in batch])[0].cpu(), lengths[batch[0]]
            )
            if sums is None:  # memory ran out: divide what is left anew
                break
            found.update(zip(batch, sums.split([len(rows[i][1]) for i in batch]), strict=True))
            report(len(found))
        left = [i for i in left if i not in found]
    return torch.cat([found[i] for i in range(len(rows))])


def _not_finite(model: PreTrainedModel) -> UserError:
    """Say which weights make logits that are no numbers: those that were trained on the base, or its own."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if any(".lora_" in name for name in broken):
        return RunFailedError(
            f"the adapter's weights are not finite ({broken[0]}): training diverged; a lower learning_rate, or a "
            "lower weight_decay, may help"
        )
    where = f"its weights are not finite ({broken[0]})" if broken else "its weights are finite: they overflow"
    return UserError(f"{type(model).__name__} computes logits that are not finite; {where}")


def _look(model: PreTrainedModel) -> float:
    """By the operations of a step: 4 a weight of the matrices, 14 a number that queries and keys are compared by."""
    config = model.config.get_text_config()
    wide = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return float(14 * wide * config.num_hidden_layers / (4 * max(_matrices(model), 1)))


def _matrices(model: PreTrainedModel) -> int:
    """Count the weights of the linear layers below the vocabulary."""
    linears = [layer for layer in model.get_decoder().modules() if isinstance(layer, nn.Linear)]
    return sum(layer.in_features * layer.out_features for layer in linears)


def _window(model: PreTrainedModel) -> int:
    """Up to which length every token can see every other one before it; 0 where masks are not one's own to choose."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return 0
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers - {"full_attention", "sliding_attention"}:
        return 0
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(window) if window else 2**31
