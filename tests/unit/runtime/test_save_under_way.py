"""Who keeps the time of a save: its callers until all ranks have joined, the coordinator's brain from there on."""

from __future__ import annotations

from rl_ckpt.errors import StorageError
from rl_ckpt.runtime import save_steps as sm
from tests.unit.runtime.save_bench import Bench


def test_a_save_is_under_way_from_the_last_join_to_the_commit() -> None:
    """Meanwhile nobody who waits for it keeps a time of his own: the machine does, also while all are staging."""
    bench = Bench()
    seen = {}

    def note() -> None:
        seen[bench.machine.states().get("save-5", "gone")] = bench.machine.under_way("save-5")

    note()
    bench.join(0, 5)
    note()
    bench.join(1, 5)
    note()
    bench.name()
    bench.reserve()
    note()
    for rank in (0, 1):
        bench.stage(5, rank)
    note()
    bench.look_up()
    note()
    bench.write_all()
    note()
    assert seen == {
        "gone": False,
        sm.JOINING: False,
        sm.RESERVING: True,
        sm.STAGING: True,
        sm.SETTLING: True,
        sm.WRITING: True,
        sm.COMMITTING: True,
    }
    bench.fail(bench.commits[0], StorageError("gone"))
    assert not bench.machine.under_way("save-5")


def test_a_save_that_waits_for_a_generation_is_under_way_and_one_whose_rank_hangs_is_not() -> None:
    bench = Bench()
    bench.to_writing(0)
    bench.to_staging(1)
    bench.join_all(2)
    assert bench.machine.under_way("save-2")
    bench.stage(1, 0)
    bench.time_out(sm.STAGING)
    assert not bench.machine.under_way("save-1")
