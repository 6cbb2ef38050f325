from itertools import chain

import pytest

from moe.data.sampler import microbatch_indices, num_microbatches


def _rank_step(step, gbs, mbs, rank, dp):
    count = num_microbatches(global_batch_size=gbs, micro_batch_size=mbs, dp_size=dp)
    return [
        list(
            microbatch_indices(step, m, global_batch_size=gbs, micro_batch_size=mbs, dp_rank=rank, dp_size=dp)
        )
        for m in range(count)
    ]


@pytest.mark.parametrize(
    ("gbs", "mbs", "dp"), [(1, 1, 1), (12, 3, 1), (12, 1, 4), (12, 3, 2), (24, 2, 3), (8, 8, 1)]
)
@pytest.mark.parametrize("step", [0, 1, 7])
def test_ranks_partition_the_global_batch(gbs, mbs, dp, step):
    microbatches = [batch for rank in range(dp) for batch in _rank_step(step, gbs, mbs, rank, dp)]
    assert all(len(batch) == mbs for batch in microbatches)
    taken = [index for batch in microbatches for index in batch]
    assert sorted(taken) == list(range(step * gbs, (step + 1) * gbs))


def test_each_round_of_microbatches_is_the_same_whatever_the_ranks_are():
    # Two ranks of 2 and four ranks of 1 do the same four samples before the next four.
    wide = [_rank_step(3, 8, 1, rank, 4)[0] for rank in range(4)]
    narrow = [_rank_step(3, 8, 2, rank, 2)[0] for rank in range(2)]
    assert [*chain(*wide)] == [*chain(*narrow)] == [24, 25, 26, 27]


def test_uneven_batch_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        num_microbatches(global_batch_size=10, micro_batch_size=3, dp_size=2)


@pytest.mark.parametrize("bad", [{"step": -1}, {"microbatch": 2}, {"microbatch": -1}, {"dp_rank": 2}])
def test_index_out_of_range_is_refused(bad):
    arguments = {"step": 0, "microbatch": 0, "dp_rank": 0, **bad}
    with pytest.raises(ValueError, match="out of range"):
        microbatch_indices(**arguments, global_batch_size=8, micro_batch_size=2, dp_size=2)
