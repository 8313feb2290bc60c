"""Benchmarks: rl_ckpt beside the raw limits, interleaved, in one process tree, on the same bytes (`make bench`)."""
