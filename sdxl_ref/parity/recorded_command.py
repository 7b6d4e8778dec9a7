"""`sdxl-ref parity record … refine …`: a command as it stands, with its pipeline watched."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdxl_ref.parity.recording import Recorder, machine, models_of, written
from sdxl_ref.parity.trace import Trace
from sdxl_ref.parity.watching import replaced, watched
from sdxl_ref.pipelines.calling import CallablePipeline


def recorded(command: Any, arguments: argparse.Namespace, path: Path, points: list[str], sketch: bool) -> Trace:
    """Run a command's module, and write the trace of the first pipeline that works."""
    recorder = Recorder(points, lambda key, tensor: sketch)
    usual = CallablePipeline.run
    with ExitStack() as stack:

        def run(self: Any, *args: Any, **options: Any) -> Any:
            if not recorder.trace.settings:  # until the command ends: it decodes by itself
                recorder.trace.settings |= machine() | models_of(self) | {"command": arguments.command}
                stack.enter_context(watched(self, recorder))
            return usual(self, *args, **options)

        with written(recorder.trace, path), replaced(CallablePipeline, "run", run):
            command.run(arguments)
    return recorder.trace
