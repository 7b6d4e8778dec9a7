"""What `sdxl-ref info` and `weights-convert inspect` tell of adapters: files of the libraries that write them."""

import json
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from adapter_files import CONFIGS, kohya, peft_state, random_file, with_peft
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_ref.adapters.report import describe_any
from sdxl_ref.cli import main as sdxl_ref
from weights_convert.cli import main as weights_convert

UNET = peers.SMALL_BASE.unet
TARGETS = ["attn2.to_k", "conv_in"]


def peft_file(path: Path, prefix: str = "unet", **options: Any) -> Path:
    peer = with_peft(peers.diffusers_unet(peers.small_unet(UNET)), TARGETS, **options)
    save_file({key: value.contiguous() for key, value in peft_state(peer, prefix).items()}, path)
    return path


class Layers(nn.Module):
    """Two layers under SDXL's names, for LyCORIS, which takes any network."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(2048, 64)}), "ff": nn.Linear(64, 64)})
        self.down_blocks = nn.ModuleList([block])


def lycoris_state(algorithm: str, **options: Any) -> dict[str, Tensor]:
    from lycoris import create_lycoris

    network = create_lycoris(Layers(), linear_dim=4, linear_alpha=2.0, algo=algorithm, **options)
    network.apply_to()
    state: dict[str, Tensor] = network.state_dict()
    return {key.replace("lycoris_", "lora_unet_", 1): value.clone() for key, value in state.items()}


def test_what_peft_writes(tmp_path: Path) -> None:
    found = describe_any(peft_file(tmp_path / "a.safetensors", rank=4))
    assert found.model == "an adapter: LoRA, in diffusers' names"
    assert list(found.parts) == ["unet"]
    names = [name for name, _ in peers.diffusers_unet(peers.small_unet(UNET)).named_modules()]
    layers = sum(name.endswith("attn2.to_k") for name in names) + 1
    assert found.details["layers"] == f"{layers} in unet"
    assert found.details["rank"] == "4"
    assert found.details["alpha"] == "none among the tensors"
    width = UNET.context_dim
    assert found.details["made for"] == f"a model whose text is {width} wide (by the width of the text)"
    assert found.parts["unet"].tensors == 2 * layers
    assert "VAE:" not in "\n".join(found.lines())


def test_what_peft_writes_with_a_magnitude(tmp_path: Path) -> None:
    assert describe_any(peft_file(tmp_path / "a.safetensors", use_dora=True)).model.startswith(
        "an adapter: LoRA, DoRA,"
    )


def test_a_part_in_shards_and_other_files_are_no_adapters(tmp_path: Path, small_refiner_file: Path) -> None:
    assert describe_any(small_refiner_file).model == "SDXL-like refiner"
    assert describe_any("pocket-base").model == "SDXL-like base"


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_parts_are_told(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    found = describe_any(random_file(config, tmp_path / "a.safetensors"))
    assert found.model == "an adapter: LoRA, in official names"
    assert list(found.parts) == sorted({"unet", "text_encoder_2"} | ({"text_encoder"} if kind == "base" else set()))
    assert found.details["rank"] == "3"


def test_kohyas_names_alphas_and_several_ranks(tmp_path: Path) -> None:
    state = {
        f"{layer}.lora_{role}.weight": torch.zeros(shape)
        for layer, rank in (("unet.down_blocks_0_attn2_to_k", 8), ("text_encoder.te_0", 4), ("text_encoder_2.te_1", 8))
        for role, shape in (("A", (rank, 2048)), ("B", (64, rank)))
    }
    names = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    save_file(
        kohya(state, 2.0, names) | {"bundle_emb.token": torch.zeros(1)},
        tmp_path / "a.safetensors",
        {"ss_network_dim": "8", "modelspec.title": "桜"},
    )
    found = describe_any(tmp_path / "a.safetensors")
    assert found.model == "an adapter: LoRA, in kohya's names"
    assert found.details == {
        "layers": "1 in text_encoder, 1 in text_encoder_2, 1 in unet",
        "rank": "8 (2 layers), 4 (1 layers)",
        "alpha": "2",
        "made for": "an SDXL base (by the width of the text)",
    }
    assert found.extras == ("bundle_emb.token",)
    assert found.metadata["modelspec.title"] == "桜"


@pytest.mark.parametrize(
    ("algorithm", "options", "kinds"),
    [
        ("lora", {}, "LoRA"),
        ("loha", {}, "LoHa"),
        ("lokr", {"factor": 4}, "LoKr"),
        ("lora", {"dora_wd": True}, "LoRA, DoRA"),
        ("full", {}, "whole differences"),
        ("diag-oft", {}, "OFT"),
        ("boft", {}, "BOFT"),
        ("glora", {}, "GLoRA"),
        ("ia3", {}, "IA3"),
    ],
)
def test_what_lycoris_writes(algorithm: str, options: dict[str, Any], kinds: str, tmp_path: Path) -> None:
    save_file(lycoris_state(algorithm, **options), tmp_path / "a.safetensors")
    found = describe_any(tmp_path / "a.safetensors")
    assert found.model == f"an adapter: {kinds}, in kohya's names"
    if kinds.startswith(("LoRA", "LoHa")):
        assert found.details["rank"] == "4"
        assert found.details["made for"].startswith("an SDXL base")


@pytest.mark.parametrize(
    ("width", "model"), [(2048, "an SDXL base"), (1280, "an SDXL refiner"), (768, "SD 1.x"), (1024, "SD 2.x")]
)
def test_the_model_is_told_by_the_width_of_the_text(width: int, model: str, tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v"
    shapes = {"lora_down": (2, width), "lora_up": (64, 2)}
    save_file(
        {f"{layer}.{role}.weight": torch.zeros(shape) for role, shape in shapes.items()}, tmp_path / "a.safetensors"
    )
    assert describe_any(tmp_path / "a.safetensors").details["made for"] == f"{model} (by the width of the text)"


def test_both_commands_print_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file, and of the folder that PEFT writes it into."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    file = peft_file(folder / "adapter_model.safetensors", prefix="base_model.model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for path in (file, folder):
        assert sdxl_ref(["info", str(path)]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{file}: an adapter: LoRA, in PEFT's names\n")
        assert weights_convert(["inspect", str(path)]) == 0
        assert capsys.readouterr().out == text
        assert weights_convert(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["details"]["rank"] == "4"
    assert sdxl_ref(["info", str(file), "--check"]) == 0
    assert "finite: every value of every tensor" in capsys.readouterr().out
