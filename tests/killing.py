"""Processes that are killed at a chosen moment, as the system kills: nothing of theirs is cleaned up."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable

import torch

CHANGES = ("open", "os.chmod", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym", "shutil.rmtree")


def forked(work: Callable[[], object]) -> int:
    """A child process that does work and ends with the status that this returns, 0 for None; its number."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the others did not come along
            os._exit(int(work() or 0))  # type: ignore[call-overload]
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def signal_of(work: Callable[[], object], prepare: Callable[[], object]) -> int:
    """Do work in a child process, where `prepare` may have set a trap; the signal that killed it, 0 where none did."""

    def prepared() -> None:
        prepare()
        work()

    _, status = os.waitpid(forked(prepared), 0)
    code = os.waitstatus_to_exitcode(status)
    assert code <= 0, "the work failed before it was killed"
    return -code


def killed_before(work: Callable[[], object], call: int, name: str = "") -> bool:
    """Whether work was killed before its n-th call that changes files (or before the n-th of this name), from 0 on.

    False where it ended before that. The names are those of Python's audit events; `ctypes.dlsym` precedes the
    exchange of two names.
    """
    names = (name,) if name else CHANGES
    seen = 0

    def watch(event: str, _: object) -> None:
        nonlocal seen
        if event in names:
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    return signal_of(work, lambda: sys.addaudithook(watch)) == signal.SIGKILL


def killed_at_size(work: Callable[[], object], size: int) -> bool:
    """Whether work was killed when a file of it would have become larger than so many bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it otherwise
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return signal_of(work, prepare) == signal.SIGXFSZ
