"""A picture at an http(s) address: fetched whole, within bounds of bytes and time."""

import io
import threading
import urllib.request
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late

from sdxl_ref.config import InputError

MOST_BYTES = 256 << 20
SECONDS = 60.0  # for all of it, from the name server to the last byte


def fetch(address: str) -> io.BytesIO:
    """What the address answers. InputError beyond the bounds or where it is cut short; else urllib's errors.

    A thread of its own reads it: a socket's timeout starts anew with every byte. It dies with the process.
    """
    answer: Future[bytes] = Future()

    def work() -> None:
        try:
            answer.set_result(read(address))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return io.BytesIO(answer.result(SECONDS))
    except Late as error:
        raise InputError(f"no whole answer within {SECONDS:g} s: download it, and give the file") from error


def read(address: str) -> bytes:
    """The whole answer. InputError where it is longer than the bound, or shorter than it says itself."""
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        data: bytes = answer.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise InputError(f"the answer has more than {MOST_BYTES >> 20} MiB: download it, and give the file")
        if answer.length:
            raise InputError(f"the answer was cut short: {answer.length} bytes are missing")
    return data
