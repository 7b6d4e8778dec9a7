"""The dtypes of tensors in a safetensors file, by the names that the format gives them; and finite values."""

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in any dtype that weights come in: torch cannot tell it of 8-bit ones."""
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())
