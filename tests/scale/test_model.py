"""The model of limits: more of anything never takes less, and each limit decides where it should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale import model
from benchmarks.scale.calibrate import RAYLETS, SIZES, Measured, compare, inside
from benchmarks.scale.model import (
    GB,
    MB,
    NODES,
    TB,
    Cluster,
    Load,
    predict_restore,
    predict_save,
    tables,
)
from rl_ckpt.options import Options

BOTH = pytest.mark.parametrize("predict", [predict_save, predict_restore])
bytes_ = st.floats(1, 20 * TB)
shares = st.floats(0, 1)
nodes = st.sampled_from(NODES)


@BOTH
@given(nodes=nodes, size=bytes_, more=st.floats(1, 10), share=shares)
def test_more_bytes_never_take_less(predict, nodes: int, size: float, more: float, share: float) -> None:
    cluster = Cluster(nodes=nodes)
    small = predict(cluster, Load(size, share), Options())
    large = predict(cluster, Load(size * more, share), Options())
    for step, limits in small.steps.items():
        for limit, seconds in limits.items():
            if limit != "connections":  # a larger file has more parts, and so more connections
                assert large.steps[step][limit] >= seconds - 1e-9, (step, limit)


@BOTH
@pytest.mark.parametrize(
    "name",
    ["memory_rate", "nic_rate", "client_rate", "connection_rate", "store_rate", "put_rate", "get_rate", "pass_rate"],
)
@given(nodes=nodes, size=bytes_, share=shares)
def test_a_higher_rate_never_takes_longer(predict, name: str, nodes: int, size: float, share: float) -> None:
    cluster = Cluster(nodes=nodes, store_rate=100 * GB)
    faster = replace(cluster, **{name: 2 * getattr(cluster, name)})
    assert (
        predict(faster, Load(size, share), Options()).seconds <= predict(cluster, Load(size, share), Options()).seconds
    )


def test_limits_decide_where_they_should() -> None:
    slow_nic = Cluster(nodes=8, nic_rate=0.1 * GB)
    assert predict_save(slow_nic, Load(TB), Options()).limit == "network"
    assert predict_save(slow_nic, Load(TB), Options()).seconds == pytest.approx(TB / 8 / (0.1 * GB), rel=0.1)
    assert predict_save(Cluster(nodes=8, client_rate=math.inf), Load(TB), Options()).limit == "network"
    assert predict_save(Cluster(nodes=8, store_rate=GB), Load(TB), Options()).limit == "store"
    assert predict_save(Cluster(nodes=1024), Load(10 * TB), Options()).limit == "request rate"
    assert predict_restore(Cluster(nodes=8), Load(100 * GB, 1.0), Options()).limit == "peers"
    one = Cluster(nodes=1, connection_rate=MB)
    assert predict_restore(one, Load(100 * MB), Options()).limit == "connections"


def test_options_move_the_limits_that_the_page_says_they_move() -> None:
    many = Cluster(nodes=1024)
    write = predict_save(many, Load(100 * GB), Options()).steps["write"]
    fewer_files = predict_save(many, Load(100 * GB), Options(write_streams=1)).steps["write"]
    assert fewer_files["request rate"] < write["request rate"]
    split = predict_save(replace(many, partitions=8), Load(10 * TB), Options())
    assert split.steps["write"]["request rate"] == pytest.approx(
        predict_save(many, Load(10 * TB), Options()).steps["write"]["request rate"] / 8
    )
    restored = predict_restore(many, Load(TB), Options())
    larger_chunks = predict_restore(many, Load(TB), Options(chunk_bytes=64 << 20))
    assert restored.limit.startswith("coordinator")
    assert max(larger_chunks.steps["manifest"].values()) < 0.3 * max(restored.steps["manifest"].values())
    assert larger_chunks.limit == "request rate"  # the next one
    few = Cluster(nodes=1)
    one_stream = predict_save(few, Load(GB), Options(write_streams=1, file_bytes=64 << 20)).steps["write"][
        "connections"
    ]
    assert one_stream > predict_save(few, Load(GB), Options()).steps["write"]["connections"]


def test_a_machine_that_behaves_as_the_model_is_predicted_exactly() -> None:
    client, store = 200 * MB, 500 * MB
    found = [
        Measured(
            raylets,
            size,
            0.01 * raylets + max(size / raylets / client, size / store),
            0.02 + max(size / raylets / client, size / store),
        )
        for raylets in RAYLETS
        for size in SIZES
    ]
    assert sum(not inside(m) for m in found) == 4
    for m, save_s, restore_s in compare(found):
        assert save_s == pytest.approx(m.save_s, abs=0.003)  # the coordinator's own part comes on top
        assert restore_s == pytest.approx(m.restore_s, abs=0.003)


def test_the_tables_cover_what_the_page_says() -> None:
    lines = [line for line in tables().splitlines() if line.startswith("| 1,024")]
    assert len(lines) == 4
    assert all(line.count("|") == len(model.SIZES) + 2 for line in lines)
