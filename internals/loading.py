"""Batches of scans, read ahead while a device works on the ones before."""

import atexit
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from internals import devices, process


class ReadAhead:
    """Batches for a GPU, put together in pinned memory by threads while the GPU works; see `loader`.

    Threads, since a process would copy every scan twice more. The order is that of a DataLoader of the
    same generator.
    """

    def __init__(self, order: DataLoader, dataset: Subset, workers: int, device: torch.device) -> None:
        self.order, self.dataset, self.workers, self.device = order, dataset, max(workers, 1), device

    @property
    def generator(self) -> torch.Generator | None:
        """What shuffles."""
        return self.order.generator

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        coming: deque[Future] = deque()
        pool = ThreadPoolExecutor(self.workers, initializer=devices.make_current, initargs=(self.device,))
        try:
            for numbers in self.order:
                coming.append(pool.submit(self._gather, numbers.tolist()))
                if len(coming) > self.workers:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, too

    def _gather(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """One batch: volumes (B, 1, X, Y, Z) and labels (B,)."""
        volumes, labels = zip(*(self.dataset[number] for number in numbers), strict=True)
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(volumes), *volumes[0].shape), pin_memory=pinned)
        return torch.stack(volumes, out=batch), torch.tensor(labels)


class Batches(DataLoader):
    """A DataLoader whose processes leave signals, which may go to all, to the one that they read for.

    They have them blocked from their first moment on, as they take over what is blocked here meanwhile.
    """

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *process.STOPPING})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


Loader = DataLoader | ReadAhead


@atexit.register
def _end_readers() -> None:
    """Kill what still reads when the command ends: multiprocessing would send SIGTERM and wait."""
    for child in multiprocessing.active_children():
        child.kill()
