"""What memory is free: the least of what the machine, and the groups that a process is in, leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_ref.pipelines.free_memory import free_memory

MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_of_the_machine(tmp_path: Path) -> None:
    assert free_memory(root=system(tmp_path, {"proc/meminfo": MEMINFO})) == 8000 * 1024


def test_systems_that_do_not_say(tmp_path: Path) -> None:
    assert free_memory(root=tmp_path) is None
    assert free_memory("mps", root=system(tmp_path, {"proc/meminfo": MEMINFO})) is None


@pytest.mark.parametrize("group", ["0::/\n", "0::/jobs/one\n"])
def test_of_a_group(group: str, tmp_path: Path) -> None:
    """Files that were read count as free: they are dropped before anything is killed."""
    folder = f"sys/fs/cgroup/{group.split(':')[2].strip().strip('/')}".rstrip("/")
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": group,
        f"{folder}/memory.max": "5000000\n",
        f"{folder}/memory.current": "3000000\n",
        f"{folder}/memory.stat": "anon 1000\nactive_file 200000\ninactive_file 300000\n",
    }
    assert free_memory(root=system(tmp_path, files)) == 2_500_000


def test_of_a_group_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:memory:/jobs\n",
        "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": "5000000\n",
        "sys/fs/cgroup/memory/jobs/memory.usage_in_bytes": "3000000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000000\n",
    }
    assert free_memory(root=system(tmp_path, files)) == 2_000_000


def test_a_group_without_a_limit_leaves_what_the_machine_has(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "3000\n"}
    assert free_memory(root=system(tmp_path, files)) == 8000 * 1024
