"""RLlib's own checkpoints: imported, and exported.

    from rl_ckpt.rllib.native import export_native, import_native

    import_native("old/checkpoint_000042", "s3://bucket/run-8", allow_pickle=True)
    export_native("s3://bucket/run-8", "exported")     # Algorithm.from_checkpoint("exported")

Owns: everything that knows RLlib's directories. Promises: an import runs no code out of the pickles that they are made
of, unless it is told to; neither leaves something half-written. docs/rllib-versions.md says which versions.
"""

from rl_ckpt.rllib.native.exporting import export_native
from rl_ckpt.rllib.native.importing import NativeImport, import_native
from rl_ckpt.rllib.native.old_stack import load_old_policy

__all__ = ["NativeImport", "export_native", "import_native", "load_old_policy"]
