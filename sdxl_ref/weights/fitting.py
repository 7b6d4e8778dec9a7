"""Whether the parts of a checkpoint fit each other and its tensors are those of its configuration; if not, why not."""

from pathlib import Path

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.weights.checkpoint import EXTRAS, Checkpoint, Shapes, expected_shapes
from sdxl_ref.weights.stated_config import misfit

V_MARKER = "v_pred"  # a tensor of this name, without values, says that the UNet returns v
OTHER_MODELS = {8: "an editing model (such as InstructPix2Pix)", 9: "an inpainting model"}  # by input channels


def require_fit(config: ModelConfig, path: Path) -> None:
    """InputError unless the parts fit each other. For every kind of checkpoint: its models are told by their sizes."""
    if problem := misfit(config):
        model = OTHER_MODELS.get(config.unet.in_channels)
        verdict = f"is {model}, which this package does not run" if model else "has parts that do not fit each other"
        raise InputError(f"{path} {verdict}: {problem}")


def check(config: ModelConfig, shapes: Shapes, path: Path) -> None:
    """Every key of every part there, in its shape, and nothing else but known extras; `logit_scale` may be missing."""
    expected = expected_shapes(config)
    weights = {key: shape for key, shape in shapes.items() if key in expected or not is_extra(key)}
    weights |= {key: () for key in expected if key.endswith(".logit_scale") and key not in weights}
    if problems := differences(expected, weights):
        raise InputError(f"{path} looks like an SDXL {config.kind}, but its tensors do not fit: {problems}")


def is_extra(key: str) -> bool:
    """Whether files are known to carry a tensor of this name which no network reads. A few are weights elsewhere."""
    return key == V_MARKER or EXTRAS.fullmatch(key) is not None


def extras(checkpoint: Checkpoint) -> list[str]:
    """The keys of what no network reads."""
    return [key for key in checkpoint.shapes if key not in expected_shapes(checkpoint.config)]


def differences(expected: Shapes, shapes: Shapes) -> str:
    """What is missing, unexpected or of another shape, in one line: how many of each, and the first three."""
    misshapen = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    problems = {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": [key for key in shapes if key not in expected],
        "of another shape": [
            f"{key} (expected {by_sides(expected[key])}, found {by_sides(shapes[key])})" for key in misshapen
        ],
    }
    return "; ".join(f"{len(keys)} {problem}: {', '.join(keys[:3])}" for problem, keys in problems.items() if keys)


def by_sides(shape: tuple[int, ...]) -> str:
    """A shape in words: `1280x1280`."""
    return "x".join(map(str, shape)) or "scalar"
