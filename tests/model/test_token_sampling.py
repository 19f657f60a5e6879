"""Rows with different settings are sampled as they would be alone."""

import torch

from lora_align.model.token_sampling import pick, uniforms


def test_rows_with_different_settings_equal_rows_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 1000, generator=generator)
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(16)
    top_p = torch.tensor([1.0, 0.3, 0.9, 0.01]).repeat_interleave(16)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    together = pick(logits, temperature, top_p, uniform)
    alone = [pick(logits[i : i + 1], temperature[i : i + 1], top_p[i : i + 1], uniform[i : i + 1]) for i in range(64)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert (together == logits.argmax(-1))[temperature == 0].all()
    assert not (together == logits.argmax(-1)).all()


def test_random_numbers_depend_on_seed_prompt_and_number_and_not_on_the_count() -> None:
    first = uniforms(1, [5, 6], 0, 8)
    assert torch.equal(first, uniforms(1, [5, 6], 0, 100)[:8])
    for other in (uniforms(2, [5, 6], 0, 8), uniforms(1, [5, 7], 0, 8), uniforms(1, [5, 6], 1, 8)):
        assert not torch.equal(first, other)
