"""sharing.py: parts, what torchrun tells its processes, devices and threads of their own."""

import argparse
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internals import devices, sharing
from internals.errors import InputError
from internals.sharing import WHOLE, Share


@given(st.lists(st.integers(), max_size=40), st.integers(1, 12))
def test_shares_divide_everything_evenly(items, of):
    shares = [Share(number, of).deal(items) for number in range(1, of + 1)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for number, share in enumerate(shares):
        assert share == [item for place, item in enumerate(items) if place % of == number]


@given(st.integers(1, 5), st.integers(1, 4))
def test_shares_of_shares_divide_everything(outer, inner):
    parts = [
        Share(i, inner).within(Share(o, outer)) for o in range(1, outer + 1) for i in range(1, inner + 1)
    ]
    assert sorted(parts) == [Share(number, outer * inner) for number in range(1, outer * inner + 1)]
    assert WHOLE.within(Share(1, outer)) == Share(1, outer)


def test_parts_are_read_as_people_write_them():
    assert sharing.parse_part("1/1") == WHOLE
    assert sharing.parse_part("12/40") == Share(12, 40)
    for wrong in (
        "0/4",
        "5/4",
        "1/0",
        "-1/4",
        "1",
        "a/4",
        "1/4/2",
        "",
        "1 /4",
        "1/1e3",
        "\u0661/4",
        "1/" + "9" * 99,
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not i/n with 1 <= i <= n"):
            sharing.parse_part(wrong)


# torchrun ----------------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """Sets what torchrun tells a process."""

    def begin(rank: int, size: int, local_rank: int | None = None, local_size: int | None = None) -> None:
        local = rank if local_rank is None else local_rank
        told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_size or size}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    return begin


def test_processes_of_torchrun_know_their_share(as_rank, monkeypatch):
    assert sharing.own_share() == sharing.own_share_here() == WHOLE
    as_rank(5, 8, 1, 4)
    assert sharing.own_share() == Share(6, 8)
    assert sharing.own_share_here() == Share(2, 4)
    for wrong in ("8", "-1", "x", ""):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(InputError, match=r"expected 0 <= RANK < WORLD_SIZE$"):
            sharing.own_share()
    monkeypatch.delenv("RANK")  # some clusters set WORLD_SIZE alone
    assert sharing.own_share() == WHOLE


def test_every_process_takes_a_gpu_of_its_own(as_rank, monkeypatch):
    assert sharing.own_device("auto", 4) == "auto"
    assert sharing.own_device("cuda:3", 4) == "cuda:3"
    as_rank(6, 8, 2, 4)
    assert sharing.own_device("auto", 4) == sharing.own_device("cuda", 4) == "cuda:2"
    assert sharing.own_device("auto", 0) == "auto"  # which is the CPU
    assert sharing.own_device("cpu", 4) == "cpu"
    for name in ("0", "cuda:1", "mps"):
        with pytest.raises(
            InputError, match=f"^--device {name}: torchrun started 4 processes here, and each"
        ):
            sharing.own_device(name, 4)
    for name in ("auto", "cuda"):
        with pytest.raises(InputError, match="this machine has 2 CUDA devices; use --nproc-per-node 2, or"):
            sharing.own_device(name, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torchrun started 4 processes"):
        devices.resolve_device("cuda:1")
    as_rank(6, 8, 0, 1)  # one process on each machine may choose
    assert sharing.own_device("cuda:1", 4) == "cuda:1"


@pytest.mark.parametrize(("given_", "expected"), [(None, 2), ("1", 2), ("3", None)])
def test_the_cores_are_shared_out(as_rank, monkeypatch, given_, expected):
    """Unless the user says how many threads; torchrun itself says 1."""
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sharing.share_threads()
    assert counts == []  # not without torchrun
    as_rank(0, 6, 0, 3)
    if given_:
        monkeypatch.setenv("OMP_NUM_THREADS", given_)
    sharing.share_threads()
    assert counts == ([expected] if expected else [])
    as_rank(0, 9, 0, 9)
    sharing.share_threads()
    assert counts == ([expected, 1] if expected else [])  # more processes than cores


def test_one_of_several_processes_overwrites_nothing():
    WHOLE.check_overwrite(True)
    Share(1, 2).check_overwrite(False)
    with pytest.raises(InputError, match=r"^--overwrite: one of several processes"):
        Share(1, 2).check_overwrite(True)
