"""The demo job: reinforcement learning on a local Ray cluster that loses a node and goes on from its checkpoint.

A complete, small user of the package, in numpy alone: `policy` is the mathematics, `rollout` and `learner` are the
two kinds of actor, `cluster` starts and kills nodes, `job` trains, saves and recovers, `report` draws. `make demo` and
`python -m rl_ckpt.demo` run it. Nothing of the package imports this room.
"""
