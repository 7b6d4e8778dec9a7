"""Image to image (SDEdit): the refiner's main job, and as well the base's."""

from sdxl_ref.pipelines.pipeline import Pipeline


class ImageToImagePipeline(Pipeline):
    """A refiner or a base on a picture. Arguments have the names and meanings of the ecosystem's img2img pipeline."""

    kinds = ("refiner", "base")
