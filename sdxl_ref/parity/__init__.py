"""The parity lab: where another implementation starts to differ, and what explains it."""

from sdxl_ref.parity.compare import compare
from sdxl_ref.parity.pipelines import replay
from sdxl_ref.parity.recording import record

__all__ = ["compare", "record", "replay"]
