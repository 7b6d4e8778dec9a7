"""Names of schedules as other tools write them are answered with the spacing or the option that there is here."""

import pytest

from sdxl_ref.config import InputError
from sdxl_ref.diffusion.schedule import SPACINGS, NoiseSchedule


def refusal(spacing: object) -> str:
    with pytest.raises(InputError) as caught:
        NoiseSchedule().grid(20, spacing)
    return str(caught.value)


@pytest.mark.parametrize("name", ["karras", "Karras"])
def test_karras_is_an_option_of_its_own(name: str) -> None:
    """Between the ends of the whole training range there: linspace's here, as of a sampler's name with Karras."""
    assert refusal(name) == (
        f'{name!r} is no spacing here: write --karras --spacing linspace, in Python karras=True, spacing="linspace"'
    )
    NoiseSchedule().grid(20, "linspace", karras=True)


@pytest.mark.parametrize("name", ["sgm_uniform", "SGM Uniform"])
def test_sgm_uniform_is_sgm(name: str) -> None:
    assert refusal(name) == (f'the spacing {name!r} is called sgm here: write --spacing sgm, in Python spacing="sgm"')
    NoiseSchedule().grid(20, "sgm")


@pytest.mark.parametrize("name", ["exponential", "simple", "normal", "beta", "ddim_uniform", "", None, 5])
def test_a_schedule_that_there_is_not_is_unknown(name: object) -> None:
    assert refusal(name).startswith(f"unknown spacing {name!r}")
    assert f"expected one of {', '.join(SPACINGS)}" in refusal(name)
