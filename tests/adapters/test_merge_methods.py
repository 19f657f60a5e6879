"""Every merge method against an independent dense float64 reference, and algebraic laws."""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_align.adapters import merge_methods, merge_options
from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.adapters.merge_methods import METHODS
from lora_align.adapters.streamed_merge import Merge, Tally
from lora_align.errors import UserError

OUT, INTO, MODULE = 24, 18, "model.layers.3.mlp.up_proj"
Dense = torch.Tensor
LINEAR = ("exact", "soup", "svd")
LOW_RANK = (*LINEAR, "tsv")


def update(seed: int, rank: int) -> LoraDelta:
    draw = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((OUT, rank), (rank, INTO)))
    return LoraDelta.of({MODULE: Factors(B, A)})


def dense(delta: LoraDelta) -> Dense:
    return delta[MODULE].B @ delta[MODULE].A


def result(job: Merge, rank: int | None = None) -> tuple[Dense, Tally]:
    tally = Tally()
    made = LoraDelta.of(dict(tally.counted(job.modules(rank))))
    return dense(made), tally


def close(a: Dense, b: Dense, bound: float = 1e-12) -> bool:
    return bool((a - b).norm() <= bound * max(float(a.norm()), float(b.norm()), 1.0))


def nearest(matrix: Dense, rank: int) -> Dense:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


# --- dense references, written as in the papers ---


def sum_of(matrices: Sequence[Dense], weights: Sequence[float]) -> Dense:
    return sum((w * m for m, w in zip(matrices, weights, strict=True)), torch.zeros(OUT, INTO, dtype=torch.float64))


def dense_ties(matrices: Sequence[Dense], weights: Sequence[float]) -> Dense:
    trimmed = []
    for matrix, weight in zip(matrices, weights, strict=True):
        threshold = sorted(matrix.abs().flatten().tolist(), reverse=True)[math.ceil(0.2 * matrix.numel()) - 1]
        trimmed.append(torch.where(matrix.abs() >= threshold, weight * matrix, 0.0))
    merged = torch.zeros_like(matrices[0])
    for row in range(OUT):
        for column in range(INTO):
            values = [float(matrix[row, column]) for matrix in trimmed]
            agreeing = [value for value in values if value * sum(values) > 0]
            merged[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def dense_dare(matrices: Sequence[Dense], weights: Sequence[float]) -> Dense:
    draws = [torch.Generator().manual_seed(zlib.crc32(f"0 {MODULE} v{i}".encode())) for i in range(len(matrices))]
    masks = [torch.rand(OUT, INTO, generator=draw) >= 0.9 for draw in draws]
    return sum_of([matrix * mask * 10 for matrix, mask in zip(matrices, masks, strict=True)], weights)


def dense_tsv(matrices: Sequence[Dense], weights: Sequence[float]) -> Dense:
    ranks = [int(torch.linalg.matrix_rank(matrix)) for matrix in matrices]
    keep = min(OUT, INTO) // len(matrices)
    factors = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    kept_ranks = [min(keep, rank) for rank in ranks]
    left = torch.cat([U[:, :k] for (U, _, _), k in zip(factors, kept_ranks, strict=True)], dim=1)
    right = torch.cat([Vt[:k] for (_, _, Vt), k in zip(factors, kept_ranks, strict=True)])
    sizes = torch.cat([w * S[:k] for (_, S, _), w, k in zip(factors, weights, kept_ranks, strict=True)])

    def whitened(matrix: Dense) -> Dense:
        P, _, Qt = torch.linalg.svd(matrix, full_matrices=False)
        return P @ Qt

    return whitened(left) @ torch.diag(sizes) @ whitened(right)


DENSE: dict[str, Callable[[Sequence[Dense], Sequence[float]], Dense]] = {
    "exact": sum_of,
    "soup": sum_of,
    "svd": lambda matrices, weights: sum_of(matrices, weights),
    "tsv": dense_tsv,
    "ties": dense_ties,
    "dare": dense_dare,
}


def test_every_method_has_a_dense_reference() -> None:
    assert set(DENSE) == set(METHODS)


parents = st.lists(
    st.tuples(st.integers(0, 2**31), st.integers(1, 4), st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)),
    min_size=1,
    max_size=4,
    unique_by=lambda parent: parent[0],
)
Parents = list[tuple[int, int, float]]


def job(parents: Parents, method: str, order: int = 1) -> Merge:
    keys = [f"v{i}" for i in range(len(parents))][::order]
    made = {f"v{i}": update(seed, rank) for i, (seed, rank, _) in enumerate(parents)}
    return Merge({k: made[k] for k in keys}, {f"v{i}": parents[i][2] for i in range(len(parents))}, method)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=40)
