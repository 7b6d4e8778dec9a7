"""The call of every pipeline: its arguments, its help, its progress, its callback, its watermark."""

import inspect
import io
import json
import pydoc
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np
import pairs
import pytest
import torch
from cases import sample
from pairs import seeded
from torch import Tensor

from sdxl_ref import SAMPLERS
from sdxl_ref.config import SDXL, InputError
from sdxl_ref.diffusion.steps import Step
from sdxl_ref.pictures.images import from_tensor
from sdxl_ref.pictures.watermark import embed
from sdxl_ref.pipelines.first_noise import first_noise
from sdxl_ref.pipelines.request import SAMPLER_OPTIONS, Request

PIPES = {"base": pairs.base, "refiner": pairs.refiner, "ensemble": pairs.ensemble}
pipes = pytest.mark.parametrize("kind", PIPES)


def arguments(kind: str, **changes: Any) -> dict[str, Any]:
    """A short run of any pipeline, to a picture that is wider than high."""
    usual: dict[str, Any] = {"prompt": "a cup", "num_inference_steps": 6, "output_type": "latent"}
    if kind == "refiner":
        usual |= {"image": torch.zeros(1, 4, 8, 9), "strength": 0.5}
    else:
        usual |= {"height": 64, "width": 72}
    return usual | changes


# --- the arguments ------------------------------------------------------------------------------------------------


@pipes
def test_the_signature_of_the_call_has_every_field_of_the_request_with_its_default(kind: str) -> None:
    pipe = PIPES[kind]()
    parameters = inspect.signature(type(pipe).__call__).parameters
    itself, prompt, *others = parameters
    assert (itself, prompt) == ("self", "prompt")
    own = {field.name: field for field in fields(pipe.request_type) if field.name != "prompt"}
    calls = ["callback_on_step_end", "callback_on_step_end_tensor_inputs", "watermark", "return_dict"]
    assert others == [*own, *calls]
    for name, field in own.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == field.default
        assert field.default is not MISSING


@pipes
def test_help_tells_the_meaning_and_the_default_of_every_argument(kind: str) -> None:
    pipe = PIPES[kind]()
    shown = pydoc.render_doc(pipe, renderer=pydoc.plaintext)
    assert f"class {type(pipe).__name__}" in shown
    for field in fields(pipe.request_type):
        if field.name != "prompt":
            assert f"{field.name} = {field.default!r}: {field.metadata['meaning']}" in shown
            assert field.metadata["meaning"]


@pytest.mark.parametrize(
    ("word", "near"),
    [("num_inference_step", "num_inference_steps"), ("negativ_prompt", "negative_prompt"), ("watermrk", "watermark")],
)
@pipes
def test_a_misspelt_argument_is_answered_with_the_nearest(kind: str, word: str, near: str) -> None:
    pipe = PIPES[kind]()
    message = f"{type(pipe).__name__}: unknown argument '{word}': did you mean '{near}'"
    with pytest.raises(TypeError, match=message):
        pipe(**arguments(kind), **{word: 1})


def test_arguments_of_another_start_are_refused() -> None:
    for name, value in {"strength": 0.5, "denoising_start": 0.5, "mask_image": torch.zeros(64, 64)}.items():
        with pytest.raises(InputError, match=f"{name} is of no use without an image: give one, or leave it out"):
            pairs.base()("a cup", **{name: value})
    for name in ("height", "width"):
        with pytest.raises(InputError, match="height and width are those of noise"):
            pairs.refiner()("a cup", image=pairs.picture(), **{name: 64})


def test_arguments_of_the_ensemble_are_unknown_to_one_model() -> None:
    with pytest.raises(TypeError, match="TextToImagePipeline: unknown argument 'switch'"):
        pairs.base()("a cup", switch=0.5)


def test_the_prompt_alone_may_stand_without_its_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        pairs.base()("a cup", "blurry")


