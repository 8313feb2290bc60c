"""Saved by N workers, restored onto M: replicated, sharded and per-rank state, torch and its DTensor, real actors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer, PerRank, Sharded
from tests.ray.holders import WAIT_S, Holder, HolderBase, copied, fingerprint, give, same, states_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("ray_node")

PAIRS = [(1, 4), (4, 1), (2, 3), (3, 8), (8, 2), (4, 4)]
TABLE = np.arange(17 * 6, dtype="f4").reshape(17, 6)


@pytest.fixture(scope="module")
def pool(ray_node: None) -> list[Any]:
    return [Holder.remote() for _ in range(8)]


def rows(rank: int, world: int) -> slice:
    """Uneven parts: the first rank gets what does not divide."""
    each, rest = divmod(len(TABLE), world)
    start = rank * each + (rest if rank else 0)
    return slice(start, start + each + (0 if rank else rest))


def grid(rank: int, world: int) -> tuple[slice, slice]:
    """Two columns of parts where that divides, else one."""
    wide = 2 if world % 2 == 0 else 1
    tall = world // wide
    cuts = np.linspace(0, len(TABLE), tall + 1).astype(int)
    row, column = divmod(rank, wide)
    step = TABLE.shape[1] // wide
    return slice(cuts[row], cuts[row + 1]), slice(column * step, (column + 1) * step)


def sharded_state(rank: int, world: int, factor: float, fill: bool) -> dict[str, Any]:
    by_rows, by_grid = rows(rank, world), grid(rank, world)
    shared = np.arange(100.0)
    tied = np.arange(5) * factor
    return {
        "shared": shared * factor,
        "rows": Sharded(TABLE[by_rows] * np.float32(factor), TABLE.shape, (by_rows.start, 0)),
        "grid": Sharded(TABLE[by_grid] * np.float32(factor), TABLE.shape, (by_grid[0].start, by_grid[1].start)),
        "rng": PerRank(np.full(3, rank if fill else -1)),
        "own": np.array([rank * 10 if fill else -1]),
        "nested": {"list": [1, (2.5, "x")], 7: np.float32(factor)},
        "tied": [tied, tied],
        "step": int(factor),
    }


def without_declarations(tree: Any) -> Any:
    """What set_state gets."""
    if isinstance(tree, Sharded):
        return tree.array
    if isinstance(tree, PerRank):
        return tree.tree
    if type(tree) in (list, tuple):
        return type(tree)(without_declarations(item) for item in tree)
    if isinstance(tree, dict):
        return {key: without_declarations(value) for key, value in tree.items()}
    return tree


def put_as_one_object(holder: HolderBase, world_rank: tuple[int, int], factor: float, fill: bool) -> None:
    """Made in the actor, so that arrays are the actor's own and tied arrays stay one object."""
    rank, world = world_rank
    holder.state = sharded_state(rank, world, factor, fill)


def give_shards(workers: list[Any], factor: float, *, fill: bool) -> None:
    world = len(workers)
    ray.get([w.look.remote(put_as_one_object, (rank, world), factor, fill) for rank, w in enumerate(workers)])


@pytest.mark.parametrize(("many", "then"), PAIRS)
def test_replicated_sharded_and_per_rank_state_come_back_on_any_number_of_workers(
    tmp_path: Path, pool: list[Any], many: int, then: int
) -> None:
    with Checkpointer(str(tmp_path / "run"), chunk_bytes=64) as ckpt:
        give_shards(pool[:many], 3, fill=True)
        ckpt.save(3, pool[:many]).result(WAIT_S)
        give_shards(pool[-then:], 1, fill=False)
        report = ckpt.restore(pool[-then:])
    assert report.ranks_without_counterpart == tuple(range(many, then))
    assert report.ranks_dropped == tuple(range(then, many))
    assert set(report.kept) == set(range(many, then))
    for rank, found in enumerate(states_of(pool[-then:])):
        expected = without_declarations(sharded_state(rank, then, 3, rank < many))
        if many == 1:  # what the only worker had, and did not declare its own, all workers had
            expected["own"] = np.array([0])
        same(found, expected)
        assert found["tied"][0] is found["tied"][1]


def test_arrays_are_filled_in_place(tmp_path: Path, pool: list[Any]) -> None:
    def remember(holder: Any) -> None:
        holder.array = holder.state["w"]

    def is_the_same(holder: Any) -> Any:
        return holder.array is holder.state["w"], holder.array

    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(pool[:2], [{"w": np.arange(10.0)}] * 2)
        ckpt.save(0, pool[:2]).result(WAIT_S)
        give(pool[:2], [{"w": np.zeros(10)}] * 2)
        ray.get([w.look.remote(remember) for w in pool[:2]])
        ckpt.restore(pool[:2])
        for kept, array in ray.get([w.look.remote(is_the_same) for w in pool[:2]]):
            assert kept
            same({"w": array}, {"w": np.arange(10.0)})


def test_none_and_empty_containers_take_what_was_saved(tmp_path: Path, pool: list[Any]) -> None:
    saved = {"opt": {0: {"m": np.arange(4.0), "count": 3}}, "maybe": np.arange(2), "none": None, "list": []}
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(pool[:2], [saved] * 2)
        ckpt.save(0, pool[:2]).result(WAIT_S)
        give(pool[:3], [{"opt": {}, "maybe": None, "none": None, "list": []}] * 3)
        ckpt.restore(pool[:3])
        for found in states_of(pool[:3]):
            same(found, saved)


