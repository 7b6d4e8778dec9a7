"""Files of adapters: in folders, with embeddings in them, of kinds that are not done here."""

import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
from adapter_files import CONFIGS, networks, pipeline, random_file, with_peft
from cases import sample
from safetensors.torch import load_file, save_file

from sdxl_ref.adapters import kinds, lora
from sdxl_ref.adapters.active import Adapters
from sdxl_ref.adapters.reading import adapter_file, embeddings_in, read
from sdxl_ref.config import InputError


def test_kinds_beyond_the_usual_factors_are_imported_when_a_file_has_them(tmp_path: Path) -> None:
    plain = random_file(peers.SMALL_REFINER, tmp_path / "plain.safetensors")
    save_file({"lora_unet_out_2.diff_b": torch.ones(4)}, tmp_path / "full.safetensors")
    code = "import sys; from sdxl_ref.adapters.reading import read; [read(path) for path in sys.argv[1:]]; "
    code += "print('sdxl_ref.adapters.kinds' in sys.modules)"
    for files, expected in (([plain], "False"), ([plain, tmp_path / "full.safetensors"], "True")):
        command = [sys.executable, "-c", code, *map(str, files)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_the_folder_is_the_list_of_kinds() -> None:
    files = {path.stem for path in Path(kinds.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {type(kind).__module__.rpartition(".")[2] for kind in kinds.KINDS}
    assert [kind.wraps for kind in kinds.KINDS] == sorted(kind.wraps for kind in kinds.KINDS)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "mine.safetensors"])
def test_a_folder_is_the_adapter_in_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = random_file(peers.SMALL_REFINER, tmp_path / "folder" / name)
    assert adapter_file(tmp_path / "folder") == file == adapter_file(file)
    assert read(tmp_path / "folder").keys() == read(file).keys()


def test_the_known_name_counts_in_a_folder_with_several(tmp_path: Path) -> None:
    random_file(peers.SMALL_REFINER, tmp_path / "other.safetensors")
    assert adapter_file(tmp_path).name == "other.safetensors"
    random_file(peers.SMALL_REFINER, tmp_path / "another.safetensors")
    with pytest.raises(InputError, match=r"expected one adapter's .* found another.safetensors, other.safetensors: "):
        read(tmp_path)
    random_file(peers.SMALL_REFINER, tmp_path / "adapter_model.safetensors")
    assert adapter_file(tmp_path).name == "adapter_model.safetensors"
    random_file(peers.SMALL_REFINER, tmp_path / "pytorch_lora_weights.safetensors")  # which diffusers prefers
    with pytest.raises(InputError, match=r"found adapter_model.safetensors, pytorch_lora_weights.safetensors: name"):
        read(tmp_path)


def test_a_configuration_that_cannot_be_read_is_not_ignored(tmp_path: Path) -> None:
    random_file(peers.SMALL_REFINER, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").symlink_to("/nowhere/x.json")
    with pytest.raises(InputError, match=r"could not read .*adapter_config.json"):
        read(tmp_path)


def test_an_alpha_of_several_numbers(tmp_path: Path) -> None:
    file = random_file(peers.SMALL_REFINER, tmp_path / "a.safetensors")
    state = load_file(file)
    layer = next(iter(read(file)))
    save_file(state | {f"{layer}.alpha": torch.ones(3)}, file)
    with pytest.raises(InputError, match=f"layer {layer} has an alpha of 3 numbers, expected one"):
        read(file)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder: expected one adapter's safetensors file in it, found none"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="found pickles alone, which are not opened: get the safetensors file"):
        read(tmp_path)


@pytest.mark.parametrize("wraps", [False, True], ids=["the unet", "a trainer's module around it"])
def test_what_peft_saves_of_a_unet(wraps: bool, tmp_path: Path) -> None:
    """Names without a part are the UNet's; alpha is in the configuration beside the file."""
    from peft import LoraConfig, get_peft_model

    class Trainer(torch.nn.Module):
        def __init__(self, unet: torch.nn.Module) -> None:
            super().__init__()
            self.unet = unet

    peer = peers.diffusers_unet(networks(peers.SMALL_BASE)["unet"])  # type: ignore[arg-type]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False)
    get_peft_model(Trainer(peer) if wraps else peer, config).save_pretrained(tmp_path)
    adapter = lora.load(tmp_path, peers.SMALL_BASE)
    assert adapter.is_whole
    assert {place.part for place in adapter.layers} == {"unet"}
    assert {factors.alpha / factors.rank for factors in adapter.layers.values()} == {4.0}  # type: ignore[attr-defined]


def test_what_diffusers_saves_of_a_unet_alone(tmp_path: Path) -> None:
    from peft import LoraConfig

    peer = peers.diffusers_unet(networks(peers.SMALL_BASE)["unet"])  # type: ignore[arg-type]
    peer.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False))
    peer.save_lora_adapter(tmp_path)
    adapter = lora.load(tmp_path, peers.SMALL_BASE)
    assert adapter.is_whole
    assert {factors.alpha / factors.rank for factors in adapter.layers.values()} == {4.0}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["bundle_emb.ohwx.string_to_param.*"], ["ohwx"]),
        (["bundle_emb.ohwx.clip_l", "bundle_emb.ohwx.clip_g", "bundle_emb.a.b.clip_g"], ["a.b", "ohwx"]),
    ],
)
def test_embeddings_in_a_file_are_listed_and_the_rest_is_loaded(
    keys: list[str], names: list[str], tmp_path: Path
) -> None:
    state = load_file(random_file(peers.SMALL_BASE, tmp_path / "x.safetensors"))
    without = lora.load(tmp_path / "x.safetensors", peers.SMALL_BASE)
    save_file(state | {key: torch.ones(2, 8) for key in keys}, tmp_path / "y.safetensors")
    assert embeddings_in(tmp_path / "y.safetensors") == names
    adapter = lora.load(tmp_path / "y.safetensors", peers.SMALL_BASE)
    assert adapter.layers.keys() == without.layers.keys()
    assert str(adapter) == f"{without}; {len(names)} embeddings, which are not loaded: {', '.join(names)}"
    with pytest.warns(UserWarning, match="embeddings, which are not loaded: "):
        Adapters(pipeline(peers.SMALL_BASE)).load(tmp_path / "y.safetensors")


