"""Replay buffers: what comes back samples as what was saved, and only what was added is written."""

import copy
from collections import defaultdict

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers import EpisodeReplayBuffer, PrioritizedEpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.fifo_replay_buffer import FifoReplayBuffer
from ray.rllib.utils.replay_buffers.multi_agent_episode_buffer import MultiAgentEpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.multi_agent_prioritized_episode_buffer import (
    MultiAgentPrioritizedEpisodeReplayBuffer,
)

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib import buffer_blocks
from rl_ckpt.rllib.buffer_blocks import Layout, cut
from rl_ckpt.rllib.buffers import buffer_problems, buffer_tree, set_buffer
from tests.rllib.same import assert_same

SINGLE = [EpisodeReplayBuffer, PrioritizedEpisodeReplayBuffer]
MULTI = [MultiAgentEpisodeReplayBuffer, MultiAgentPrioritizedEpisodeReplayBuffer]
OBS = gym.spaces.Dict({"cart": gym.spaces.Box(-1, 1, (4,), np.float32), "lamp": gym.spaces.Discrete(3)})
ACTIONS = gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (2,), np.float64)))


class Sampler:
    """Pieces of episodes, as env runners give them: several environments at once, episodes cut wherever."""

    def __init__(self, seed=0, envs=3, numpy=True):
        self.rng = np.random.default_rng(seed)
        self.numpy = numpy
        self.running = [self.begin() for _ in range(envs)]

    def begin(self):
        episode = SingleAgentEpisode(observation_space=OBS, action_space=ACTIONS)
        episode.add_env_reset(self.obs(), {})
        return episode

    def obs(self):
        return {"cart": self.rng.random(4, np.float32), "lamp": int(self.rng.integers(3))}

    def action(self):
        return (int(self.rng.integers(2)), self.rng.random(2))

    def step(self, episode):
        done = self.rng.random() < 0.06
        infos = {"lives": 3, "seen": [1, "a"]} if self.rng.random() < 0.3 else {}
        extra = {"action_logp": np.float32(self.rng.random()), "state_out": {"h": self.rng.random(2)}}
        episode.add_env_step(
            self.obs(), self.action(), self.rng.random(), infos, terminated=done, extra_model_outputs=extra
        )

    def pieces(self, steps):
        out = []
        for place in range(len(self.running)):
            episode = self.running[place]
            for _ in range(steps):
                if episode.is_done:
                    out.append(episode)
                    episode = self.begin()
                self.step(episode)
            out.append(episode)
            self.running[place] = self.begin() if episode.is_done else episode.cut(len_lookback_buffer=2)
        return [piece.to_numpy() if self.numpy else piece for piece in out]


class MultiSampler(Sampler):
    """Two agents with a module each; the second one steps every other time. RLlib joins pieces of flat spaces only."""

    def obs(self):
        return self.rng.random(4, np.float32)

    def action(self):
        return int(self.rng.integers(2))

    def begin(self):
        box = gym.spaces.Box(-1, 1, (4,), np.float32)
        agents = {"a": box, "b/1": box}
        episode = MultiAgentEpisode(
            observation_space=agents,
            action_space={"a": gym.spaces.Discrete(2), "b/1": gym.spaces.Discrete(2)},
            agent_to_module_mapping_fn=module_of,
        )
        episode.add_env_reset(observations={"a": self.obs(), "b/1": self.obs()}, infos={"a": {}, "b/1": {}})
        return episode

    def step(self, episode):
        who = ["a", "b/1"] if self.rng.random() < 0.5 else ["a"]
        acting = episode.get_agents_to_act()
        done = self.rng.random() < 0.08
        episode.add_env_step(
            {aid: self.obs() for aid in who},
            {aid: self.action() for aid in acting},
            {aid: self.rng.random() for aid in who},
            {aid: {"n": 1} for aid in who},
            terminateds={"__all__": done},
            truncateds={"__all__": False},
        )


def module_of(agent, episode):
    return f"p_{agent}"


