"""The groups that `moe launch` prints are Megatron's own."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator

from moe.config.schema import ParallelSection
from moe.launch.layout import axes, layout_table, nodes_of

LAYOUTS = [  # world size, tp, cp, pp, ep, etp
    (1, 1, 1, 1, 1, 1),
    (16, 2, 1, 2, 4, 1),
    (16, 2, 1, 2, 4, 2),
    (32, 4, 1, 1, 8, 1),
    (32, 2, 1, 1, 2, 4),
    (64, 1, 1, 8, 8, 1),
    (64, 2, 2, 2, 1, 1),
    (64, 2, 2, 2, 1, 8),
    (512, 1, 1, 16, 32, 1),
    (512, 8, 1, 4, 64, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_are_those_of_megatron(layout):
    world, tp, cp, pp, ep, etp = layout
    dense = RankGenerator(tp=tp, ep=1, dp=world // (tp * cp * pp), pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    edp = world // (etp * ep * pp)
    expert = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    parallel = ParallelSection(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    found = {axis.name: axis for axis in axes(parallel, world)}
    for name, generator, token in [
        *((name, dense, name) for name in ("tp", "cp", "dp", "pp")),
        ("etp", expert, "tp"),
        ("ep", expert, "ep"),
        ("edp", expert, "dp"),
    ]:
        ours = sorted(list(group) for group in found[name].groups(world))
        assert ours == sorted(generator.get_ranks(token)), name


def test_table_says_what_stays_inside_a_node():
    text = layout_table(ParallelSection(tp=8, pp=4, ep=64), nodes=64, gpus_per_node=8)
    rows = {line.split()[0]: line for line in text.splitlines()[2:9]}
    assert "inside a node" in rows["tp"]
    assert "across 8 nodes" in rows["ep"]
    assert "across 4 nodes" in rows["pp"]
    assert "alone" in rows["cp"]
    assert "0, 8, 16, 24, ... 120" in rows["dp"]
    last = text.splitlines()[-1].split()
    assert last[:2] == ["63", "504-511"]


def test_group_that_crosses_a_node_only_here_and_there_counts_as_crossing():
    # 3 ranks of 8 on each node: the group of ranks 6, 7, 8 lies on two nodes.
    assert nodes_of(range(6, 9), 8) == 2
    rows = layout_table(ParallelSection(tp=3), nodes=3, gpus_per_node=8).splitlines()
    assert "across 2 nodes" in rows[2]
