"""The recipe: everything that makes the pocket pair, from nothing, in stages that can be stopped and go on.

    python -m sdxl_ref.pocket.recipe --out DIR [--device cuda] [--stage vae …]

Stages: `towers` (both text towers, on captions and what their pictures show; frozen afterwards, as SDXL's are), `vae`
(autoencoder on crops of scenes), `vae-more` (goes on with whole pictures, of other looks too), `latents` (scenes
through it, once), `base` (its UNet), `refiner` (its UNet on t in 0..199, with the base's OpenCLIP tower), `base-more`
and `refiner-more` (each goes on, its loss weighted for higher noise), `base-last` and `refiner-last` (once more, on all
that they are used for), `write` (two files in the official layout, float16).
The time of each is kept in DIR/times.json; README.md beside this file has the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.checkpoint import build, prefixes, sha256_of
from sdxl_ref.config import InputError
from sdxl_ref.ecosystem import TextToImagePipeline
from sdxl_ref.networks.vae import AutoencoderKL
from sdxl_ref.noise import draw_noise
from sdxl_ref.pocket.examples import SEED, Pixels, Reader, Told, example, kept, to_images
from sdxl_ref.pocket.judge import judge
from sdxl_ref.pocket.models import BASE, CLIP, CONFIGS, OPENCLIP, start
from sdxl_ref.pocket.scenes import SIZE, Look, Scene, random_scene
from sdxl_ref.saving import replacing, save_checkpoint, write
from sdxl_ref.sheets import contact_sheet
from sdxl_ref.tokenizer import tokenize
from sdxl_ref.training.diffusion import Batch, Objective
from sdxl_ref.training.loop import Loss, Run, Settings, locked

TOWERS = ("text_encoder", "text_encoder_2")
SCENES = 40_000
AUTOENCODER = {  # pixels a side, how many a step, how many of these in any look, and the weight of the KL divergence
    "vae": (64, 8, 0, 1e-6),
    "vae-more": (128, 4, 2, 1e-7),
}
CAPTIONS = 128  # a step of the towers' training
SETTINGS = {
    "towers": Settings(steps=3_000, learning_rate=2e-3, ema=0.99),
    "vae": Settings(steps=6_000, learning_rate=1e-3, weight_decay=0.0),
    "vae-more": Settings(steps=9_000, learning_rate=1e-3, weight_decay=0.0, seed=1),
    "base": Settings(steps=6_000, learning_rate=1e-3),
    "refiner": Settings(steps=3_500, learning_rate=1e-3),
    "base-more": Settings(steps=5_500, learning_rate=1e-3, seed=1),
    "refiner-more": Settings(steps=2_500, learning_rate=8e-4, seed=1),
    "base-last": Settings(steps=2_000, learning_rate=8e-4, seed=2),
    "refiner-last": Settings(steps=2_000, learning_rate=8e-4, seed=2),
}
SAMPLE_EVERY = 2000
OBJECTIVES = {  # of a UNet's training, each with its share of a step's pictures
    "base": {Objective(weighting="debiased"): 32},
    "refiner": {Objective(last=199): 32},
    "base-more": {Objective(first=700, weighting="v"): 24, Objective(weighting="v"): 8},  # what is settled first
    "refiner-more": {Objective(last=199, weighting="debiased"): 32},
    "base-last": {Objective(first=700, weighting="v"): 16, Objective(weighting="debiased"): 16},
    "refiner-last": {Objective(last=199, weighting="debiased"): 32},
}
STAGES = ("towers", *AUTOENCODER, "latents", *OBJECTIVES, "write")


class Recipe:
    """The stages, in a folder, on a device."""

    def __init__(self, out: Path, device: torch.device, scenes: int = SCENES) -> None:
        self.out, self.device, self.scenes = out, device, scenes
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"could not make the folder {out}: {error.strerror}") from error

    def run(self, stage: str, stop: int | None = None) -> bool:
        """One stage; whether it came to its end. It is timed, and the seconds of its pieces add up."""
        began = time.perf_counter()
        try:
            with locked(self.out / stage) if stage in SETTINGS else nullcontext():
                if stage in OBJECTIVES:
                    self.unet(stage, stop)
                elif stage in AUTOENCODER:
                    self.vae(stage, stop)
                elif stage in SETTINGS:
                    getattr(self, stage)(stop)
                else:
                    getattr(self, stage)()
        finally:
            path, times = self.out / "times.json", {}
            with suppress(OSError, ValueError):
                times = dict(json.loads(path.read_text()))
            times[stage] = round(times.get(stage, 0.0) + time.perf_counter() - began, 1)
            with replacing(path) as beside:
                beside.write_text(json.dumps(times))
        return stage == "write" or (self.out / f"{stage}.safetensors").exists()

    def made(self, stage: str) -> dict[str, Tensor]:
        """What a stage has written."""
        path = self.out / f"{stage}.safetensors"
        if not path.exists():
            raise InputError(f"{path} is not there: run the stage {stage!r} first, to its end")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"could not read {path} ({error}): run the stage {stage!r} again") from error

    def hashes(self, *stages: str) -> dict[str, str]:
        """sha256 of what stages have written: a stage that learned from it does not go on with another."""
        return {stage: sha256_of(self.out / f"{stage}.safetensors") for stage in stages}

    def to_the_end(
        self, stage: str, run: Run, loss_of: Loss, stop: int | None, painters: nn.ModuleDict | None = None
    ) -> bool:
        """Train a stage, with sheets of samples on the way. Whether it is at its end and has its result to write."""
        if run.step == run.settings.steps and (self.out / f"{stage}.safetensors").exists():
            return False
        for step in run.train(loss_of, stop=stop):
            if painters and step % SAMPLE_EVERY == 0:
                self.sample(painters, run)
        return run.step == run.settings.steps

    def pictures(self) -> tuple[Pixels, list[Told]]:
        return kept(self.out, self.scenes)

    def towers(self, stop: int | None = None) -> None:
        """Each output that a UNet is handed learns to say what the picture shows, place by place."""
        torch.manual_seed(SEED)
        towers = nn.ModuleDict({part: build(part, BASE) for part in TOWERS})
        widths = {"context": CLIP.width, "context_2": OPENCLIP.width, "pooled": OPENCLIP.embed_dim}
        readers = nn.ModuleDict({name: Reader(width) for name, width in widths.items()})
        whole = nn.ModuleDict({**towers, "readers": readers}).to(self.device)

        def answers(scenes: list[Scene]) -> tuple[dict[str, tuple[Tensor, ...]], Tensor]:
            captions = [scene.caption for scene in scenes]
            tokens = {"text_encoder": tokenize(captions, pad="eos"), "text_encoder_2": tokenize(captions, pad="zero")}
            rows, end = torch.arange(len(scenes)), tokens["text_encoder"].argmax(dim=1)
            context = towers["text_encoder"](tokens["text_encoder"].to(self.device))[rows, end]
            context_2, pooled = towers["text_encoder_2"](tokens["text_encoder_2"].to(self.device))
            states = {"context": context, "context_2": context_2[rows, end], "pooled": pooled}
            facts = torch.tensor([Reader.facts(scene) for scene in scenes], device=self.device)
            return {name: readers[name](state) for name, state in states.items()}, facts

        def loss_of(step: int, generator: torch.Generator) -> Tensor:
            rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
            logits, facts = answers([random_scene(rng, 1 + int(rng.random() < 2 / 3)) for _ in range(CAPTIONS)])
            losses = [F.cross_entropy(a, facts[:, i]) for each in logits.values() for i, a in enumerate(each)]
            return torch.stack(losses).mean()

        run = Run(whole, SETTINGS["towers"], self.out / "towers", {"model": BASE.to_json()})
        if not self.to_the_end("towers", run, loss_of, stop):
            return
        whole.load_state_dict(whole.state_dict() | run.averaged)
        rng = np.random.default_rng(0)
        with torch.no_grad():
            for held_out in (False, True):
                logits, facts = answers([random_scene(rng, 2, held_out) for _ in range(500)])
                for name, each in logits.items():
                    guesses = torch.stack([a.argmax(dim=1) for a in each], dim=1)
                    right = (guesses == facts).all(dim=1).float().mean()
                    kept = "held out" if held_out else "trained on"
                    tqdm.write(f"two things, {kept}: {name} tells everything for {right:.1%}")
        state = {k: v.cpu().contiguous() for k, v in towers.state_dict().items()}
        write(self.out / "towers.safetensors", state, {})

    def vae(self, stage: str, stop: int | None = None) -> None:
        torch.manual_seed(SEED)
        vae = AutoencoderKL(BASE.vae)
        if stage != "vae":
            vae.load_state_dict(self.made("vae"))
        vae.to(self.device)
        (pixels, _), (side, count, varied, kl_weight) = self.pictures(), AUTOENCODER[stage]

        def loss_of(step: int, generator: torch.Generator) -> Tensor:
            index = torch.randint(len(pixels), (count,), generator=generator).tolist()
            corners = (torch.randint((SIZE - side) // 8 + 1, (count, 2), generator=generator) * 8).tolist()
            looks = torch.rand(varied, 2, generator=generator).tolist()
            whole = [example(i, look=Look(0.6 * a, 0.4 + 0.6 * b))[0] for i, (a, b) in zip(index, looks, strict=False)]
            whole += [pixels[i] for i in index[varied:]]
            crops = [each[y : y + side, x : x + side] for each, (y, x) in zip(whole, corners, strict=True)]
            images = to_images(np.stack(crops), self.device)
            posterior = vae.encode(images)
            noise = draw_noise(posterior.mean.shape, generator).to(self.device)
            decoded = vae.decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)
            kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum(dim=(1, 2, 3)).mean()
            return F.mse_loss(decoded, images) + kl_weight * kl

        about: dict[str, object] = {"model": f"pocket {stage}", "scenes": self.scenes, "pictures": AUTOENCODER[stage]}
        if stage != "vae":
            about["learned from"] = self.hashes("vae")
        run = Run(vae, SETTINGS[stage], self.out / stage, about)
        if not self.to_the_end(stage, run, loss_of, stop):
            return
        vae.load_state_dict(vae.state_dict() | run.averaged)
        normalise(vae, to_images(pixels[:1000], self.device))
        write(self.out / f"{stage}.safetensors", {k: v.cpu().contiguous() for k, v in vae.state_dict().items()}, {})

    def trained_vae(self) -> AutoencoderKL:
        vae = AutoencoderKL(BASE.vae)
        vae.load_state_dict(self.made("vae-more"))
        return vae.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def latents(self) -> None:
        """Means of all scenes' latents, scaled, in float16."""
        vae, (pixels, _), found = self.trained_vae(), self.pictures(), []
        path, about = self.out / "latents.safetensors", {"learned from": json.dumps(self.hashes("vae-more"))}
        with suppress(FileNotFoundError, SafetensorError), safe_open(path, framework="pt") as file:
            if file.metadata() == about:
                return
        for i in tqdm(range(0, self.scenes, 50), desc="latents", disable=None):
            posterior = vae.encode(to_images(pixels[i : i + 50], self.device))
            found.append((posterior.mean * BASE.vae.scale_factor).half().cpu())
        write(path, {"latents": torch.cat(found).contiguous()}, about)

    def unet(self, stage: str, stop: int | None = None) -> None:
        torch.manual_seed(SEED)
        kind = stage.partition("-")[0]
        config = CONFIGS[kind]
        names = [part for part in prefixes(config) if part != "vae"]
        parts = nn.ModuleDict({part: build(part, config) for part in names})
        start(parts["unet"])  # type: ignore[arg-type]
        trained = self.made("towers")
        for name in (name for name in names if name in TOWERS):
            own = {k.removeprefix(name + "."): v for k, v in trained.items() if k.startswith(name + ".")}
            parts[name].load_state_dict(own)
            parts[name].requires_grad_(False)
        before = stages_of(kind)[: stages_of(kind).index(stage)][-1:]
        if before:
            parts.load_state_dict(self.made(before[0]))
        parts.to(self.device)
        latents = self.made("latents")["latents"]
        _, told = self.pictures()
        shares = OBJECTIVES[stage]

        def loss_of(step: int, generator: torch.Generator) -> Tensor:
            losses = []
            for objective, size in shares.items():
                index = torch.randint(len(latents), (size,), generator=generator)
                rows = [told[i] for i in index.tolist()]
                numbers = torch.stack([row.numbers(kind) for row in rows]).to(self.device)
                batch = Batch(latents[index].to(self.device).float(), [row.caption for row in rows], numbers)
                losses.append(objective.loss(parts, batch, generator) * size / sum(shares.values()))
            return torch.stack(losses).sum()

        objectives = [[asdict(objective), size] for objective, size in shares.items()]
        about = {"model": config.to_json(), "scenes": self.scenes, "objectives": objectives}
        about["learned from"] = self.hashes("towers", "latents", *before)
        run = Run(parts, SETTINGS[stage], self.out / stage, about)
        if not self.to_the_end(stage, run, loss_of, stop, parts if kind == "base" else None):
            return
        state = parts.state_dict() | run.averaged
        write(self.out / f"{stage}.safetensors", {k: v.cpu().contiguous() for k, v in state.items()}, {})

    def sample(self, parts: nn.ModuleDict, run: Run) -> None:
        """A sheet of pictures by the averaged weights, with what the judge finds right, into the stage's folder."""
        config, copies = CONFIGS["base"], {name: deepcopy(part) for name, part in parts.items()}
        for name, part in copies.items():
            own = {k.removeprefix(name + "."): v for k, v in run.averaged.items() if k.startswith(name + ".")}
            part.load_state_dict(part.state_dict() | own)
        pipe = TextToImagePipeline(config, vae=self.trained_vae(), **copies)
        rng = np.random.default_rng(0)
        scenes = [random_scene(rng, 1 + i % 2) for i in range(24)]
        generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
        prompts = [scene.caption for scene in scenes]
        pictures = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
        marks = [judge(np.asarray(p, dtype=np.float32) / 255, s) for p, s in zip(pictures, scenes, strict=True)]
        right = [sum(m.all_right for m in marks[i::2]) for i in (0, 1)]
        tqdm.write(f"step {run.step}: all right {right[0]}/12 with one thing, {right[1]}/12 with two")
        contact_sheet(pictures, prompts).save(run.folder / f"samples_{run.step:06}.png")

    def write(self) -> None:
        """Both files, from the last stage of each that has come to its end."""
        last = {}
        for kind in CONFIGS:
            ended = [stage for stage in stages_of(kind) if (self.out / f"{stage}.safetensors").exists()]
            last[kind] = self.made(ended[-1] if ended else kind)
        for kind, config in CONFIGS.items():
            parts: dict[str, nn.Module] = {"vae": self.trained_vae()}
            for part in (part for part in prefixes(config) if part != "vae"):
                parts[part] = build(part, config)
                own = {k.removeprefix(part + "."): v for k, v in last[kind].items() if k.startswith(part + ".")}
                parts[part].load_state_dict(own)
            save_checkpoint(self.out / f"pocket_{kind}.safetensors", config, parts, torch.float16)


