"""Training data: captioned pictures in SDXL's aspect buckets, and what the frozen networks make of them, cached.

Source: Podell et al. 2023 (arXiv:2307.01952), sections 2.2 and 2.3 (sizes, crops, aspect buckets).
Shapes: b batch, h w of the latents, d of the context, e of the pooled vector, k numbers. Sizes are (height, width).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.config import InputError, ModelConfig
from sdxl_ref.pictures.images import load_image, to_tensor
from sdxl_ref.pipelines.pipeline import SCORE, check_finite
from sdxl_ref.text.conditioning import Numbers, encode_text
from sdxl_ref.training.buckets import ResizedCrop, Size, buckets, crop_to_bucket, fit_bucket
from sdxl_ref.training.cache import Row, Shards, key_of
from sdxl_ref.training.image_folder import Example
from sdxl_ref.weights.leftovers import clear
from sdxl_ref.weights.tensor_files import sha256_of


@dataclass(frozen=True)
class CachedBatch:
    """Pictures of one bucket, on the CPU: the latents' posterior, scaled, in float32, and the conditioning."""

    mean: Tensor  # (b,4,h,w)
    std: Tensor  # (b,4,h,w)
    captions: list[str]
    numbers: Tensor  # (b,k)
    context: Tensor | None  # (b,77,d), of the captions; None where no text is cached
    pooled: Tensor | None  # (b,e), likewise

    def select(self, pictures: slice) -> "CachedBatch":
        """Some of the pictures."""
        context = None if self.context is None else self.context[pictures]
        pooled = None if self.pooled is None else self.pooled[pictures]
        mean = self.mean[pictures]
        std = self.std[pictures]
        return CachedBatch(mean, std, self.captions[pictures], self.numbers[pictures], context, pooled)


class NewPicture(NamedTuple):
    """A picture that is not in the cache yet; sorted, pictures of one bucket follow each other."""

    bucket: Size
    path: Path
    sha256: str


@torch.no_grad()
def encode_picture(vae: nn.Module, image: Image.Image, scale_factor: float) -> dict[str, Tensor]:
    """Mean and standard deviation (4,h,w) of a picture's latents, scaled, in float32, on the CPU."""
    posterior = vae.encode(to_tensor(image).to(next(vae.parameters())))  # type: ignore[operator]
    moments = {"mean": posterior.mean.float(), "std": torch.exp(0.5 * posterior.logvar.float())}
    return {
        name: check_finite("the VAE's encoder", moment[0].cpu() * scale_factor)  # (1,4,h,w) -> (4,h,w)
        for name, moment in moments.items()
    }


