"""Copies of device tensors to host memory, through pinned memory.

A pinned destination lets the copy engine run at the bus's full speed and keeps the copy off the default stream: it
waits for the work that wrote the tensor, and the host waits for the copy alone. The buffers are PyTorch's own cached
pinned blocks, so that later saves pay no page locking.
"""

from __future__ import annotations

import sys
from typing import Any


def to_host(tensor: Any) -> Any:
    """A CPU tensor with the values of a device tensor.

    Args:
        tensor: On any device but the CPU; any strides.

    Returns:
        A contiguous CPU tensor of the same shape and dtype, pinned where the device is CUDA; complete on return.
    """
    torch: Any = sys.modules["torch"]
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    stream = torch.cuda.Stream(device=tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))  # what writes the tensor comes first
    with torch.cuda.stream(stream):
        host.copy_(tensor.contiguous(), non_blocking=True)
    tensor.record_stream(stream)  # its memory may not be reused before this copy has read it
    stream.synchronize()
    return host
