"""Benchmarks: rl_ckpt beside every alternative and the raw limits of the machine, interleaved, on the same bytes.

`make bench` answers every question of `benchmarks/questions`, prints tables and keeps all samples as JSON. Each
question runs in processes of its own. Nothing here is part of the package; no test asserts a time from here.
"""