class Dataset:
    """Examples, and in a folder what a model's VAE and text encoders make of them, computed once.

    `parts` are the networks by their names in a pipeline (`vae`; `text_encoder` on a base; `text_encoder_2`), each on
    its own device; `fingerprints`, by the same names, say which weights they have. Pictures and captions are encoded
    one at a time, so that a row does not depend on which others were missing. Without `cache_text` no text is
    encoded. `notes` are lines for the user. InputError names a damaged picture; with `skip_bad` a note does.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        folder: Path,
        config: ModelConfig,
        parts: Mapping[str, nn.Module],
        fingerprints: Mapping[str, str],
        cache_text: bool = True,
        skip_bad: bool = False,
    ) -> None:
        self.config = config
        self.fingerprints = fingerprints  # the networks are not kept: the caller may need their memory
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"could not make the folder {folder}: {error.strerror}") from error
        clear(folder)
        self.shards = Shards(folder)
        self.notes: list[str] = []
        picture_keys = self._cache_pictures(examples, parts["vae"], skip_bad)
        self.examples = [example for example in examples if example.path in picture_keys]
        if not self.examples:
            raise InputError(f"expected pictures, can read none of {len(examples)}; {'; '.join(self.notes[:1])}")
        self.latent_keys = [picture_keys[example.path] for example in self.examples]
        self.text_keys = self._cache_text(parts) if cache_text else {}
        self.crops = [self._crop(key) for key in self.latent_keys]
        self.sizes = [crop.target_size for crop in self.crops]  # the bucket of each picture
        self.numbers = self._numbers()  # (examples,k)

    def __len__(self) -> int:
        return len(self.examples)

    def clean(self) -> None:
        """Delete what the cache holds for other pictures, captions or networks."""
        self.shards.clean("latents", self.latent_keys)
        if self.text_keys:
            self.shards.clean("text", self.text_keys.values())

    def batch(self, indices: Sequence[int]) -> CachedBatch:
        """The examples of these indices, which share a bucket, in this order."""
        assert len({self.sizes[i] for i in indices}) == 1
        captions = [self.examples[i].text for i in indices]
        moments = self.shards.read(self.latent_keys[i] for i in indices)
        numbers = self.numbers[list(indices)]  # (examples,k) -> (b,k)
        text: dict[str, Tensor] = {}
        if self.text_keys:
            text = self.shards.read(self.text_keys[caption] for caption in captions)
        return CachedBatch(moments["mean"], moments["std"], captions, numbers, text.get("context"), text.get("pooled"))

    def dropped_text(self) -> tuple[Tensor, Tensor]:
        """Context (77,d) and pooled vector (e,) of a dropped caption: the empty prompt's, or zeros on a base."""
        text = self.shards.read([self.text_keys[""]])
        context = text["context"][0]  # (1,77,d) -> (77,d)
        pooled = text["pooled"][0]  # (1,e) -> (e,)
        if self.config.kind == "base":
            return torch.zeros_like(context), torch.zeros_like(pooled)
        return context, pooled

    def _cache_pictures(self, examples: Sequence[Example], vae: nn.Module, skip_bad: bool) -> dict[Path, str]:
        """The key of each picture that can be read; its latents are in the shards then.

        New pictures are opened twice, so that a damaged one is named before hours of encoding, not after.
        """
        sizes = buckets(self.config.resolution)
        keys: dict[Path, str] = {}
        missing: list[NewPicture] = []
        for path in tqdm(dict.fromkeys(example.path for example in examples), desc="pictures", disable=None):
            try:
                digest = sha256_of(path)
                key = self._picture_key(digest)
                if key not in self.shards:
                    width, height = load_image(path).size
                    missing.append(NewPicture(fit_bucket((height, width), sizes).target_size, path, digest))
                keys[path] = key
            except (InputError, OSError) as error:
                if not skip_bad:
                    raise InputError(f"{error}: mend it, take its line out, or leave it out with --skip-bad") from error
                self.notes.append(f"left out: {error}")
        self.shards.fill("latents", self._encode_pictures(sorted(missing), vae))
        return keys

    def _picture_key(self, digest: str) -> str:
        """The key of a picture's latents, from the hash of its file."""
        return key_of(digest, self.config.resolution, self.config.vae.scale_factor, self.fingerprints["vae"])

    def _encode_pictures(self, pictures: Sequence[NewPicture], vae: nn.Module) -> Iterator[Row]:
        """The rows of new pictures, one at a time."""
        sizes = buckets(self.config.resolution)
        for picture in tqdm(pictures, desc="latents", disable=None):
            image, crop = crop_to_bucket(load_image(picture.path), sizes)
            facts = {
                "key": self._picture_key(picture.sha256),
                "file": picture.path.name,
                "sha256": picture.sha256,
                "vae": self.fingerprints["vae"],
                **asdict(crop),
            }
            yield Row(facts, encode_picture(vae, image, self.config.vae.scale_factor))

    def _cache_text(self, parts: Mapping[str, nn.Module]) -> dict[str, str]:
        """The key of each different caption and of the empty prompt; their rows are in the shards then."""
        encoders = ["text_encoder", "text_encoder_2"] if self.config.kind == "base" else ["text_encoder_2"]
        encoder_fingerprints = {name: self.fingerprints[name] for name in encoders}
        captions = dict.fromkeys(["", *(example.text for example in self.examples)])
        keys = {caption: key_of(caption, encoder_fingerprints) for caption in captions}

        def encode_missing() -> Iterator[Row]:
            device = next(parts["text_encoder_2"].parameters()).device
            missing = [caption for caption, key in keys.items() if key not in self.shards]
            for caption in tqdm(missing, desc="captions", disable=None):
                with torch.no_grad():
                    context, pooled = encode_text(
                        parts.get("text_encoder"), parts["text_encoder_2"], [caption], [caption], device
                    )
                facts = {"key": keys[caption], "text": caption, **encoder_fingerprints}
                yield Row(facts, {"context": context[0].cpu(), "pooled": pooled[0].cpu()})  # (1,...) -> (...)

        self.shards.fill("text", encode_missing())
        return keys

    def _crop(self, key: str) -> ResizedCrop:
        """How a cached picture came into its bucket."""
        facts = self.shards.facts(key)
        return ResizedCrop(*(tuple(facts[field.name]) for field in fields(ResizedCrop)))

    def _numbers(self) -> Tensor:
        """The sizes and scores that the UNet reads (examples,k); a note where a refiner's scores are missing."""
        missing = sum(example.aesthetic_score is None for example in self.examples)
        if self.config.kind == "refiner" and missing:
            self.notes.append(
                f"{missing} of {len(self.examples)} pictures have no aesthetic_score: {SCORE} is used for them"
            )
        rows = []
        for crop, example in zip(self.crops, self.examples, strict=True):
            score = SCORE if example.aesthetic_score is None else example.aesthetic_score
            numbers = Numbers(crop.original_size, crop.crop, crop.target_size, score)
            rows.append(numbers.tensor(self.config.kind))
        return torch.stack(rows)  # (k,) -> (examples,k)