def updated(buffer, rng):
    """Samples, and where there are priorities changes them; returns the sample."""
    if isinstance(buffer, MultiAgentEpisodeReplayBuffer):
        sample = buffer.sample(num_items=8, n_step=1, include_infos=True, include_extra_model_outputs=True)
        if isinstance(buffer, MultiAgentPrioritizedEpisodeReplayBuffer):
            for module, last in buffer._module_to_last_sampled_indices.items():
                buffer.update_priorities(rng.random(len(last), np.float32), module)
        return sample
    sample = buffer.sample(
        num_items=8, sample_episodes=True, n_step=(1, 4), include_infos=True, include_extra_model_outputs=True
    )
    if isinstance(buffer, PrioritizedEpisodeReplayBuffer):
        buffer.update_priorities(rng.random(8, np.float32) * 3)
    return sample


def filled(kind, capacity=400, rounds=24, seed=0, numpy=True):
    """A buffer that has evicted episodes, with running ones in it, after updates; and where its pieces came from."""
    sampler = (MultiSampler if issubclass(kind, MultiAgentEpisodeReplayBuffer) else Sampler)(seed, numpy=numpy)
    buffer = kind(capacity=capacity)
    buffer.rng = np.random.default_rng(seed)
    rng = np.random.default_rng(seed + 1)
    for _ in range(rounds):
        buffer.add(sampler.pieces(9))
        updated(buffer, rng)
    assert rounds < 24 or buffer._num_episodes_evicted > 3, "else the test shows less than it says"
    return buffer, sampler, rng


