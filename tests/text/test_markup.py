"""Other tools' markup in a prompt is noted once, and plain words are not."""

import time
import warnings

import pytest

from sdxl_ref.text.markup import note_markup

MARKED = {
    "a (red cat:1.3) on a mat": "(red cat:1.3)",
    "a (cat: 0.5 ), rain": "(cat: 0.5 )",
    "(cat:1)": "(cat:1)",
    "(style2:1.2)": "(style2:1.2)",
    "(a:.5)": "(a:.5)",
    "((a cat:1.3))": "((a cat:1.3))",
    "a ((cat)) sleeps": "((cat))",
    "a (((cat))) sleeps": "((cat))",
    "a [[cat]] sleeps": "[[cat]]",
    "a {cat|dog} runs": "{cat|dog}",
    "a [cat|dog] runs": "[cat|dog]",
    "a cat AND a dog": "AND",
    "a AND b": "AND",
    "(a cat) AND\n(a dog)": "AND",
    "a cat, embedding:foo": "embedding:foo",
    "embedding:easy-negative.pt": "embedding:easy-negative.pt",
    "a cat <lora:style:0.8>": "<lora:style:0.8>",
    "<lora:style>": "<lora:style>",
    "<lyco:x:1> <hypernet:y:1>": "<lyco:x:1>",
    "<hypernet:y:1>": "<hypernet:y:1>",
    "a cat BREAK a dog": "BREAK",
    "a cat\nBREAK\na dog": "BREAK",
    "a [cat:dog:0.5] runs": "[cat:dog:0.5]",
    "[cat:10]": "[cat:10]",
    "[cat::12]": "[cat::12]",
    "[:cat:0.3]": "[:cat:0.3]",
}
PLAIN = [
    "",
    "a cat (grey) on a [red] mat",
    "a poster (16:9)",
    "a clock (at 10:30)",
    "portrait: a woman (smiling: yes)",
    "BREAKFAST at TIFFANY's, a break, Break",
    "a < b, c > d, <3",
    "a note [see: page 3]",
    "1.3:1 (wide)",
    "a sign: SALT AND PEPPER",
    "and AND",
    "a {red} cat | a dog",
    "an embedding: a vector",
    "a (small (grey) cat)",
    "(word:1.3",
    "word:1.3)",
]


@pytest.mark.parametrize(("prompt", "quoted"), MARKED.items())
def test_markup_is_quoted(prompt: str, quoted: str) -> None:
    with pytest.warns(UserWarning, match="in a prompt is read as words") as caught:
        note_markup(prompt)
    [warning] = caught
    assert str(warning.message).startswith(f"{quoted!r} in a prompt is read as words")
    for place in ("prompt_syntax=", "--prompt-syntax", "--lora FILE:SCALE", "load_lora_weights"):
        assert place in str(warning.message)


def test_a_piece_of_each_kind_is_quoted_in_one_note() -> None:
    prompt = "BREAK, a ((cat)), a (dog:1.2) AND {a|b} [x:y:0.5] embedding:foo <lora:style:1>"
    with pytest.warns(UserWarning, match="in a prompt are read as words") as caught:
        note_markup(prompt)
    [warning] = caught
    assert str(warning.message).startswith(
        "'BREAK', '((cat))', 'AND', '{a|b}', '[x:y:0.5]', 'embedding:foo', '<lora:style:1>' in a prompt are read as"
    )


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_words_are_not_noted(prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_markup(prompt)


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "(a:",
        "(a:1",
        "[:",
        "[a:1",
        "<lora:",
        "(:1.",
        "(a: ",
        "BREA",
        "1",
        ":",
        "((",
        "{",
        "{a",
        "|",
        "[[",
        "AND ",
        " AND",
        "embedding:",
    ],
)
def test_long_prompts_take_no_time(piece: str) -> None:
    prompt = piece * (100_000 // len(piece))
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note_markup(prompt)
        note_markup(f"({prompt}")
        note_markup(f"[:{prompt}")
    assert time.perf_counter() - began < 5
