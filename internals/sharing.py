"""Work that several processes share: the ones that torchrun starts, and the parts of a job array."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from internals.errors import InputError

Item = TypeVar("Item")


class Share(NamedTuple):
    """One of several shares of some work."""

    number: int  # from 1
    of: int

    def deal(self, items: Sequence[Item]) -> list[Item]:
        """This share of some items: every `of`-th, so that what is slow to one side is spread over all."""
        return list(items[self.number - 1 :: self.of])

    def all(self) -> list["Share"]:
        """This share and the others."""
        return [Share(number, self.of) for number in range(1, self.of + 1)]

    def within(self, outer: "Share") -> "Share":
        """This share of another one, as a share of the whole."""
        return Share((outer.number - 1) * self.of + self.number, outer.of * self.of)

    @property
    def suffix(self) -> str:
        """What a file of it has in its name; nothing where it is the whole."""
        return "" if self.of == 1 else f"-{self.number}of{self.of}"

    def say(self) -> None:
        """Print which share this is, where it is not the whole."""
        if self.of > 1:
            print(f"part {self.number} of {self.of}")

    def check_overwrite(self, overwrite: bool) -> None:
        """Raise InputError where one of several processes is to remove what is there, others' work too."""
        if overwrite and self.of > 1:
            raise InputError(
                "--overwrite: one of several processes cannot know what is the others'; remove DIR"
            )


WHOLE = Share(1, 1)
PART = "the I-th of N parts of every fold's scans, from 1"  # what --part is


def parse_part(text: str) -> Share:
    """An argparse type: "2/5" is the second of five parts."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    share = Share(*map(int, match.groups())) if match else Share(0, 0)
    if not 1 <= share.number <= share.of:
        raise argparse.ArgumentTypeError(f"'{text}' is not i/n with 1 <= i <= n")
    return share


# torchrun ----------------------------------------------------------------------------------------


def own_share() -> Share:
    """Which of the processes that torchrun started this one is, on all machines; WHOLE without torchrun."""
    return _from_environment("RANK", "WORLD_SIZE")


def own_share_here() -> Share:
    """Which of those on this machine it is."""
    return _from_environment("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _from_environment(rank: str, size: str) -> Share:
    if not {rank, size} <= set(os.environ):
        return WHOLE
    try:
        share = Share(int(os.environ[rank]) + 1, int(os.environ[size]))
    except ValueError:
        share = Share(0, 0)
    if not 1 <= share.number <= share.of:
        raise InputError(
            f"{rank}={os.environ[rank]}, {size}={os.environ[size]}: expected 0 <= {rank} < {size}"
        )
    return share


def own_device(name: str, there: int) -> str:
    """`--device` for one of several processes on a machine: each has a GPU of its own.

    Args:
        name: as the user says it.
        there: number of CUDA devices.

    Raises:
        InputError: a device is named by its number, or there are fewer than processes.
    """
    here = own_share_here()
    if here.of == 1 or name == "cpu" or (name == "auto" and not there):
        return name
    if name not in ("auto", "cuda"):
        raise InputError(
            f"--device {name}: torchrun started {here.of} processes here, and each takes a GPU of its own; "
            "leave the option out, or say --device cpu"
        )
    if here.number > there:
        raise InputError(
            f"--device {name}: torchrun started {here.of} processes here, and this machine has {there} CUDA "
            f"device{'s' * (there != 1)}; use --nproc-per-node {there or 1}, or --device cpu"
        )
    return f"cuda:{here.number - 1}"


def share_threads() -> None:
    """Divide this machine's cores among the processes that torchrun started here.

    torchrun gives each of several processes one thread, whatever there is. Where the user set
    OMP_NUM_THREADS to another number, that stays.
    """
    here = own_share_here()
    if here.of > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(_cores() // here.of, 1))


def _cores() -> int:
    """Cores that this process may use; macOS has no such call."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