def plain(value):
    """A buffer or episode as containers and values, for `assert_same`."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if type(value) in (dict, defaultdict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    if hasattr(value, "maxlen"):
        return [value.maxlen, *map(plain, value)]
    if type(value).__module__.startswith("ray.rllib"):
        slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        names = (
            {name for name in (*slots, *vars(value)) if hasattr(value, name)} if hasattr(value, "__dict__") else slots
        )
        ignored = (
            {"_last_sampled_indices"} if type(value) in (EpisodeReplayBuffer, MultiAgentEpisodeReplayBuffer) else set()
        )
        ignored |= {"_last_added_observation", "_last_added_infos", "metrics", "operation", "_space_struct"}
        fields = {name: plain(getattr(value, name)) for name in sorted(set(names) - ignored) if hasattr(value, name)}
        if "_module_to_last_sampled_indices" in fields:  # in the order of the last sample, and only looked up by id
            fields |= {"_module_to_last_sampled_indices": sorted(fields["_module_to_last_sampled_indices"].items())}
            # RLlib leaves entries of samples that were evicted, past the end, which nothing reads.
            places = fields["_sample_idx_to_tree_idx"]
            fields |= {"_sample_idx_to_tree_idx": {i: places[i] for i in range(len(value._indices))}}
        return fields
    return value


def unnamed(sample):
    """Sampled episodes without the new ids that some buffers give them."""
    return [{key: value for key, value in plain(episode).items() if key != "id_"} for episode in sample]


def metrics_of(buffer):
    return {key: stats.get_state() for key, stats in walk(buffer.metrics.stats)}


def walk(stats, path=()):
    for key, value in stats.items():
        yield from walk(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def through_store(tree, tmp_path):
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, tree).result()
        return ckpt.load_state()


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("kind", [*SINGLE, *MULTI])
def test_a_restored_buffer_is_the_saved_one_and_goes_on_like_it(kind, numpy, tmp_path):
    buffer, sampler, rng = filled(kind, numpy=numpy)
    other, *_ = filled(kind, rounds=12, seed=5)  # what it holds is to be gone
    set_buffer(other, through_store(buffer_tree(buffer), tmp_path), module_of)
    assert_same(plain(other), plain(buffer))
    assert_same(metrics_of(other), metrics_of(buffer))
    for _ in range(6):
        pieces = sampler.pieces(9)
        other_rng = copy.deepcopy(rng)
        other.add(copy.deepcopy(pieces))
        buffer.add(pieces)
        assert_same(unnamed(updated(other, other_rng)), unnamed(updated(buffer, rng)))
    assert_same(plain(other), plain(buffer))


def test_a_piece_keeps_what_it_looks_back_on(tmp_path):
    sampler, buffer, other = Sampler(envs=1), EpisodeReplayBuffer(), EpisodeReplayBuffer()
    sampler.pieces(5)
    assert sampler.running[0].observations.lookback == 2, "else the test shows nothing"
    buffer.add(sampler.pieces(5)[0])
    set_buffer(other, through_store(buffer_tree(buffer), tmp_path))
    assert_same(plain(other), plain(buffer))


def test_rows_of_steps_are_the_same_too(tmp_path):
    buffer = EpisodeReplayBuffer(capacity=200)
    rng = np.random.default_rng(0)
    for length in rng.integers(3, 30, 20):
        episode = SingleAgentEpisode()
        episode.add_env_reset(rng.random(3))
        for i in range(length):
            episode.add_env_step(rng.random(3), int(rng.integers(2)), float(i), terminated=i == length - 1)
        buffer.add(episode)
    other = EpisodeReplayBuffer(capacity=200)
    set_buffer(other, through_store(buffer_tree(buffer), tmp_path))
    assert_same(other.sample(4, batch_length_T=7), buffer.sample(4, batch_length_T=7))


def test_an_empty_buffer(tmp_path):
    for kind in (*SINGLE, *MULTI):
        buffer = kind(capacity=64)
        other, *_ = filled(kind)
        set_buffer(other, through_store(buffer_tree(buffer), tmp_path / kind.__name__))
        assert not other.episodes
        assert len(other) == 0
        other.capacity = 64
        if issubclass(kind, MultiAgentEpisodeReplayBuffer):
            other.add(MultiSampler().pieces(5))
        else:
            other.add(Sampler().pieces(5))
        assert other._num_timesteps == 15


def test_a_larger_buffer_takes_a_smaller_one(tmp_path):
    buffer, sampler, rng = filled(PrioritizedEpisodeReplayBuffer, capacity=400)
    other = PrioritizedEpisodeReplayBuffer(capacity=3000)
    tree = through_store(buffer_tree(buffer), tmp_path)
    set_buffer(other, tree)
    assert len(other._free_nodes) + len(other._indices) == other._sum_segment.capacity == 8192
    assert sorted([*other._free_nodes, *other._tree_idx_to_sample_idx]) == list(range(8192))
    for _ in range(40):
        other.add(sampler.pieces(9))
        updated(other, rng)
    small = PrioritizedEpisodeReplayBuffer(capacity=100)
    (problem,) = buffer_problems(small, tree)
    assert "capacity 100 and the saved one 400" in problem


# --- what a save writes ---


def fill(buffer, episodes, seed, done=True, length=50):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(episodes):
        episode = SingleAgentEpisode(id_=f"{seed:016x}{i:016x}")
        episode.observations.data, episode.observations.finalized = rng.random((length + 1, 8)), True
        episode.actions.data, episode.actions.finalized = rng.integers(0, 9, length), True
        episode.rewards.data, episode.rewards.finalized = rng.random(length), True
        episode.infos.data = [{} for _ in range(length + 1)]
        episode.t, episode.is_terminated = length, done
        made.append(episode)
    buffer.add(made)


STEP = 90  # bytes of a step of `fill`, with its share of all that is stored


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and segments as small as the test's buffers."""
    monkeypatch.setattr(buffer_blocks, "MIN_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(buffer_blocks, "MIN_SEGMENT", 1 << 8)


def written(ckpt, step, buffer):
    """Bytes of arrays that a save wrote: without manifest and commit record, which grow with the number of blocks."""
    return ckpt.save_state(step, {"replay_buffer": buffer_tree(buffer)}).result().bytes_written


@pytest.mark.parametrize("kind", SINGLE)
def test_only_what_was_added_is_written(kind, tmp_path, small_blocks):
    buffer = kind(capacity=100_000)
    fill(buffer, 1000, seed=0)
    block = 1.4 * (1 << 14)
    with Checkpointer(str(tmp_path)) as ckpt:
        whole = written(ckpt, 1, buffer)
        unchanged = written(ckpt, 2, buffer)
        fill(buffer, 40, seed=1)
        added = written(ckpt, 3, buffer)
    assert whole > 50_000 * 80
    assert unchanged < whole / 20, (unchanged, whole)
    metadata = unchanged
    assert added - metadata < 2000 * STEP + 2 * block + (9 * 2 * 4096), (added, metadata)


def test_a_ring_writes_what_was_added_and_two_blocks(tmp_path, small_blocks):
    buffer = EpisodeReplayBuffer(capacity=20_000)
    fill(buffer, 400, seed=0)
    with Checkpointer(str(tmp_path)) as ckpt:
        whole = written(ckpt, 1, buffer)
        metadata = written(ckpt, 2, buffer)
        for step in range(3, 9):
            fill(buffer, 21, seed=step)
            assert buffer._num_timesteps == 20_000
            fresh = written(ckpt, step, buffer) - metadata
            assert fresh < 21 * 50 * STEP + 2 * 1.4 * (1 << 14) + 12_000, (step, fresh)
            assert fresh < whole / 8
    # The restored buffer goes on with the same blocks.
    with Checkpointer(str(tmp_path)) as ckpt:
        other = EpisodeReplayBuffer(capacity=20_000)
        set_buffer(other, ckpt.load_state()["replay_buffer"])
        assert written(ckpt, 9, other) < 1.2 * metadata


def test_blocks_end_where_they_ended():
    layout = Layout([])
    assert cut(layout, 0, [4, 4, 4, 4, 4], 10) == [(0, 3), (3, 5)]
    assert cut(layout, 0, [4, 4, 4, 4, 4, 4, 4], 10) == [(0, 3), (3, 6), (6, 7)]
    assert cut(layout, 2, [4, 40, 4, 4, 4], 10) == [(2, 3), (3, 6), (6, 7)], "a running episode grew, two were evicted"
    assert cut(layout, 3, [4, 4, 4, 4, 4], 100) == [(3, 6), (6, 8)], "what is full stays so"
    assert cut(layout, 1, [4, 4], 10) == [(1, 3)], "rolled back"
    assert cut(layout, 3, [], 10) == []


# --- what can't be stored, and what does not fit ---


class Tagged(EpisodeReplayBuffer):
    def __init__(self, capacity=100):
        super().__init__(capacity)
        self.tags = []


class Renamed(PrioritizedEpisodeReplayBuffer):
    def sample(self, *args, **kwargs):
        return super().sample(*args, **kwargs)


def test_other_buffers_are_named():
    with pytest.raises(
        InvalidInputError, match=r"FifoReplayBuffer can't be stored: it is none of Epi.*replay_buffer=F"
    ):
        buffer_tree(FifoReplayBuffer())
    with pytest.raises(
        InvalidInputError, match=r"Tagged keeps tags beside what a EpisodeReplayBuffer has.*replay_buffer"
    ):
        buffer_tree(Tagged())
    assert buffer_tree(Renamed(100))["class"] == "PrioritizedEpisodeReplayBuffer"


def test_what_is_no_data_is_named():
    buffer = EpisodeReplayBuffer()
    episode = SingleAgentEpisode()
    episode.add_env_reset(np.zeros(2), {"who": object()})
    episode.add_env_step(np.zeros(2), 1, 1.0)
    buffer.add(episode)
    with pytest.raises(InvalidInputError, match=r"the replay buffer \(infos\.data.*who\) holds a builtins\.object"):
        buffer_tree(buffer)


def test_a_buffer_is_as_it_was_where_the_saved_one_does_not_fit():
    buffer, *_ = filled(EpisodeReplayBuffer)
    tree = buffer_tree(buffer)
    other, *_ = filled(PrioritizedEpisodeReplayBuffer, seed=3)
    before = copy.deepcopy(plain(other))
    with pytest.raises(
        InvalidInputError, match="is a PrioritizedEpisodeReplayBuffer, and the checkpoint has a EpisodeR"
    ):
        set_buffer(other, tree)
    same, *_ = filled(EpisodeReplayBuffer, seed=3)
    before_same = copy.deepcopy(plain(same))
    for bad, error in (
        (tree | {"format": 2}, InvalidInputError),
        (tree | {"schemas": []}, CorruptionError),
        (tree | {"rng": {"class": "nothing", "state": {}}}, CorruptionError),
    ):
        with pytest.raises(error):
            set_buffer(same, bad)
    assert_same(plain(same), before_same)
    assert_same(plain(other), before)


def test_an_agent_that_comes_later_needs_the_mapping_function():
    buffer, *_ = filled(MultiAgentEpisodeReplayBuffer)
    other = MultiAgentEpisodeReplayBuffer(capacity=400)
    set_buffer(other, buffer_tree(buffer))
    with pytest.raises(InvalidInputError, match="agent 'c' came into a restored episode"):
        other.episodes[-1].module_for("c")
    set_buffer(other, buffer_tree(buffer), module_of)
    assert other.episodes[-1].module_for("c") == "p_c"
