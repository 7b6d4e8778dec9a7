"""The one error of bad input: a line that can be printed, whatever it quotes."""

import pytest

from sdxl_ref.config import InputError


@pytest.mark.parametrize("bad", ["\n", "\r\n", "\x00", "\x1b[31m", "\x7f", "\x9b", "\u2028", "\u2029", "\t"])
def test_a_message_is_one_line_without_control_characters(bad: str) -> None:
    text = str(InputError(f"expected a name, found a{bad}b"))
    assert len(text.splitlines()) == 1
    assert text.startswith("expected a name, found a")
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in text)


def test_a_message_keeps_the_letters_of_all_scripts() -> None:
    text = "no such picture: Bildschirmfoto\u202f12.00 日本語 🙂 \udcff.png"
    assert str(InputError(text)) == text


def test_a_long_message_is_cut_in_the_middle() -> None:
    text = str(InputError(f"expected {'x' * 100_000}: do this"))
    assert len(text) == 1500
    assert text.startswith("expected xxx")
    assert text.endswith("xxx: do this")
    assert str(InputError("y" * 1500)) == "y" * 1500
