"""What a hub may answer: names that stay in the cache, and bytes that come in time. Hooks on huggingface_hub's client.

huggingface_hub makes paths of the ETags and commit ids that it is told, and waits for an API's answer without a limit.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sdxl_ref.config import InputError

SILENCE = 10.0  # seconds that nothing may come
WINDOW = 60.0  # seconds
LEAST = 60 << 10  # bytes in such a time: a kilobyte a second
NAMING_HEADERS = ("ETag", "X-Linked-Etag", "X-Repo-Commit")
NAMING_FIELDS = ("sha", "oid", "sha256", "xetHash")  # of the API's answers


@contextmanager
def limits() -> Iterator[None]:
    """Limits on what huggingface_hub does meanwhile: InputError for a name that is a path, and for bytes that drip."""
    from huggingface_hub import get_session

    session: Any = get_session()
    hooks = session.event_hooks
    session.event_hooks = {
        "request": [*hooks.get("request", []), limit_silence],
        "response": [*hooks.get("response", []), limit_answer],
    }
    try:
        yield
    finally:
        session.event_hooks = hooks


def limit_silence(request: Any) -> None:
    """A time limit where a request has none."""
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {kind: given.get(kind) or SILENCE for kind in ("connect", "read", "write", "pool")}


def limit_answer(response: Any) -> None:
    """Check the names in an answer's headers, and in its body where that is the API's; watch the pace of the body."""
    for header in NAMING_HEADERS:
        check_name(header, response.headers.get(header, ""))
    response.iter_raw = in_time(response.iter_raw)
    if "/api/" in response.url.path and "json" in response.headers.get("Content-Type", ""):
        try:
            check_fields(json.loads(response.read()))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return  # huggingface_hub says so


def check_fields(answer: Any) -> None:
    """Check the names in an answer, as deep as it is."""
    inside = [answer]
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            for field in NAMING_FIELDS:
                check_name(field, value.get(field))
            inside += value.values()
        elif isinstance(value, list):
            inside += value


def check_name(kind: str, name: object) -> None:
    """InputError for what would be a path in the cache, and not a name."""
    plain = str(name).removeprefix("W/").strip('"')
    if plain in (".", "..") or set(plain) & set("/\\\0"):
        raise InputError(f"the hub answered with the {kind} {name!r:.60}, which is no name of a file: use another hub")


def in_time(read: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
    """The bytes of an answer as they come. InputError where too few come in a window of time."""

    def paced(*arguments: Any, **options: Any) -> Iterator[bytes]:
        begin = time.monotonic()
        count = 0
        for block in read(*arguments, **options):
            count += len(block)
            if count >= LEAST:
                begin = time.monotonic()
                count = 0
            elif time.monotonic() > begin + WINDOW:
                raise InputError(f"the hub sent {count} bytes in {WINDOW:g} seconds: try again later")
            yield block

    return paced
