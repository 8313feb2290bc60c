"""The same with torch: modules, Adam and DTensors. A file of its own, as workers import what their functions are in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rl_ckpt import Checkpointer
from tests.ray.holders import WAIT_S, fingerprint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("ray_node")

TABLE = np.arange(17 * 6, dtype="f4").reshape(17, 6)


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


SHAPES = {"2": (2,), "2x2": (2, 2), "4": (4,)}


@pytest.fixture(scope="module")
def mesh(ray_node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[Any]]]:
    """Gives the process group of a name, on loopback."""
    folder = tmp_path_factory.mktemp("rendezvous")
    kind: Any = ray.remote(num_cpus=0)(Mesh)
    made: dict[str, list[Any]] = {}
    loopback = {"env_vars": {"GLOO_SOCKET_IFNAME": "lo"}}

    def of(name: str) -> list[Any]:
        if name not in made:
            ranks = range(int(np.prod(SHAPES[name])))
            made[name] = [kind.options(runtime_env=loopback).remote() for _ in ranks]
            starts = [made[name][rank].start.remote(rank, SHAPES[name], str(folder / name)) for rank in ranks]
            ray.get(starts, timeout=WAIT_S)
        return made[name]

    yield of
    for actor in itertools.chain(*made.values()):
        ray.kill(actor)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param("2", "4", marks=pytest.mark.soak),
        pytest.param("4", "2", marks=pytest.mark.soak),
        ("2", "2x2"),
        pytest.param("2x2", "4", marks=pytest.mark.soak),
    ],
)
def test_dtensors_are_cut_anew_for_another_mesh(
    tmp_path: Path, mesh: Callable[[str], list[Any]], source: str, target: str
) -> None:
    saved, wanted = mesh(source), mesh(target)
    ray.get([m.fill.remote(3.0) for m in saved], timeout=WAIT_S)
    ray.get([m.fill.remote(1.0) for m in wanted], timeout=WAIT_S)
    before = ray.get([m.whole.remote() for m in wanted], timeout=WAIT_S)
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        info = ckpt.save(0, saved).result(WAIT_S)
        assert info.bytes == 3 * TABLE.nbytes, "replicas of a shard are stored once"
        ckpt.restore(wanted)
    for old, whole in zip(before, ray.get([m.whole.remote() for m in wanted], timeout=WAIT_S), strict=True):
        for name, (values, placements) in whole.items():
            np.testing.assert_array_equal(values, 3 * TABLE)
            assert placements == old[name][1]
