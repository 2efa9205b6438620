"""Batches depend on seed and epoch only; resume and split for ranks."""

import time
from collections import Counter
from itertools import pairwise

import pytest

from nextgpt.common.errors import UserError
from nextgpt.dataset.sampler import BatchSchedule, split_for_rank

SIZES = {"a": 23, "b": 7, "c": 3}


def test_sampler_mixed_covers_every_row_once_and_fills_the_last_batch() -> None:
    plan = BatchSchedule(SIZES, 4, "mixed", seed=1)
    batches = list(plan.batches(epoch=0))
    assert len(batches) == plan.steps_per_epoch == 9
    assert {len(batch) for batch in batches} == {4}
    seen = [sample for batch in batches for sample in batch]
    assert set(seen[:33]) == {(name, row) for name, size in SIZES.items() for row in range(size)}
    assert seen[33:] == seen[:3]
    assert any(len({name for name, _ in batch}) > 1 for batch in batches)


def test_sampler_round_robin_runs_until_the_largest_data_set_ends() -> None:
    plan = BatchSchedule(SIZES, 4, "round_robin", seed=1)
    batches = list(plan.batches(epoch=0))
    assert len(batches) == plan.steps_per_epoch == 18
    assert [{name for name, _ in batch} for batch in batches] == [{"a"}, {"b"}, {"c"}] * 6
    for name, size in SIZES.items():
        rows = [row for batch in batches for where, row in batch if where == name]
        assert len(rows) == 24
        shuffles = [tuple(rows[i : i + size]) for i in range(0, 24 - size + 1, size)]
        assert all(sorted(shuffle) == list(range(size)) for shuffle in shuffles)
        if name == "b":
            assert all(one != other for one, other in pairwise(shuffles))


def test_sampler_weighted_has_the_stated_proportions_and_covers_every_row() -> None:
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    plan = BatchSchedule(SIZES, 4, "weighted", seed=1, weights=weights)
    batches = list(plan.batches(epoch=0))
    assert len(batches) == plan.steps_per_epoch == 9 and {len(b) for b in batches} == {4}
    counts = Counter(name for batch in batches for name, _ in batch)
    assert all(abs(counts[name] - 36 * weights[name] / 4) < 1 for name in SIZES)
    rows = [row for batch in batches for name, row in batch if name == "b"]
    shuffles = [sorted(rows[i : i + 7]) for i in range(0, 21, 7)]
    assert shuffles == [list(range(7))] * 3 and rows[:7] != rows[7:14]
    samples = {sample for epoch in range(9) for batch in plan.batches(epoch) for sample in batch}
    assert {row for name, row in samples if name == "a"} == set(range(23))


def test_sampler_weighted_mixes_batches_in_proportion() -> None:
    sizes, weights = {"a": 9000, "b": 1000}, {"a": 1.0, "b": 3.0}
    batches = BatchSchedule(sizes, 100, "weighted", seed=0, weights=weights).batches(0)
    shares = [sum(name == "b" for name, _ in batch) for batch in batches]
    assert sum(shares) == 7500 and min(shares) > 55 and max(shares) < 95


@pytest.mark.parametrize("mode", ["mixed", "round_robin", "weighted"])
def test_sampler_order_depends_on_seed_and_epoch_and_can_start_anywhere(mode: str) -> None:
    weights = {"b": 3.0}
    plan = BatchSchedule(SIZES, 4, mode, seed=1, weights=weights)
    full = list(plan.batches(epoch=2))
    assert full == list(BatchSchedule(SIZES, 4, mode, 1, weights).batches(epoch=2))
    for start in range(plan.steps_per_epoch + 1):
        assert list(plan.batches(epoch=2, start=start)) == full[start:]
    assert full != list(plan.batches(epoch=3))
    assert full != list(BatchSchedule(SIZES, 4, mode, 2, weights).batches(epoch=2))


def test_split_for_rank_is_disjoint_and_complete() -> None:
    batch = next(BatchSchedule(SIZES, 12, "mixed", seed=1).batches(0))
    splits = [split_for_rank(batch, rank, 4, length=lambda sample: sample[1]) for rank in range(4)]
    assert {len(part) for part in splits} == {3}
    assert Counter(sample for part in splits for sample in part) == Counter(batch)


def test_split_for_rank_balances_lengths_and_keeps_order() -> None:
    batch = [("a", row) for row in (1, 200, 2, 3, 100, 190, 4, 90)]
    splits = [split_for_rank(batch, rank, 2, length=lambda sample: sample[1]) for rank in range(2)]
    assert splits == [
        [("a", row) for row in (1, 200, 4, 90)],
        [("a", row) for row in (2, 3, 100, 190)],
    ]
    assert split_for_rank(batch, 0, 1, length=lambda sample: sample[1]) == batch


def test_sampler_impossible_batching_names_the_remedy() -> None:
    with pytest.raises(UserError, match="global_batch_size"):
        BatchSchedule({"a": 3}, 4, "mixed", seed=0)
    with pytest.raises(UserError, match="more than the 23 there are"):
        BatchSchedule(SIZES, 24, "round_robin", seed=0)
    with pytest.raises(UserError, match="without rows: b"):
        BatchSchedule({"a": 3, "b": 0}, 2, "mixed", seed=0)
    with pytest.raises(UserError, match="without rows"):
        BatchSchedule({}, 2, "mixed", seed=0)
    with pytest.raises(UserError, match="8 processes"):
        split_for_rank([("a", row) for row in range(4)], rank=0, world=8, length=len)


@pytest.mark.parametrize("mode", ["mixed", "round_robin", "weighted"])
def test_sampler_resumes_mid_epoch_in_a_million_rows_quickly(mode: str) -> None:
    plan = BatchSchedule({"big": 1_000_000, "small": 1000}, 64, mode, seed=0)
    begun = time.perf_counter()
    next(plan.batches(epoch=0, start=plan.steps_per_epoch - 5))
    assert time.perf_counter() - begun < 2
