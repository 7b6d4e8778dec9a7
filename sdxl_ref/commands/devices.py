"""A device by its name, tried out: imported where `--device` names one."""

import torch

from sdxl_ref.config import InputError


def named_device(name: str) -> torch.device:
    """The device of this name. InputError where it is not to be had."""
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" has no values
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).split(". ")[0]  # some of PyTorch's go on for pages
        raise InputError(f"device {name!r} is not to be had: expected auto, cpu, cuda or mps ({why})") from error
