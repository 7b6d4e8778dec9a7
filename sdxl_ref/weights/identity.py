"""What a checkpoint is called: by its sizes, and by the hashes of its file and of its VAE's tensors.

Loaded where a picture's settings or a report say so.
"""

import hashlib
from dataclasses import replace

import torch

from sdxl_ref.config import BASE_1_0, REFINER_1_0
from sdxl_ref.weights.checkpoint import Checkpoint, expected_shapes, prefixes
from sdxl_ref.weights.tensor_files import sha256_of

KNOWN_FILES = {  # sha256 -> the file and its VAE; the 0.9 VAE stands in files of its own
    "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f": ("sd_xl_refiner_1.0", "1.0"),
    "8d0ce6c016004cbdacd50f937dad381d8c396628d621a7f97191470532780164": ("sd_xl_refiner_1.0_0.9vae", "0.9"),
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": ("sd_xl_base_1.0", "1.0"),
    "e6bb9ea85bbf7bf6478a7c6d18b71246f22e95d41bcdd80ed40aa212c33cfeff": ("sd_xl_base_1.0_0.9vae", "0.9"),
}


def name_of(checkpoint: Checkpoint) -> str:
    """What the file is, in words."""
    known = replace(checkpoint.config, prediction="epsilon") in (REFINER_1_0, BASE_1_0)
    kind = checkpoint.config.kind
    return f"SD-XL 1.0 {kind} (by its keys and shapes)" if known else f"SDXL-like {kind}"


def vae_name(checkpoint: Checkpoint, digest: str) -> str:
    """Which VAE there is in a file of this sha256: its release where that is known, and always a hash of its tensors.

    One that lies apart has the name of its own file, and that one's sha256.
    """
    prefix = prefixes(checkpoint.config)["vae"]
    release = KNOWN_FILES.get(digest, ("", "unknown"))[1]
    if hasattr(checkpoint, "original"):  # `WithVAE`, whose module only such a checkpoint loads
        files = checkpoint.files(prefix)
        release = f"{', '.join(file.name for file in files)}, file sha256 {sha256_of(*files)}"
    tensors = hashlib.sha256()
    keys = [key for key in expected_shapes(checkpoint.config) if key.startswith(prefix) and key in checkpoint.shapes]
    with checkpoint.reader() as read:
        for key in sorted(keys):
            tensors.update(read(key).contiguous().view(torch.uint8).numpy().data)
    checkpoint.require_unchanged()
    return f"{release}, tensors sha256 {tensors.hexdigest()}"
