"""`DiffusionPipeline`, as the ecosystem's code opens a model of which it does not say what it is."""

from pathlib import Path
from typing import Any

from sdxl_ref.pipelines.image_to_image import ImageToImagePipeline
from sdxl_ref.pipelines.text_to_image import TextToImagePipeline
from sdxl_ref.weights.checkpoint import Checkpoint
from sdxl_ref.weights.opening import WHERE, open_checkpoint


class DiffusionPipeline:
    """Opens what the files are: `TextToImagePipeline` for a base, `ImageToImagePipeline` for a refiner."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path | Checkpoint, **options: Any
    ) -> TextToImagePipeline | ImageToImagePipeline:
        """As `Pipeline.from_pretrained`."""
        checkpoint = open_checkpoint(name, **{key: options[key] for key in WHERE if key in options})
        pipeline = TextToImagePipeline if checkpoint.config.kind == "base" else ImageToImagePipeline
        return pipeline.from_pretrained(checkpoint, **options)

    @classmethod
    def from_pipe(cls, pipe: Any, **parts: Any) -> TextToImagePipeline | ImageToImagePipeline:
        """As a pipeline's own `from_pipe`, by what the model is."""
        is_refiner = isinstance(pipe, ImageToImagePipeline) and pipe.config.kind == "refiner"
        pipeline = ImageToImagePipeline if is_refiner else TextToImagePipeline
        made: TextToImagePipeline | ImageToImagePipeline = pipeline.from_pipe(pipe, **parts)
        return made
