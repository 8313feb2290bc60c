"""rl-ckpt: the command line (docs/cli.md). Needs the extra `cli`; imports Ray only for commands that use a cluster.

Owns: what people type and see. Every command is a thin call of a face (`Catalog`, `pull`, `fork`, …); what it prints
goes through output.py, its errors and exit codes through command.py.
"""
