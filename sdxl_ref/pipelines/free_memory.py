"""How much memory this process may still take: of the machine, of its container, or of a GPU."""

from pathlib import Path

import torch

ROOT = Path("/")
FILES = {  # limit, usage, and the lines of the statistics that are files' and can be dropped
    "sys/fs/cgroup/{path}": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "sys/fs/cgroup/memory/{path}": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def free_memory(device: str = "cpu", root: Path = ROOT) -> int | None:
    """Bytes that can be had without a swap or a kill; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    if torch.device(device).type != "cpu":
        return None
    amounts = [amount for amount in (of_machine(root), *of_groups(root)) if amount is not None]
    return min(amounts, default=None)


def of_machine(root: Path) -> int | None:
    """Linux's own estimate, MemAvailable."""
    for line in lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def of_groups(root: Path) -> list[int | None]:
    """Of the control groups, versions 2 and 1, that this process is in, and of the root that a container sees."""
    paths = {line.rsplit(":", 1)[1].strip("/") for line in lines(root / "proc/self/cgroup")} | {""}
    return [of_group(root / folder.format(path=path), *names) for folder, names in FILES.items() for path in paths]


def of_group(folder: Path, limit: str, usage: str, droppable: tuple[str, ...]) -> int | None:
    most, used = lines(folder / limit), lines(folder / usage)
    if not most or not used or not most[0].isdigit():  # "max"
        return None
    statistics = [line.split() for line in lines(folder / "memory.stat")]
    dropped = sum(int(value) for name, value in statistics if name in droppable)
    return max(0, int(most[0]) - int(used[0]) + dropped)


def lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
