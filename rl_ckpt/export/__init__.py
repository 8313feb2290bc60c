"""Exports: a policy of a checkpoint as a file for others: ONNX, torch.export, a state dict, safetensors, numpy.

    from rl_ckpt.export import export_model

    export_model("s3://bucket/run-7", "default_policy", format="onnx", path="policy.onnx")

The same as a command: `python -m rl_ckpt.export URL --policy … --format … --out …`. Arrays of any checkpoint, by
`select`: `export_arrays`. Importing this package imports neither Ray nor torch.
"""

from rl_ckpt.export.face import export_arrays, export_model
from rl_ckpt.export.report import FORMATS, ExportReport, Format, TensorInfo

__all__ = ["FORMATS", "ExportReport", "Format", "TensorInfo", "export_arrays", "export_model"]
