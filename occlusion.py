"""Occlusion (Zeiler and Fergus 2014, arXiv 1311.2901): how far a logit falls where a cube is covered.

A covered cube changes a small part of every block's output: what sees a voxel of it. Only that part is
computed again. All cubes get parts of one size, a little larger than some need, so that many go through a
block together.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from internals.devices import to_memory_format, values_at_once
from internals.folded import Box, FoldedNetwork, convolve, full_box
from models import CNN3d, check_arguments, evaluation_mode

CHUNK = 2**23  # values of the first block's input and output that are computed at once on a CPU


def occlusion(
    model: CNN3d,
    volume: Tensor,
    target: Tensor,
    size: float = 16,
    stride: float = 8,
    baseline: Tensor | None = None,
    voxel_sizes: Sequence[float] = (1, 1, 1),
) -> Tensor:
    """Cover one cube after the other; give the fall of the logit to all voxels of the cube.

    The cubes begin at every multiple of the stride; those at the far borders are cut off. Where cubes
    overlap, a voxel gets the mean of its cubes. A cube that changes nothing (of background, covered with
    zeros) costs nothing. The numbers are those of captum's Occlusion of the same windows and baseline.

    Args:
        model: the network; evaluated in evaluation mode, left as found.
        volume: (B, 1, X, Y, Z), scans in [0, 1].
        target: int64 (B,), the logit to explain, per scan.
        size: edge of the cubes in mm; rounded to whole voxels along each axis.
        stride: from one cube to the next, in mm; likewise.
        baseline: what cubes are filled with: None for zeros, or (1 or B, 1, X, Y, Z).
        voxel_sizes: edges of a voxel in mm.

    Returns:
        The map, like `volume`, signed; logits. Positive: without this place the logit is lower.

    Raises:
        ValueError: shapes, dtypes or targets that do not fit, cubes smaller than a voxel, or gaps between
            them.
    """
    check_arguments(model, volume, target)
    edges, steps = cube_in_voxels(size, stride, voxel_sizes)
    filling = torch.zeros_like(volume) if baseline is None else baseline.expand_as(volume)
    scans = zip(volume.split(1), filling.split(1), target.tolist(), strict=True)
    with evaluation_mode(model), torch.no_grad():
        network = FoldedNetwork(model, volume.shape[2:])
        return torch.cat([_occlude(network, *scan, edges, steps) for scan in scans])


def cube_in_voxels(size: float, stride: float, voxel_sizes: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the cubes and the steps between them, in voxels along each axis; ValueError as `occlusion`."""
    sizes = np.asarray(voxel_sizes, np.float64)
    if size < sizes.max():
        raise ValueError(f"size {size:g}: is smaller than a voxel, whose longest edge is {sizes.max():g} mm")
    edges = np.rint(size / sizes).astype(int)
    steps = np.maximum(np.rint(stride / sizes), 1).astype(int)
    if (steps > edges).any():
        raise ValueError(f"stride {stride:g}: leaves gaps between cubes of {size:g} mm")
    return edges, steps


def _occlude(
    network: FoldedNetwork, volume: Tensor, filling: Tensor, target: int, edges: np.ndarray, steps: np.ndarray
) -> Tensor:
    """The map (1, 1, X, Y, Z) of one scan; edges of the cubes and steps between them in voxels."""
    cubes = [_cubes(*axis) for axis in zip(volume.shape[2:], edges, steps, strict=True)]
    inside = [_membership(axis, edge).to(volume) for axis, edge in zip(cubes, volume.shape[2:], strict=True)]
    changed = torch.einsum("xyz,xi,yj,zk->ijk", (volume != filling)[0, 0].to(volume), *inside) > 0
    falls = changed.to(volume)  # (I, J, K)
    falls[changed] = _falls(network, volume, filling, target, cubes, changed.nonzero().tolist())
    shares = [axis / axis.sum(1, keepdim=True) for axis in inside]
    return torch.einsum("ijk,xi,yj,zk->xyz", falls, *shares)[None, None]