@given(parents)
def test_methods_match_truncated_dense_references(method: str, parents: Parents) -> None:
    whole = DENSE[method]([dense(update(seed, rank)) for seed, rank, _ in parents], [w for *_, w in parents])
    total = sum(rank for _, rank, _ in parents)
    default = max(rank for _, rank, _ in parents) if method == "svd" else total
    tail = torch.linalg.svdvals(whole).square()
    for rank in (None, 1, 3, 64):
        made, tally = result(job(parents, method), rank)
        kept_rank = rank or default
        bound = 1e-6 if method == "tsv" else 1e-12 if method == "exact" and rank is None else 1e-9
        assert close(made, nearest(whole, kept_rank), bound), rank
        assert math.isclose(tally.left_out, float(tail[kept_rank:].sum() / tail.sum()), rel_tol=1e-6, abs_tol=1e-9)
        left = math.sqrt(max(tally.energy - tally.lost, 0.0))
        assert (
            math.isnan(left)
            if rank is None and METHODS[method].rank is None
            else left == pytest.approx(float(made.norm()), rel=1e-6)
        )
        assert tally.rank <= kept_rank


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(parents)
def test_order_does_not_matter(method: str, parents: Parents) -> None:
    assert close(result(job(parents, method))[0], result(job(parents, method, order=-1))[0], 1e-7)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(parents)
def test_weight_zero_has_no_effect(method: str, parents: Parents) -> None:
    made = job(parents, method)
    with_nothing = Merge({**made.vectors, "n": update(7, 3)}, {**made.weights, "n": 0.0}, method)
    assert torch.equal(result(made)[0], result(with_nothing)[0])


@pytest.mark.parametrize("method", LINEAR)
@settings(deadline=None, max_examples=20)
@given(parents, st.floats(-2, 2))
def test_linear_methods_are_linear(method: str, parents: Parents, factor: float) -> None:
    once, _ = result(job(parents, method), 64)
    scaled, _ = result(job([(s, r, w * factor) for s, r, w in parents], method), 64)
    assert close(scaled, factor * once)
    split = job(parents, method)
    halves = Merge(
        {**split.vectors, **{f"{key}'": vector for key, vector in split.vectors.items()}},
        {k: w for key, weight in split.weights.items() for k, w in ((key, weight / 3), (f"{key}'", 2 * weight / 3))},
        method,
    )
    assert close(result(halves, 64)[0], once), "w equals w/3 + 2w/3"


@pytest.mark.parametrize("method", LOW_RANK)
def test_one_vector_of_weight_one_is_unchanged(method: str) -> None:
    alone = Merge({"a": update(3, 4)}, {"a": 1.0}, method)
    assert close(result(alone)[0], dense(update(3, 4)), 1e-9)


def test_sum_of_64_vectors_is_exact() -> None:
    parents: Parents = [(seed, 1 + seed % 3, (-1) ** seed / (seed + 1)) for seed in range(64)]
    made, tally = result(job(parents, "exact"))
    assert close(made, sum_of([dense(update(seed, rank)) for seed, rank, _ in parents], [w for *_, w in parents]))
    assert tally.rank == sum(rank for _, rank, _ in parents)


@pytest.mark.parametrize("method", METHODS)
def test_zero_weights_give_zero(method: str) -> None:
    made, tally = result(Merge({"a": update(3, 4), "b": update(4, 2)}, {"a": 0.0, "b": 0.0}, method))
    assert not made.any()
    assert tally.left_out == 0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_difference_is_antisymmetric_and_cancels_itself(a: int, b: int) -> None:
    pos, neg = update(a, 3), update(b, 4)
    assert close(dense(pos - neg), -dense(neg - pos))
    assert not dense(pos - pos).any()
    assert (pos - pos).norm() == 0
    assert (pos - pos)[MODULE].rank == 3, "the same update is one term"


@settings(deadline=None, max_examples=20)
@given(parents)
def test_larger_rank_never_loses_more(parents: Parents) -> None:
    left = [result(job(parents, "exact"), rank)[1].left_out for rank in range(1, 9)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(left))


@pytest.mark.parametrize("method", LOW_RANK)
@settings(deadline=None, max_examples=20)
@given(parents, st.floats(0.3, 1.0))
def test_smallest_rank_is_minimal(method: str, parents: Parents, share: float) -> None:
    made = job(parents, method)
    rank = made.smallest_rank(share)
    assert 1 - result(made, rank)[1].left_out >= share - 1e-9
    if rank > 1:
        assert 1 - result(made, rank - 1)[1].left_out < share + 1e-9


