"""The pieces of a batch through Ray Data, on one machine or a cluster: `--ray`. Loaded where it is asked for."""

import json
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from sdxl_ref.commands.worker import Job, Settings, Worker
from sdxl_ref.config import InputError


def done_on_ray(pieces: Sequence[Sequence[Job]], settings: Settings, address: str) -> Iterator[list[tuple[str, str]]]:
    """Do pieces by actors, each a `Worker` with its own models; yields of each piece its jobs, and what was wrong.

    `address` is that of a cluster, "auto" for the one that this machine belongs to, or "" for one of this machine's
    own. There are as many actors as have a GPU each, or the threads of a CPU. An actor that is lost is begun anew, and
    so is what it had; the record alone decides what is done. InputError where Ray is not installed or not reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--ray is Ray's part: pip install 'sdxl-ref[ray]'") from error
    check_address(address)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster was found at {address or 'this machine'}: {str(error).splitlines()[0]}"
        ) from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"piece": json.dumps(piece)} for piece in pieces]
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        most, wants = actors(ray.cluster_resources(), settings)
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
        options: dict[str, Any] = {"fn_constructor_args": (settings, None), "batch_size": 1, "compute": pool}
        for row in data.map_batches(Worker, **options, **wants).iter_rows():
            yield [(name, error) for name, error in json.loads(row["outcomes"])]
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """InputError where nobody listens at HOST:PORT: Ray itself would ask again for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"no Ray cluster was found at {address}: {error}") from error


def actors(cluster: dict[str, float], settings: Settings) -> tuple[int, dict[str, Any]]:
    """How many actors a cluster has room for, and what each wants of it."""
    gpus = int(cluster.get("GPU", 0))
    if gpus and settings.device in ("auto", "cuda"):
        return gpus, {"num_gpus": 1}
    return max(1, int(cluster.get("CPU", 1)) // settings.threads), {"num_cpus": settings.threads}
