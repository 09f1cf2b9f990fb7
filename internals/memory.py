"""How much memory this process may still take, within the limits of containers and schedulers."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path("/")
# by version of cgroups: the files of limit and usage, and the line of memory.stat that counts cached files,
# which the kernel gives back
CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> int:
    """Bytes of memory that this process may still take.

    The least of three: what the machine has free; what each control group above this process has left; and
    what Slurm granted the job on this node, less what this process holds already.

    Args:
        root: of the file system.
        environment: the environment variables.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = 1024 * _fields(meminfo)["MemAvailable"]
    held = 1024 * _fields(root / "proc/self/status").get("VmRSS", 0)
    granted = [limit - held for limit in _slurm_limits(environment)]
    return max(min([free, *_cgroup_headroom(root), *granted]), 0)


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file of lines such as "VmRSS:  12 kB" or "inactive_file 12"."""
    cells = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in cells if len(row) > 1 and row[1].isdecimal()}


def _text(file: Path) -> str:
    """What a file of the kernel says; nothing where it is not there, or not for us."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    """The number that a file holds; None where it says something else, such as "max"."""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _cgroup_headroom(root: Path) -> Iterator[int]:
    """Bytes that each control group from this process's own up to the root has left."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, top = (1, root / "sys/fs/cgroup/memory") if controllers else (2, root / "sys/fs/cgroup")
        limit, usage, cached = CGROUP_FILES[version]
        own = top / path.lstrip("/")
        # in a container the path may be that of the host: then its upper end is all there is
        for group in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                yield most - used + _fields(group / "memory.stat").get(cached, 0)


def _slurm_limits(environment: Mapping[str, str]) -> Iterator[int]:
    """What Slurm granted the job on this node, in bytes; 0 in its variables means all of the node's."""
    node, per_cpu, cpus = (
        int(environment.get(name, "0")) if environment.get(name, "0").isdecimal() else 0
        for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
    )
    if node:
        yield node * 2**20
    if per_cpu:
        yield per_cpu * max(cpus, 1) * 2**20
