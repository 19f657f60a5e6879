"""Packed rows train as if each stood alone."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_align import recipe
from lora_align.data import row_reader
from lora_align.demo import world
from lora_align.model import base as bases
from lora_align.model import tokenise
from lora_align.model.logprobs import Reader
from lora_align.train import sft


def test_packed_texts_do_not_attend_to_each_other() -> None:
    """The loss over packs is that over the rows one at a time, to rounding; no token is lost or learned twice."""
    base = bases.find(recipe.Base("demo"))
    model = base.load()
    talks = [row_reader.conversation(row, "") for row in world.conversations(3, 12)]
    rows = [
        row
        for answers_only in (True, False)
        for row in tokenise.texts(talks, base.chat, 256, Counter(), answers_only=answers_only)
    ]
    texts = [row for row in rows if row is not None]
    packs = [[texts[i] for i in pack] for pack in tokenise.pack([len(row.ids) for row in texts], 256)]
    assert sorted(row.ids for pack in packs for row in pack) == sorted(row.ids for row in texts)
    assert all(sum(len(row.ids) for row in pack) <= 256 for pack in packs)
    assert len(packs) < len(texts) / 2
    with torch.no_grad():
        objective = sft.SftLoss(Reader.of(model), base.chat)
        [tokens] = objective.weights(packs)
        result = objective.part(packs, [tokens])
        parts = [objective.part([pack], [tokens]).loss for pack in packs]
        apart = sum(
            cross_entropy(
                model(input_ids=torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.labels[1:]), reduction="sum"
            )
            for row in texts
        )
    learned = sum(label != tokenise.IGNORED for row in texts for label in row.labels[1:])
    assert tokens == result.figures["accuracy"][1] == learned
    assert float(result.loss) * tokens == pytest.approx(float(apart), rel=1e-5)
    assert float(sum(parts)) == pytest.approx(float(result.loss), rel=1e-5)


def test_a_large_rise_of_the_held_out_loss_is_divergence() -> None:
    [reason] = sft.unconverged({"rows": 3, "loss_before": 2.0, "loss": 9.4})
    assert reason.startswith("diverged: held-out loss rose from 2.000 to 9.400; lower learning_rate")
    [reason] = sft.unconverged({"rows": 3, "loss_before": 2.0, "loss": 2.95})
    assert reason.startswith("held-out loss rose from 2.000 to 2.950; lower learning_rate")
    [reason] = sft.unconverged({"rows": 3, "loss_before": 2.0, "loss": 2.0})
    assert reason.startswith("held-out loss did not fall: from 2.000 to 2.000; train longer")
    assert sft.unconverged({"rows": 3, "loss_before": 2.0, "loss": 1.9}) == sft.unconverged({"rows": 0}) == ()
