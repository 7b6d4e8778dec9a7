"""The page of a batch: every picture small, with the options that are its own, as one file of HTML beside them."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_ref.weights.saving import replacing

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 90rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; content-visibility: auto; contain-intrinsic-size: 11rem 15rem; }
img { width: 100%; height: auto; }
figcaption, li { font-size: 13px; overflow-wrap: anywhere; }
"""
HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
    "<body><h1>{title}</h1>\n"
)


def write(
    path: Path, jobs: Iterable[tuple[Sequence[str], Mapping[str, Any]]], count: int, failures: Sequence[str]
) -> None:
    """Of each finished job its pictures and its options, in this order; what failed comes first."""
    title = f"{count} job{'' if count == 1 else 's'}"
    with replacing(path) as beside, beside.open("w", encoding="utf-8", errors="replace") as file:
        file.write(HEAD.format(title=title, style=STYLE))
        if failures:
            lines = "".join(f"<li>{html.escape(failure)}</li>\n" for failure in failures)
            file.write(f"<h2>Not done: {len(failures)}</h2><ul>\n{lines}</ul>\n")
        file.write("<main>\n")
        for pictures, options in jobs:
            for name in pictures:
                file.write(figure(name, options))
        file.write("</main></body></html>\n")


def figure(name: str, options: Mapping[str, Any]) -> str:
    """A picture that is loaded when it comes into view, and its options."""
    prompt = html.escape(str(options.get("prompt", name)), quote=True)
    settings = ", ".join(f"{key} {shown(value)}" for key, value in options.items() if key != "prompt")
    caption = f"<b>{prompt}</b><br>{html.escape(settings)}" if "prompt" in options else html.escape(settings)
    source = html.escape(name, quote=True)
    return (
        f'<figure><a href="{source}"><img src="{source}" alt="{prompt}" loading="lazy"></a>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