def _cubes(length: int, edge: int, step: int) -> list[slice]:
    """The cubes along an axis, the last of them cut off at its end."""
    count = max(-(-(length - edge) // step), 0) + 1
    return [slice(number * step, min(number * step + edge, length)) for number in range(count)]


def _membership(cubes: list[slice], length: int) -> Tensor:
    """1 where a voxel of an axis is in a cube, else 0: (length, cubes)."""
    inside = torch.zeros(length, len(cubes))
    for number, cube in enumerate(cubes):
        inside[cube, number] = 1
    return inside


def _falls(
    network: FoldedNetwork,
    volume: Tensor,
    filling: Tensor,
    target: int,
    cubes: list[list[slice]],
    chosen: list[list[int]],
) -> Tensor:
    """How far the logit falls by each chosen cube, whose numbers are given for each axis: (len(chosen),)."""
    states = [volume]  # of the whole scan: what each block reads, and what the last one makes
    for block in network.blocks:
        states.append(block.forward(states[-1])[0])
    whole = network.classify(states[-1])[0][0, target]
    parts = _parts(network, volume.shape[2:], cubes)
    largest = len(network.blocks[0].weight) * prod(
        axis.read[0].stop - axis.read[0].start for axis in parts[0]
    )
    together = max(values_at_once(volume.device, CHUNK) // largest, 1)
    found = [volume.new_zeros(0)]
    with utils.progress(None, len(chosen), desc="cubes", leave=False) as bar:
        for begin in range(0, len(chosen), together):
            some = chosen[begin : begin + together]
            places = [_box(cubes, numbers) for numbers in some]
            values: Sequence[Tensor] | Tensor = [filling[0][:, *place] for place in places]
            for block, state, axes in zip(network.blocks, states, parts, strict=False):
                read = [_box([axis.read for axis in axes], numbers) for numbers in some]
                inputs = _paste(values, places, state, read)
                values = block.activate(F.max_pool3d(convolve(inputs, block.weight), block.window))
                places = [_box([axis.made for axis in axes], numbers) for numbers in some]
            features = _paste(values, places, states[-1], [full_box(states[-1].shape[2:])] * len(some))
            found.append(whole - network.classify(features)[0][:, target])
            bar.update(len(some))
    return torch.cat(found)


def _box(axes: Sequence[list[slice]], numbers: Sequence[int]) -> Box:
    """One slice of each axis."""
    return tuple(axis[number] for axis, number in zip(axes, numbers, strict=True))


class _Axis(NamedTuple):
    """Along one axis, what of a block's input and output is computed again, for every cube."""

    read: list[slice]
    made: list[slice]


def _parts(network: FoldedNetwork, shape: torch.Size, cubes: list[list[slice]]) -> list[list[_Axis]]:
    """For each block and axis, the parts of one length that hold all that the cubes change."""
    changed, result = cubes, []
    for block in network.blocks:
        made = [
            [block.propagate_axis(part, edge)[1] for part in axis]
            for axis, edge in zip(changed, shape, strict=True)
        ]
        counts = torch.Size(edge // block.window for edge in block.conv_shape(shape))
        axes = []
        for tight, count in zip(made, counts, strict=True):
            length = max(part.stop - part.start for part in tight)
            begins = [min(part.start, count - length) for part in tight]
            parts = [slice(begin, begin + length) for begin in begins]
            axes.append(_Axis([block.receptive_field(part) for part in parts], parts))
        result.append(axes)
        changed, shape = made, counts
    return result


def _paste(
    values: Sequence[Tensor] | Tensor, places: Sequence[Box], state: Tensor, read: Sequence[Box]
) -> Tensor:
    """Parts of a state with new values put into them.

    Args:
        values: (n, x, y, z) each.
        places: where in the state they belong.
        state: (1, n, X, Y, Z).
        read: the parts to take, of one size.

    Returns:
        (len(values), n, ...).
    """
    size = [part.stop - part.start for part in read[0]]
    result = to_memory_format(state.new_empty(len(values), state.shape[1], *size))
    for row, (new, place, part) in enumerate(zip(values, places, read, strict=True)):
        result[row] = state[0][:, *part]
        both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(place, part, strict=True)]
        there = [slice(a.start - b.start, a.stop - b.start) for a, b in zip(both, part, strict=True)]
        here = [slice(a.start - b.start, a.stop - b.start) for a, b in zip(both, place, strict=True)]
        if all(a.stop > a.start for a in both):
            result[row][:, *there] = new[:, *here]
    return result
