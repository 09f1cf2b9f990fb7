"""memory.py: what a process may still take, where the kernel and schedulers say so."""

import os
from pathlib import Path

import pytest

from internals import memory

GB = 10**9


def machine(root: Path, held: int = 0, groups: str = "") -> Path:
    """A /proc of a machine with 100 GB free, and so many bytes held by this process."""
    files = {
        "meminfo": f"MemTotal:       999999999 kB\nMemAvailable:   {100 * GB // 1024} kB\n",
        "self/status": f"Name:\tpython3\nVmRSS:\t{held // 1024} kB\n",
        "self/cgroup": groups,
    }
    for name, text in files.items():
        (root / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "proc" / name).write_text(text)
    return root


def group(folder: Path, version: int, limit: int | str, used: int, cached: int = 0) -> None:
    """A control group's files; `cached` of what is used are files that the kernel would give back."""
    folder.mkdir(parents=True, exist_ok=True)
    word = "inactive_file" if version == 2 else "total_inactive_file"
    contents = [str(limit), str(used), f"anon 1\n{word} {cached}\n"]
    for name, text in zip([*memory.CGROUP_FILES[version][:2], "memory.stat"], contents, strict=True):
        (folder / name).write_text(f"{text}\n")


def test_it_is_of_this_machine():
    assert 0 < memory.available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("limited", ["job", "user", "top"])
def test_the_least_of_all_groups_on_the_way_up(tmp_path, limited):
    """Version 2: a batch system may set its limit on any of them."""
    machine(tmp_path, groups="0::/user/job\n")
    top = tmp_path / "sys/fs/cgroup"
    for name, folder in {"job": top / "user/job", "user": top / "user", "top": top}.items():
        group(folder, 2, 16 * GB if name == limited else "max", 6 * GB, cached=GB)
    assert memory.available(tmp_path, {}) == (16 - 6 + 1) * GB


def test_version_1(tmp_path):
    """Its limits are huge numbers where there are none; other controllers, and version 2, are passed over."""
    groups = "9:name=systemd:/\n4:memory:/slurm/uid_1/job_2\n2:cpu,cpuacct:/\n0::/\n"
    machine(tmp_path, groups=groups)
    top = tmp_path / "sys/fs/cgroup/memory"
    group(top, 1, 9223372036854771712, 50 * GB)
    group(top / "slurm/uid_1", 1, 9223372036854771712, 5 * GB)
    group(top / "slurm/uid_1/job_2", 1, 8 * GB, 5 * GB)
    group(tmp_path / "sys/fs/cgroup/cpu", 1, 1, 1)
    assert memory.available(tmp_path, {}) == 3 * GB


def test_groups_of_containers_full_and_half_said(tmp_path):
    """A container's own group is the root of what it sees, under the name that the host has for it."""
    machine(tmp_path, groups="0::/user/job\n")
    top = tmp_path / "sys/fs/cgroup"
    group(top, 2, 4 * GB, GB, cached=GB)
    assert memory.available(tmp_path, {}) == 4 * GB
    (top / "memory.stat").unlink()  # its limit counts
    (top / "user/job/memory.max").mkdir(parents=True)  # cannot be read: passed over
    assert memory.available(tmp_path, {}) == 3 * GB
    group(top, 2, GB, 2 * GB)
    assert memory.available(tmp_path, {}) == 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("MEM_PER_NODE=8192", 2**33 - GB),
        ("MEM_PER_CPU=2048 CPUS_ON_NODE=4", 2**33 - GB),
        ("MEM_PER_CPU=2048", 2**31 - GB),
        ("MEM_PER_NODE=0", 100 * GB),  # all of the node
        ("MEM_PER_NODE=n/a", 100 * GB),
        ("", 100 * GB),
    ],
)
def test_what_slurm_granted_less_what_is_held(tmp_path, variables, expected):
    environment = {f"SLURM_{name}": value for name, value in (pair.split("=") for pair in variables.split())}
    found = memory.available(machine(tmp_path, held=GB), environment)
    assert found == pytest.approx(expected, abs=1024)  # /proc counts in KiB
