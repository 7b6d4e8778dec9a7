"""Which model an adapter is for, by what trainers write into its file's header."""

from collections.abc import Mapping

from sdxl_ref.config import InputError, ModelConfig

VERSION = "ss_base_model_version"  # kohya's, and those that follow it: sdxl_base_v1-0, sd_v1, …
ARCHITECTURE = "modelspec.architecture"  # ModelSpec's: stable-diffusion-xl-v1-base/lora, …


def check_model(metadata: Mapping[str, str], config: ModelConfig) -> None:
    """InputError where a header names another model than this: layers of that may match by chance."""
    architecture = metadata.get(ARCHITECTURE, "")
    expected = f"stable-diffusion-xl-v1-{config.kind}"
    if architecture and architecture.split("/")[0] != expected:
        raise InputError(_refusal(ARCHITECTURE, architecture, config, expected))
    version = metadata.get(VERSION, "")
    other = "refiner" if config.kind == "base" else "base"
    if version and (not version.startswith("sdxl") or other in version):
        raise InputError(_refusal(VERSION, version, config, "sdxl"))


def _refusal(key: str, value: str, config: ModelConfig, expected: str) -> str:
    names = f"was made for {value!r}, by its header's {key}"
    return f"the adapter {names}: expected {expected} for this SDXL {config.kind}"