@pytest.mark.parametrize("name", ["guidance_scale", "aesthetic_score"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be a finite number, found {value}"):
        Request(prompt="", **{name: value})


def test_churn_without_an_amount_is_no_option() -> None:
    """Its limits and its noise would change nothing."""
    for name in ("s_noise", "s_tmin", "s_tmax"):
        with pytest.raises(InputError, match=f"{name} is of no use without s_churn"):
            Request(prompt="", sampler="euler", **{name: 1.0})
        with pytest.raises(InputError, match=f"{name} is of no use without s_churn"):
            Request(prompt="", **{name: 1.0}).completed(SDXL)
        Request(prompt="", s_churn=1.0, **{name: 1.0}).completed(SDXL)
    with pytest.raises(InputError, match="s_tmax must be a number from 0 to a million, found nan"):
        Request(prompt="", s_churn=1.0, s_tmax=float("nan"))
    Request(prompt="", s_churn=1.0, s_tmax=float("inf"))


WRONG_KINDS = [
    ("prompt", None),
    ("prompt", [1]),
    ("prompt", b"a cup"),
    ("prompt", []),
    ("negative_prompt", []),
    ("num_images_per_prompt", 1.5),
    ("num_inference_steps", "50"),
    ("original_size", 64),
    ("original_size", (1, 2, 3)),
    ("target_size", (64.0, 64.0)),
    ("negative_crops_coords_top_left", (-1, 0)),
]


@pytest.mark.parametrize(("name", "value"), WRONG_KINDS)
def test_a_wrong_kind_of_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} must be"):
        Request(**{"prompt": "", name: value})


CHANGES = [{"latent": torch.zeros(1, 4, 8, 8)}, {"latents": None}, {"latents": torch.zeros(1, 1, 8, 8)}, torch.zeros(1)]
CHANGES += [{"latents": torch.zeros(1, 4, 8, 8, dtype=dtype)} for dtype in (torch.complex64, torch.int64)]


@pytest.mark.parametrize("changes", CHANGES, ids=["misspelt", "none", "broadcast", "bare", "complex", "whole numbers"])
def test_what_a_callback_returns_is_checked(changes: Any) -> None:
    request = {"height": 64, "width": 64, "num_inference_steps": 4}
    with pytest.raises(InputError, match="callback_on_step_end to return"):
        pairs.base()("a cup", callback_on_step_end=lambda *_: changes, **request)


@pytest.mark.parametrize("name", ["eta", "s_noise", "s_churn", "s_tmin"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_amounts_of_a_sampler_are_finite_and_not_below_0(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be a number from 0 to a million, found {value}"):
        Request(prompt="", sampler="euler", **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_guidance_rescale_is_a_share(value: float) -> None:
    with pytest.raises(InputError, match=f"guidance_rescale must be from 0 to 1, found {value}"):
        Request(prompt="", guidance_rescale=value)


# --- a run --------------------------------------------------------------------------------------------------------


@pipes
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_run_drains_the_request_that_the_call_makes(kind: str, output_type: str) -> None:
    pipe = PIPES[kind]()
    called = pipe(**arguments(kind, output_type=output_type, generator=seeded(0))).images
    request = pipe.request(**arguments(kind, output_type=output_type, generator=seeded(0)))
    assert isinstance(request, pipe.request_type)
    assert torch.equal(called, pipe.run(request))


@pipes
def test_the_result_is_packed_as_the_output_type_says(kind: str) -> None:
    pipe = PIPES[kind]()
    results = {
        output_type: pipe(**arguments(kind, output_type=output_type, generator=seeded(0))).images
        for output_type in ("pil", "np", "pt", "latent")
    }
    tensor = results["pt"]
    assert tensor.shape == (1, 3, 64, 72)
    assert 0 <= float(tensor.min()) < float(tensor.max()) <= 1
    assert torch.equal(pipe.decode(results["latent"]), tensor)
    assert np.array_equal(results["np"], tensor.permute(0, 2, 3, 1).numpy())
    [picture] = results["pil"]
    assert picture.size == (72, 64)
    assert np.array_equal(np.asarray(picture), np.asarray(from_tensor(tensor)[0]))


@pipes
def test_steps_yields_the_levels_of_the_plan_and_returns_the_picture(kind: str) -> None:
    pipe = PIPES[kind]()
    request = pipe.request(**arguments(kind, output_type="pt", generator=seeded(0)))
    returned = []

    def drained() -> Iterator[Step]:
        returned.append((yield from pipe.steps(request)))

    *others, last = drained()
    levels = [float(step.sigma) for step in (*others, last)]
    assert levels == pipe.plan(request).grid.sigmas.tolist()[1:]
    assert torch.equal(returned[0], pipe.decode(last.x))


@pipes
def test_a_callback_sees_every_step(kind: str) -> None:
    pipe = PIPES[kind]()
    seen = []

    def watch(pipeline: Any, i: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        assert pipeline is pipe
        seen.append((i, timestep, tuple(tensors["latents"].shape)))

    pipe(**arguments(kind), callback_on_step_end=watch)
    timesteps = pipe.plan(pipe.request(**arguments(kind))).grid.timesteps
    assert seen == [(i, timestep, (1, 4, 8, 9)) for i, timestep in enumerate(timesteps)]


@pytest.mark.parametrize("kind", sample(PIPES, "base"))
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_a_callback_ends_the_run(kind: str, output_type: str) -> None:
    pipe = PIPES[kind]()
    states = []

    def stop(pipeline: Any, i: int, _: float, tensors: dict[str, Tensor]) -> None:
        states.append(tensors["latents"].clone())
        pipeline._interrupt = i == 1

    result = pipe(**arguments(kind, output_type=output_type), callback_on_step_end=stop).images
    assert len(states) == 2
    assert torch.equal(result, states[1] if output_type == "latent" else pipe.decode(states[1]))
    states.clear()
    pipe(**arguments(kind), callback_on_step_end=lambda *_: states.append(torch.zeros(1)))
    assert len(states) > 2  # the next run is a whole one


def test_an_interrupted_picture_says_so() -> None:
    def stop(pipeline: Any, *_: Any) -> None:
        pipeline._interrupt = True

    [picture] = pairs.base()(**arguments("base", output_type="pil"), callback_on_step_end=stop).images
    assert json.loads(picture.info["sdxl_ref"])["interrupted"] is True


def test_what_a_callback_may_be_handed() -> None:
    seen: list[Any] = []
    watch = lambda *given: seen.append(given[3])  # noqa: E731
    pairs.base()(**arguments("base"), callback_on_step_end=watch, callback_on_step_end_tensor_inputs=[])
    assert seen[0] == {}
    with pytest.raises(InputError, match=r'only "latents" are to be had, found .\'latents\', \'prompt_embeds\''):
        pairs.base()(
            **arguments("base"),
            callback_on_step_end=watch,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )


def test_a_plain_tuple() -> None:
    output = pairs.base()(**arguments("base", generator=seeded(0)))
    plain = pairs.base()(**arguments("base", generator=seeded(0)), return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == 1
    assert torch.equal(plain[0], output.images)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc"])
def test_a_run_goes_on_from_the_latents_that_a_callback_returns(sampler: str) -> None:
    pipe = pairs.base()
    inputs = []

    def wrap(denoise: Any) -> Any:
        def recorded(x: Tensor, sigma: Tensor) -> Tensor:
            inputs.append(x.clone())
            return denoise(x, sigma)

        return recorded

    def steer(pipeline: Any, i: int, sigma: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.full_like(tensors["latents"], 2.0)} if i == 2 else tensors

    pipe.wrap_denoiser = wrap
    pipe(**arguments("base", sampler=sampler), callback_on_step_end=steer)
    assert torch.equal(inputs[3], torch.full_like(inputs[3], 2.0))


# --- the sampler's options ----------------------------------------------------------------------------------------

HONOURED = [
    ("ddim", {"eta": 0.5}),
    ("euler_ancestral", {"eta": 0.5, "s_noise": 0.9}),
    ("dpmpp_2m_sde", {"s_noise": 0.9}),
    ("euler", {"s_churn": 3.0}),
    ("euler", {"s_churn": 3.0, "s_tmin": 1.0, "s_tmax": 5.0, "s_noise": 1.1}),
    ("heun", {"s_churn": 3.0}),
]


@pytest.mark.parametrize(("sampler", "options"), HONOURED, ids=str)
def test_options_go_to_the_sampler(sampler: str, options: dict[str, float]) -> None:
    """The run is the sampler's, called by hand with them; without them it is another one."""
    pipe = pairs.base()
    seen = []
    pipe.wrap_denoiser = lambda denoise: seen.append(denoise) or denoise
    found = pipe(**arguments("base", sampler=sampler, generator=seeded(0)), **options).images

    request = Request(**arguments("base", sampler=sampler, generator=seeded(0)))
    grid = pipe.plan(request).grid
    x, generator = first_noise(pipe, request, grid)
    with torch.no_grad():
        *_, last = SAMPLERS[sampler](seen[0], x, grid.sigmas, generator=generator, **options)
    assert torch.equal(found, last.x)
    plain = pipe(**arguments("base", sampler=sampler, generator=seeded(0))).images
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("option", SAMPLER_OPTIONS)
def test_an_option_of_no_use_to_the_sampler_is_refused_by_name(sampler: str, option: str) -> None:
    usable = inspect.signature(SAMPLERS[sampler]).parameters
    if option in usable:
        options = {option: 0.5} | ({"s_churn": 0.5} if "s_churn" in usable else {})
        assert Request(prompt="", sampler=sampler, **options).sampler_options() == options
    else:
        with pytest.raises(InputError, match=f"{option} is of no use to the sampler {sampler}: leave it out"):
            Request(prompt="", sampler=sampler, **{option: 0.5})


# --- the progress bar ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "steps"), [("base", 6), ("refiner", 3), ("ensemble", 6)])
def test_a_bar_on_a_terminal_counts_the_steps_that_run(kind: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    PIPES[kind]()(**arguments(kind))
    shown = terminal.getvalue()
    assert f"{steps}/{steps}" in shown
    assert "step" in shown


def test_a_bar_can_be_hidden_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    pipe = pairs.base()
    pipe.set_progress_bar_config(disable=True)
    pipe(**arguments("base"))
    assert terminal.getvalue() == ""
    pipe.set_progress_bar_config(disable=None, desc="painting")
    pipe(**arguments("base"))
    assert "painting" in terminal.getvalue()


def test_no_bar_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    pairs.base()(**arguments("base"))
    assert capsys.readouterr() == ("", "")


# --- the watermark ------------------------------------------------------------------------------------------------


def test_a_watermark_goes_into_the_pictures() -> None:
    call = arguments("base", height=256, width=256, num_inference_steps=4, output_type="pil")
    [plain] = pairs.base()(**call, generator=seeded(0)).images
    [marked] = pairs.base()(**call, generator=seeded(0), watermark=True).images
    assert np.array_equal(np.asarray(marked), np.asarray(embed(plain)))
    assert not np.array_equal(np.asarray(marked), np.asarray(plain))


def test_a_watermark_is_found_out_to_be_impossible_before_the_run_or_at_its_first_step() -> None:
    with pytest.raises(InputError, match='goes into output_type "pil" only'):
        pairs.base()(**arguments("base", output_type="pt"), watermark=True)
    called: list[int] = []
    with pytest.raises(InputError, match="256x256"):
        pairs.base()(
            **arguments("base", output_type="pil"),
            watermark=True,
            callback_on_step_end=lambda _, i, *__: called.append(i),
        )
    assert called == []


# --- equality -----------------------------------------------------------------------------------------------------


@pipes
def test_requests_and_plans_that_hold_tensors_are_equal_to_themselves_alone(kind: str) -> None:
    pipe = PIPES[kind]()
    request = pipe.request(**arguments(kind, guidance_scale=torch.ones(1)))
    other = replace(request)
    plan = pipe.plan(request)
    for same, unlike in ((request, other), (plan, pipe.plan(other)), (plan.grid, pipe.plan(other).grid)):
        assert same == same
        assert same != unlike
        assert {same: 1, unlike: 2}[same] == 1


# --- many pictures ------------------------------------------------------------------------------------------------

MANY = {
    "pictures": {"num_images_per_prompt": 100_000},
    "prompts": {"prompt": ["a"] * 100_000},
    "product": {"prompt": ["a"] * 1000, "num_images_per_prompt": 2},
    "embeds": {"prompt": None, "prompt_embeds": torch.zeros(1001, 77, 1)},
}


@pipes
@pytest.mark.parametrize("what", MANY)
def test_a_call_makes_at_most_1000_pictures(what: str, kind: str) -> None:
    with pytest.raises(InputError, match="prompts: expected 1 to 1000 pictures in all"):
        PIPES[kind]().request(**arguments(kind, **MANY[what]))


@pytest.mark.parametrize("image", [[torch.zeros(3, 8, 8)] * 100_000, torch.zeros(1001, 4, 8, 8)], ids=["list", "batch"])
def test_a_call_takes_at_most_1000_pictures(image: Any) -> None:
    with pytest.raises(InputError, match="expected at most 1000 pictures at once, found "):
        pairs.refiner()(**arguments("refiner", image=image))