@pytest.mark.parametrize("method", ["exact", "tsv", "ties"])
def test_start_is_added_unchanged(method: str) -> None:
    vectors, weights, start = {"a": update(1, 3), "b": update(2, 2)}, {"a": 1.0, "b": -0.5}, update(9, 2)
    without, _ = result(Merge(vectors, weights, method), 64)
    with_start, _ = result(Merge(vectors, weights, method, start=start), 64)
    assert close(with_start, without + dense(start), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomised_svd_is_nearly_optimal(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=draw, dtype=dtype) for shape in ((1100, 8), (8, 1200)))
    vector = LoraDelta.of({MODULE: Factors(A, B)})
    tally = Tally()
    list(tally.counted(Merge({"a": vector}, {"a": 1.0}, "ties").modules()))
    (factors,) = vector.values()
    whole = merge_methods.ties(merge_methods.Parts(MODULE, ("a",), (factors,), (1.0,)), density=0.2)
    best = torch.linalg.svdvals(whole.double()).square()
    assert tally.left_out <= 1.01 * float(best[8:].sum() / best.sum())


def test_tsv_ignores_zero_directions() -> None:
    vectors = {"a": update(1, 3), "b": update(2, 2)}
    padded = {**vectors, "b": LoraDelta.of({MODULE: vectors["b"][MODULE].padded(3)})}
    weights = {"a": 1.0, "b": -0.5}
    assert close(result(Merge(vectors, weights, "tsv"))[0], result(Merge(padded, weights, "tsv"))[0], 1e-9)


def test_tsv_keeps_updates_of_any_rank() -> None:
    for second in (update(2, 2), update(2, 2) * 0.0):
        vectors = {"a": update(1, 8), "b": LoraDelta.of(dict(second))}
        made, tally = result(Merge(vectors, {"a": 1.0, "b": 1.0}, "tsv"))
        whole = sum((dense(vector) for vector in vectors.values()), torch.zeros(OUT, INTO, dtype=torch.float64))
        assert tally.rank == int(torch.linalg.matrix_rank(whole))
        assert torch.linalg.svdvals(made)[: tally.rank].min() > 0.1
    nothing = Merge({"a": LoraDelta.of(dict(update(1, 3) * 0.0))}, {"a": 1.0}, "tsv")
    assert result(nothing)[1].rank == 3
    assert nothing.smallest_rank(0.9) == 1


def test_smallest_rank_is_not_affected_by_a_large_start() -> None:
    vectors, weights = {"a": update(1, 4), "b": update(2, 4)}, {"a": 1.0, "b": 1.0}
    job = Merge(vectors, weights, start=update(3, 4) * 100.0)
    rank = job.smallest_rank(0.99)
    made, _ = result(job, rank)
    whole, vectors_alone = result(job)[0], result(Merge(vectors, weights))[0]
    assert float((made - whole).square().sum()) <= 0.01 * float(vectors_alone.square().sum())


def test_ties_does_not_trim_all_equal_entries() -> None:
    flat = LoraDelta.of({MODULE: Factors(torch.ones(OUT, 1), torch.ones(1, INTO))})
    assert close(result(Merge({"a": flat}, {"a": 1.0}, "ties"))[0].double(), torch.ones(OUT, INTO).double(), 1e-5)


def test_overflow_and_auto_rank_of_dense_methods_are_refused() -> None:
    with pytest.raises(UserError, match="the result overflows; give smaller weights"):
        result(Merge({"a": LoraDelta.of({MODULE: Factors(torch.ones(4, 1), torch.ones(1, 4))})}, {"a": 1e300}))
    with pytest.raises(UserError, match="give a number"):
        Merge({"a": update(0, 2)}, {"a": 1.0}, "ties").smallest_rank(0.9)


def test_options_and_weights_are_checked_per_method() -> None:
    assert merge_options.parse_options("ties", ["density=0.5"]) == {"density": 0.5}
    assert merge_options.parse_options("dare", ["drop=0.5", "seed=3"]) == {"drop": 0.5, "seed": 3}
    for method, given_, message in (
        ("tie", [], "did you mean 'ties'"),
        ("exact", ["density=1"], "it has no options"),
        ("ties", ["densty=1"], "known: density"),
        ("ties", ["density=much"], "must be a number"),
    ):
        with pytest.raises(UserError, match=message):
            merge_options.parse_options(method, given_)
    with pytest.raises(UserError, match=r"density is .*; it must be above 0 and at most 1"):
        list(Merge({"a": update(0, 2)}, {"a": 1.0}, "ties", {"density": 0.0}).modules())
    with pytest.raises(UserError, match=r"these sum to 1\.5"):
        merge_options.check_weights("soup", {"a": 1.0, "b": 0.5})
    merge_options.check_weights("soup", {"a": 0.7, "b": 0.3})


def test_fitting_returns_a_rank_of_the_server() -> None:
    assert merge_options.server_rank("llama.cpp", 33) == 33
    assert [merge_options.server_rank("vllm", rank) for rank in (1, 2, 33, 321)] == [1, 8, 64, 512]
    with pytest.raises(UserError, match="ranks up to 512, but this adapter has rank 513"):
        merge_options.server_rank("vllm", 513)
