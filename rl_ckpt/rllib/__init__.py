"""Checkpoints of RLlib algorithms (extra `rllib`, Ray 2.60, new API stack)."""
