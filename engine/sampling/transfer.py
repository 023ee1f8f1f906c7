"""Arrays of the host on their way to the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Without waiting for what the device has to do before. On a CPU it shares the array's memory."""
    return staged(array, device).to(device, non_blocking=True)


def staged(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """In memory that `device` can read by itself: a copy from any other holds up the host."""
    values = torch.from_numpy(array)
    return values.pin_memory() if device.type == "cuda" else values