def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel mean 0 and spread 1 after scaling: folded into the 1x1 convolutions, exactly."""
    with torch.no_grad():
        means = torch.cat([vae.encode(each).mean for each in images.split(50)])
        mean, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)) * vae.config.scale_factor
        quant, post, z = vae.quant_conv, vae.post_quant_conv, vae.config.embed_dim
        assert quant.bias is not None
        assert post.bias is not None
        quant.weight[:z] /= spread[:, None, None, None]
        quant.bias[:z] = (quant.bias[:z] - mean) / spread
        quant.bias[z:] -= 2 * spread.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= spread[None, :, None, None]


def stages_of(kind: str) -> list[str]:
    """The stages that train the UNet of "base" or "refiner", in order."""
    return [stage for stage in OBJECTIVES if stage.partition("-")[0] == kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--stage", action="append", choices=STAGES, help="one, or several; else all, in order")
    parser.add_argument(
        "--stop", type=int, help="stop the training of a stage at this step, without a result; it goes on another time"
    )
    a = parser.parse_args()
    try:
        if a.stop is not None and a.stop < 1:
            raise InputError(f"expected a step of at least 1 to stop at, found {a.stop}")
        recipe = Recipe(a.out, a.device)
        for stage in a.stage or STAGES:
            if not recipe.run(stage, a.stop):
                print(f"{stage}: stopped at step {a.stop}, goes on when started again")
                break
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(1, "stopped\n")


def device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda, found {name!r}") from error


if __name__ == "__main__":
    main()
