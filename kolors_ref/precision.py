"""The dtype that is fast on a device."""

import torch

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""What x86 and Arm call them."""


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32.

    A CPU without them takes torch's plain loops for both half precisions, up to 200 times slower than float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = torch.backends.mkldnn.is_available() and any(has.get(name) for name in BFLOAT16_INSTRUCTIONS)
    else:
        fast = True
    return torch.bfloat16 if fast else torch.float32