class Learner:
    """A torch module and its Adam optimizer."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(torch.float64)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)

    def train(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(16, 4, generator=generator, dtype=torch.float64)
        self.optimizer.zero_grad()
        self.net(x).square().mean().backward()
        self.optimizer.step()

    def get_state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def set_state(self, tree: dict[str, Any]) -> None:
        self.net.load_state_dict(tree["net"])
        self.optimizer.load_state_dict(tree["optimizer"])

    def prints(self) -> dict[str, Any]:
        return fingerprint(self.get_state())


@pytest.mark.parametrize(("many", "then"), [pytest.param(1, 3, marks=pytest.mark.soak), (3, 2)])
def test_fresh_learners_take_over_module_and_adam_and_share_no_memory(
    tmp_path: Path, ray_node: None, many: int, then: int
) -> None:
    actor: Any = ray.remote(num_cpus=0)(Learner)
    saved = [actor.remote(0) for _ in range(many)]
    for step in range(3):
        ray.get([learner.train.remote(step) for learner in saved])
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(3, saved).result(WAIT_S)
        fresh = [actor.remote(100 + i) for i in range(then)]
        ckpt.restore(fresh)
    expected = ray.get(saved[0].prints.remote())
    assert "optimizer/state/0/exp_avg" in expected
    assert ray.get([learner.prints.remote() for learner in fresh]) == [expected] * then
    ray.get(fresh[0].train.remote(3))
    assert ray.get([learner.prints.remote() for learner in fresh[1:]]) == [expected] * (then - 1)
    ray.get(saved[0].train.remote(3))
    assert ray.get(fresh[0].prints.remote()) == ray.get(saved[0].prints.remote()), "and it goes on bit for bit"


def test_what_a_restored_worker_trains_does_not_change_the_checkpoint(tmp_path: Path, pool: list[Any]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        give(pool[:2], [{"w": np.arange(10.0)}] * 2)
        ckpt.save(0, pool[:2]).result(WAIT_S)
        for _ in range(2):
            give(pool[:2], [{"w": None}] * 2)
            ckpt.restore(pool[:2])
            assert all(bool((found["w"] == np.arange(10.0)).all()) for found in states_of(pool[:2]))
            ray.get([w.look.remote(lambda holder: holder.state["w"].__iadd__(1)) for w in pool[:2]])


class Mesh:
    """One rank of a gloo process group, with a state of DTensors."""

    def start(self, rank: int, shape: tuple[int, ...], store: str) -> None:
        world = int(np.prod(shape))
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        names = ("data", "model")[: len(shape)]
        self.mesh = torch.distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)

    def fill(self, factor: float) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        def make(*placements: Any) -> Any:
            return distribute_tensor(factor * torch.from_numpy(TABLE.copy()), self.mesh, list(placements))

        if self.mesh.ndim == 1:
            self.state = {"rows": make(Shard(0)), "columns": make(Shard(1)), "all": make(Replicate())}
        else:
            self.state = {
                "rows": make(Replicate(), Shard(0)),
                "columns": make(Shard(1), Replicate()),
                "all": make(Shard(0), Shard(1)),
            }

    def get_state(self) -> dict[str, Any]:
        return dict(self.state)

    def set_state(self, tree: dict[str, Any]) -> None:
        self.state = tree

    def whole(self) -> dict[str, Any]:
        """Every tensor put together from all ranks, by torch itself, and the placements."""
        return {name: (value.full_tensor().numpy(), str(value.placements)) for name, value in self.state.items()}


@pytest.fixture(scope="module")
def meshes(ray_node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    """Process groups of 2 and of 2 × 2 ranks, on loopback."""
    folder = tmp_path_factory.mktemp("rendezvous")
    mesh: Any = ray.remote(num_cpus=0)(Mesh)
    made = {}
    loopback = {"env_vars": {"GLOO_SOCKET_IFNAME": "lo"}}
    for name, shape in (("2", (2,)), ("2x2", (2, 2)), ("4", (4,))):
        made[name] = [mesh.options(runtime_env=loopback).remote() for _ in range(int(np.prod(shape)))]
        ray.get([m.start.remote(rank, shape, str(folder / name)) for rank, m in enumerate(made[name])], timeout=WAIT_S)
    yield made
    for actor in itertools.chain(*made.values()):
        ray.kill(actor)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("2", "4"),
        pytest.param("4", "2", marks=pytest.mark.soak),
        ("2", "2x2"),
        pytest.param("2x2", "4", marks=pytest.mark.soak),
    ],
)
def test_dtensors_are_cut_anew_for_another_mesh(
    tmp_path: Path, meshes: dict[str, list[Any]], source: str, target: str
) -> None:
    ray.get([m.fill.remote(3.0) for m in meshes[source]], timeout=WAIT_S)
    ray.get([m.fill.remote(1.0) for m in meshes[target]], timeout=WAIT_S)
    before = ray.get([m.whole.remote() for m in meshes[target]], timeout=WAIT_S)
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        info = ckpt.save(0, meshes[source]).result(WAIT_S)
        assert info.bytes == 3 * TABLE.nbytes, "replicas of a shard are stored once"
        ckpt.restore(meshes[target])
    for old, whole in zip(before, ray.get([m.whole.remote() for m in meshes[target]], timeout=WAIT_S), strict=True):
        for name, (values, placements) in whole.items():
            np.testing.assert_array_equal(values, 3 * TABLE)
            assert placements == old[name][1]


def test_copies_keep_what_they_copy() -> None:
    same(copied({"a": [np.arange(3), (1, None)]}), {"a": [np.arange(3), (1, None)]})
