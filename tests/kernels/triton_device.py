"""Where the Triton kernels are tested: interpreted on the CPU, or natively where there is a GPU (`pytest -m gpu`)."""

import pytest
import torch

INTERPRETED = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled"),
    id="interpreted",
)
NATIVE = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    id="native",
)
on_each_device = pytest.mark.parametrize("device", [INTERPRETED, NATIVE])


def triton_kernels():
    """The kernels, or a skip where triton is missing."""
    pytest.importorskip("triton")
    from alisa.kernels.triton.kernels import TritonKernels

    return TritonKernels()


def moved(tensor, device):
    """The same values on the device; bytes begin 4 bytes off any alignment, as in the cases."""
    if tensor.dtype != torch.uint8 or tensor.device.type == device:
        return tensor.to(device)
    room = torch.zeros(tensor.numel() + 4, dtype=torch.uint8, device=device)[4:]
    return room.view(tensor.shape).copy_(tensor)