LAYER = "lora_unet_middle_block_1_proj_in"


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({f"{LAYER}.oft_blocks": (4, 8, 8), f"{LAYER}.alpha": ()}, "OFT"),
        ({f"{LAYER}.oft_blocks": (2, 4, 8, 8), f"{LAYER}.rescale": (8, 1)}, "BOFT"),
        ({f"{LAYER}.oft_diag": (4, 8, 8)}, "OFT"),
        ({f"{LAYER}.a1.weight": (4, 8), f"{LAYER}.b2.weight": (4, 8), f"{LAYER}.alpha": ()}, "GLoRA"),
        ({f"{LAYER}.weight": (8,), f"{LAYER}.on_input": ()}, "IA3"),
        ({"base_model.model.mid_block.attentions.0.proj_in.ia3_l": (8, 1)}, "IA3"),
        ({"base_model.model.conv_in.oft_R.weight": (4, 8)}, "OFT"),
        ({"base_model.model.conv_in.boft_R": (4, 8, 8), "base_model.model.conv_in.boft_s": (4, 1)}, "BOFT"),
        ({f"{LAYER}.q_layer.weight": (2, 8), f"{LAYER}.lambda_layer": (1, 2)}, "T-LoRA"),
        ({"base_model.model.conv_in.vera_lambda_b": (4,)}, "VeRA"),
        ({"text_encoder.embeddings.token_embedding.lora_embedding_A": (2, 8)}, "LoRA on an embedding"),
        ({"unet.conv_in.lora_B.bias": (8,)}, "LoRA with biases of its own"),
    ],
    ids=str,
)
def test_what_is_not_done_here_is_refused_by_its_name(
    keys: dict[str, tuple[int, ...]], kind: str, tmp_path: Path
) -> None:
    save_file({key: torch.ones(shape) for key, shape in keys.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"it is {kind}.*, which is not done here: expected LoRA, .* found "):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("algo", sample(["diag-oft", "boft", "glora", "ia3", "tlora"], "boft", "ia3"))
def test_lycoris_other_kinds_are_refused_by_name(algo: str, tmp_path: Path) -> None:
    from lycoris_files import with_lycoris

    peer = peers.transformers_clip(networks(peers.SMALL_BASE)["text_encoder"])  # type: ignore[arg-type]
    net = with_lycoris(peer, "lora_te1", algo)
    state = {key: tensor.detach().clone().contiguous() for key, tensor in net.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    names = {"diag-oft": "OFT", "boft": "BOFT", "glora": "GLoRA", "ia3": "IA3", "tlora": "T-LoRA"}
    with pytest.raises(InputError, match=f"it is {names[algo]}"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["OFTConfig", "BOFTConfig", "IA3Config"])
def test_pefts_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    import peft

    peer = peers.transformers_clip(networks(peers.SMALL_BASE)["text_encoder"])  # type: ignore[arg-type]
    options = {"OFTConfig": {"r": 0, "oft_block_size": 8}, "BOFTConfig": {"boft_block_size": 8}}.get(kind, {})
    if kind == "IA3Config":
        options = {"feedforward_modules": []}
    config = getattr(peft, kind)(target_modules=["fc1"], **options)
    peft.get_peft_model(peer, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=kind.removesuffix("Config")):
        read(tmp_path)


def test_a_layer_with_pefts_own_adapter_name_and_alpha(tmp_path: Path) -> None:
    layer = "unet.conv_in"
    state = {f"{layer}.lora_A.default.weight": torch.ones(2, 4, 3, 3), f"{layer}.alpha": torch.tensor(torch.inf)}
    state[f"{layer}.lora_B.default.weight"] = torch.ones(32, 2, 1, 1)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"layer unet.conv_in has alpha inf, expected a finite number"):
        read(tmp_path / "x.safetensors")


def test_every_kind_of_model_has_lone_names(tmp_path: Path) -> None:
    """The names of a lone UNet are found in both models."""
    for config in CONFIGS.values():
        peer = with_peft(peers.diffusers_unet(networks(config)["unet"]), ["to_q", "conv1"])  # type: ignore[arg-type]
        from peft import get_peft_model_state_dict

        save_file(
            {key: tensor.clone() for key, tensor in get_peft_model_state_dict(peer).items()}, tmp_path / "x.safetensors"
        )
        adapter = lora.load(tmp_path / "x.safetensors", config)
        assert adapter.is_whole
        assert {place.part for place in adapter.layers} == {"unet"}
