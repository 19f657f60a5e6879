"""LoRA algebra against dense float64 matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_align.adapters.delta import Factors, LoraDelta, is_finite, total

SHAPES = {"q": (12, 8), "v": (4, 8), "down": (8, 20)}
Dense = dict[str, torch.Tensor]


def make(seed: int, rank: int, modules: tuple[str, ...] = tuple(SHAPES)) -> LoraDelta:
    generator = torch.Generator().manual_seed(seed)
    return LoraDelta.of(
        {
            name: Factors(
                torch.randn(SHAPES[name][0], rank, generator=generator),
                torch.randn(rank, SHAPES[name][1], generator=generator),
            )
            for name in modules
        }
    )


def dense(delta: LoraDelta) -> Dense:
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return zero | {name: f.B.double() @ f.A.double() for name, f in delta.items()}


def flat(matrices: Dense) -> torch.Tensor:
    return torch.cat([matrices[name].flatten() for name in SHAPES])


deltas = st.builds(
    make,
    seed=st.integers(0, 2**31),
    rank=st.integers(1, 6),
    modules=st.lists(st.sampled_from(list(SHAPES)), min_size=1, unique=True).map(tuple),
)
weights = st.floats(-3, 3, allow_nan=False, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(deltas, weights), min_size=1, max_size=5))
def test_weighted_sums_are_exact(parts: list[tuple[LoraDelta, float]]) -> None:
    whole = total([delta * weight for delta, weight in parts])
    expected = sum(flat(dense(delta)) * weight for delta, weight in parts)
    assert torch.allclose(flat(dense(whole)), torch.as_tensor(expected), atol=1e-4)


@settings(deadline=None)
@given(deltas, deltas)
def test_subtraction_undoes_addition_and_negation_is_minus_one(a: LoraDelta, b: LoraDelta) -> None:
    assert torch.allclose(flat(dense(a + b - b)), flat(dense(a)), atol=1e-4)
    assert torch.equal(flat(dense(-a)), flat(dense(a * -1.0)))
    assert (a - a).norm() <= 1e-5 * a.norm()


@settings(deadline=None)
@given(deltas, deltas, deltas)
def test_sums_associate_commute_and_have_a_zero(a: LoraDelta, b: LoraDelta, c: LoraDelta) -> None:
    assert torch.allclose(flat(dense((a + b) + c)), flat(dense(a + (b + c))), atol=1e-4)
    assert torch.allclose(flat(dense(a + b)), flat(dense(b + a)), atol=1e-4)
    for same in (a * 1.0, a + b * 0.0, a + LoraDelta(()), LoraDelta(()) + a, total([a])):
        assert torch.allclose(flat(dense(same)), flat(dense(a)), rtol=1e-12, atol=1e-12)
    assert not flat(dense(a * 0.0)).any()
    assert (a + b + c).rank <= a.rank + b.rank + c.rank


@settings(deadline=None)
@given(deltas, deltas)
def test_norms_and_cosines_match_dense_matrices(a: LoraDelta, b: LoraDelta) -> None:
    x, y = flat(dense(a)), flat(dense(b))
    assert math.isclose(a.norm(), float(x.norm()), rel_tol=1e-9)
    assert math.isclose(a.inner(b), float(x @ y), rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(a.cosine(b), float(x @ y / x.norm() / y.norm()), rel_tol=1e-9, abs_tol=1e-9)


@settings(deadline=None)
@given(deltas, deltas, st.integers(1, 12), st.sampled_from([1.0, 1e-5, 0.0]))
def test_cut_is_the_best_approximation(a: LoraDelta, b: LoraDelta, rank: int, uneven: float) -> None:
    """Includes columns of very different size, or zero, where the Gram matrix is ill-conditioned."""
    for name, factors in (a + b * uneven).items():
        whole = factors.B.double() @ factors.A.double()
        cut, energy, lost = factors.truncate(rank)
        tail = float(torch.linalg.svdvals(whole)[rank:].square().sum())
        assert cut.rank <= max(rank, 1), name
        assert math.isclose(energy, float(whole.square().sum()), rel_tol=1e-6)
        assert math.isclose(lost, tail, rel_tol=1e-6, abs_tol=1e-9 * energy)
        error = float((cut.B.double() @ cut.A.double() - whole).square().sum())
        assert math.isclose(error, tail, rel_tol=1e-3, abs_tol=1e-9 * energy)


def test_finite_detects_nan_and_infinity() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for value in (math.nan, math.inf, -math.inf):
            for place in (0, 1234, 4999):
                tensor = torch.randn(5000).to(dtype)
                assert is_finite(tensor)
                tensor[place] = value
                assert not is_finite(tensor)
    assert is_finite(torch.empty(0))


def test_deltas_are_immutable() -> None:
    a = make(0, 2)
    before = flat(dense(a)).clone()
    a * 3 + make(1, 2)
    assert torch.equal(flat(dense(a)), before)
    with pytest.raises(AttributeError):
        a.terms = ()  # type: ignore[misc]
    assert math.isnan((a * 0).cosine(a))
