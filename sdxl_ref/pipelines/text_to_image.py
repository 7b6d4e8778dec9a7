"""Text to image, by the base alone."""

from sdxl_ref.pipelines.pipeline import Pipeline
from sdxl_ref.pipelines.request import Request

TextToImageRequest = Request


class TextToImagePipeline(Pipeline):
    """SDXL's base. Arguments have the names and meanings of the ecosystem's text-to-image pipeline.

    With an `image` it is `ImageToImagePipeline`'s run, by the same model.
    """

    kinds = ("base",)
