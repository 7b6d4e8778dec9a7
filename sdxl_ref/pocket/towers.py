"""The recipe's text towers: they learn to say what a caption's picture shows, and are frozen afterwards, as SDXL's."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sdxl_ref.config import ModelConfig
from sdxl_ref.pocket.examples import SEED, training_scene
from sdxl_ref.pocket.scenes import COLOURS, GROUNDS, SHAPES, TEXTURES, Scene, random_scene
from sdxl_ref.pocket.stages import SETTINGS, RecipeFolder
from sdxl_ref.text.tokenizer import tokenize
from sdxl_ref.training.loop import Run
from sdxl_ref.weights.checkpoint import build
from sdxl_ref.weights.stated_config import config_to_json

TOWERS = ("text_encoder", "text_encoder_2")
CAPTIONS = 128  # of a step
TESTED = 500  # captions whose facts are read off at the end
FACTS = {  # what a caption says of a picture: how many answers there are to each
    "arrangement": 3,
    "first colour": len(COLOURS) + 1,  # the last answer is "none"
    "first shape": len(SHAPES) + 1,
    "last colour": len(COLOURS) + 1,
    "last shape": len(SHAPES) + 1,
    "ground": len(GROUNDS),
    "texture": len(TEXTURES),
}


class Reader(nn.Module):
    """Reads off a tower's outputs what a picture shows; the towers are trained by it, as CLIP's by its image tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(FACTS.values()))

    def forward(self, state: Tensor) -> tuple[Tensor, ...]:
        """(b,width) -> the logits of each fact, (b,answers)."""
        return self.heads(self.norm(state)).split(list(FACTS.values()), dim=1)

    @staticmethod
    def facts(scene: Scene) -> list[int]:
        """The right answers, in the order of FACTS. A single thing is the first; then the last one is "none"."""
        things = scene.from_top_left
        names = [(tuple(COLOURS).index(thing.colour), SHAPES.index(thing.shape)) for thing in things]
        if len(things) == 1:
            arrangement = 0
            names.append((len(COLOURS), len(SHAPES)))
        else:
            arrangement = 2 if scene.relation in ("above", "below") else 1
        ground = tuple(GROUNDS).index(scene.ground)
        return [arrangement, *names[0], *names[1], ground, TEXTURES.index(scene.texture)]


class TowersAndReaders(nn.Module):
    """Both towers, and a reader on each output that a UNet reads: the two contexts and the pooled vector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.text_encoder = build("text_encoder", config)
        self.text_encoder_2 = build("text_encoder_2", config)
        clip_l, openclip = config.text_encoders
        widths = {"context": clip_l.width, "context_2": openclip.width, "pooled": openclip.embed_dim}
        self.readers = nn.ModuleDict({name: Reader(width) for name, width in widths.items()})

    def forward(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """The logits of each fact (b,answers), by output. The contexts are read at the end of the text."""
        device = next(self.parameters()).device
        clip_tokens = tokenize(captions, pad="eos")  # (b,77)
        rows = torch.arange(len(captions))
        end = clip_tokens.argmax(dim=1)  # (b,), the end token has the largest number
        context = self.text_encoder(clip_tokens.to(device))  # (b,77,width)
        context_2, pooled = self.text_encoder_2(tokenize(captions, pad="zero").to(device))
        states = {"context": context[rows, end], "context_2": context_2[rows, end], "pooled": pooled}
        return {name: self.readers[name](state) for name, state in states.items()}

    def towers(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: getattr(self, name) for name in TOWERS})


def train_towers(folder: RecipeFolder, stage: str, stop: int | None = None) -> None:
    """Each output that a UNet reads learns to say what the picture shows, thing by thing."""
    torch.manual_seed(SEED)
    config = folder.configs["base"]
    model = TowersAndReaders(config).to(folder.device)

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        scenes = [training_scene(rng) for _ in range(CAPTIONS)]
        answers = right_answers(scenes).to(folder.device)  # (b,facts)
        losses = []
        for logits in model([scene.caption for scene in scenes]).values():
            losses += [F.cross_entropy(fact, answers[:, i]) for i, fact in enumerate(logits)]
        return torch.stack(losses).mean()

    run = Run(model, SETTINGS[stage], folder.path / stage, {"model": config_to_json(config)})
    if folder.train(stage, run, step_loss, stop):
        model.load_state_dict(model.state_dict() | run.averaged)
        report_accuracy(model)
        folder.write_result(stage, model.towers().state_dict())


def right_answers(scenes: Sequence[Scene]) -> Tensor:
    """(b,facts) int64."""
    return torch.tensor([Reader.facts(scene) for scene in scenes])


@torch.no_grad()
def report_accuracy(model: TowersAndReaders) -> None:
    """Print for how many captions of two things each output says everything, seen in training and held out."""
    rng = np.random.default_rng(0)
    for name, held_out in (("trained on", False), ("held out", True)):
        scenes = [random_scene(rng, 2, held_out) for _ in range(TESTED)]
        answers = right_answers(scenes)
        for output, logits in model([scene.caption for scene in scenes]).items():
            guesses = torch.stack([fact.argmax(dim=1) for fact in logits], dim=1).cpu()  # (b,facts)
            share = (guesses == answers).all(dim=1).float().mean()
            tqdm.write(f"two things, {name}: {output} tells everything for {share:.1%}")
