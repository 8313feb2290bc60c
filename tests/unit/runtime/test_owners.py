"""Whose the run is, among the jobs of one cluster."""

from __future__ import annotations

import dataclasses

import pytest
from ray import cloudpickle

from rl_ckpt.errors import CheckpointError, FencedError, RunOwnedError
from rl_ckpt.options import Options
from rl_ckpt.runtime.owners import Owners, User
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.store.lease import Process, this_process


def user(name: str, process: Process | None = None) -> User:
    by = f"rl-ckpt on host of {name}"
    spec = RunSpec("s3://b/r", {}, (), Options(), "get_state", "set_state", "service", name, by, process)
    return User(spec, 1_700_000_000.0)


def begun(owners: Owners, name: str, dead: frozenset[str] = frozenset(), take_over: bool = False) -> str:
    owners.attach(name)
    return code(owners.begin(user(name), take_over, dead))


def code(error: CheckpointError | None) -> str:
    return error.code if error is not None else ""


@pytest.fixture
def owners() -> Owners:
    made = Owners("s3://b/r")
    assert begun(made, "01-a") == ""
    return made


def test_nobody_owns_a_run_until_somebody_saves() -> None:
    owners = Owners("s3://b/r")
    owners.attach("01-a")
    assert owners.refused("01-a") is None
    assert begun(owners, "02-b") == ""
    assert code(owners.refused("01-a")) == "run_owned"


def test_another_live_job_is_told_who_and_since_when_and_how(owners: Owners) -> None:
    owners.attach("02-b")
    told = owners.begin(user("02-b"), False, set())
    assert type(told) is RunOwnedError
    for part in ("rl-ckpt on host of 01-a (Ray job 01)", "since 2023-11-14 22:13:20 UTC", "take_over=True"):
        assert part in str(told)
    assert owners.refused("01-a") is None
    assert owners.detach("01-a", set()) is False
    assert begun(owners, "02-b") == "", "the owner has closed"


def test_several_checkpointers_of_one_job_are_one_owner(owners: Owners) -> None:
    assert begun(owners, "01-b") == ""
    owners.detach("01-a", set())
    assert begun(owners, "02-c") == "run_owned"
    assert owners.refused("01-b") is None
    assert owners.spec_of("01-b") is not None
    assert owners.spec_of("01-a") is None
    owners.detach("01-b", set())
    assert begun(owners, "02-c") == ""


def test_a_job_that_is_over_owns_nothing(owners: Owners) -> None:
    assert begun(owners, "02-b", frozenset({"01"})) == ""
    assert owners.detach("02-b", {"01"}) is True


def test_who_is_taken_over_from_is_told_by_whom_and_when_until_it_takes_over_itself(owners: Owners) -> None:
    assert begun(owners, "02-b", take_over=True) == ""
    told = owners.refused("01-a")
    assert type(told) is FencedError
    assert "taken over by rl-ckpt on host of 02-b (Ray job 02) at 2023-11-14 22:13:20 UTC;" in str(told)
    assert begun(owners, "01-a") == "fenced"
    assert begun(owners, "01-a", take_over=True) == ""
    assert owners.refused("01-a") is None
    assert code(owners.refused("02-b")) == "fenced"


def test_a_new_start_of_a_job_that_closed_is_told_who_owns_the_run(owners: Owners) -> None:
    assert begun(owners, "02-b", take_over=True) == ""
    owners.detach("01-a", set())
    assert begun(owners, "01-new") == "run_owned"


def test_a_job_that_comes_back_when_the_run_is_free_is_taken_over_from_no_more(owners: Owners) -> None:
    begun(owners, "02-b", take_over=True)
    owners.detach("02-b", set())
    assert begun(owners, "01-a") == ""
    begun(owners, "03-c", frozenset({"01"}))
    assert code(owners.refused("01-a")) == "run_owned"


def test_ranks_of_a_checkpointer_that_is_closed_are_no_way_around(owners: Owners) -> None:
    owners.attach("02-b")
    owners.detach("02-b", set())
    assert code(owners.refused("02-b")) == "run_owned"


def test_the_last_live_user_ends_the_actors(owners: Owners) -> None:
    owners.attach("02-b")
    assert owners.detach("02-b", set()) is False
    assert owners.detach("01-a", set()) is True


def test_an_owner_is_seen_where_its_process_is_on_this_host() -> None:
    owners, here = Owners("s3://b/r"), this_process()
    assert not owners.owner_is_seen()
    owners.begin(user("01-a", here), False, set())
    assert owners.owner_is_seen()
    for other in (dataclasses.replace(here, machine="another"), dataclasses.replace(here, started="0"), None):
        owners.begin(user("02-b", other), True, set())
        assert not owners.owner_is_seen()
        owners.begin(user("01-a", here), True, set())


def test_it_survives_the_way_to_the_next_start(owners: Owners) -> None:
    begun(owners, "02-b", take_over=True)
    again = cloudpickle.loads(cloudpickle.dumps(owners))
    assert again == owners
    assert code(again.refused("01-a")) == "fenced"
