"""How the kernels of deformable convolution are cut: outputs or pixels, and channels, by sizes and generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accel.kernels._launch import power_of_two


@dataclass(frozen=True)
class Tile:
    """Outputs (or pixels) in a tile, channels in and out of a block, warps of a program, how many steps ahead of the
    product it loads, the registers of a thread at most."""

    outputs: int
    c: int
    o: int
    warps: int
    stages: int = 1
    registers: int | None = None

    @property
    def how(self) -> tuple[int, int, int | None]:
        return self.warps, self.stages, self.registers


@dataclass(frozen=True)
class Shape:
    """What tiles are chosen by."""

    segment: int  # channels that share offsets and belong to one weight group
    o_per_group: int
    itemsize: int
    capability: tuple[int, int]  # of the GPU

    def c(self, most: int) -> int:
        return power_of_two(self.segment, 16, most)

    def o(self, most: int) -> int:
        return power_of_two(self.o_per_group, 16, most)


# A sum in fp32 takes tile / (32 · warps) registers a thread, and so do the pixels of as many samples in half precision,
# two by two. A block of output channels is as wide as that allows, because each gathers anew. Without tensor cores, in
# fp32, products are taken from shared memory by every thread, and tiles are small. Those of Hopper were the fastest of
# the ten to forty that an H200 measured on ResNet's layers of 128, 256 and 512 channels; those of other generations are
# chosen by bytes and registers.


FORWARD_ON_HOPPER = {128: Tile(64, 32, 128, 4, 3, 168), 256: Tile(64, 32, 256, 4, 3), 512: Tile(64, 64, 256, 8, 3)}
SHIFTS_ON_HOPPER = {128: Tile(64, 64, 64, 4, 3), 256: Tile(64, 64, 64, 4, 3), 512: Tile(128, 64, 64, 8, 3)}
WEIGHT_ON_HOPPER = {128: Tile(64, 128, 128, 4, 3)}
INPUT_ON_HOPPER = {128: Tile(32, 128, 64, 4), 256: Tile(32, 256, 64, 8)}


def _on_hopper(table: dict[int, Tile], channels: int, shape: Shape) -> Tile | None:
    """The tile for as many channels or more, cut to the call, where it was measured: in half precision, without edges
    of channels, whose masks take registers."""
    tile = table[min([size for size in table if size >= channels], default=max(table))]
    tile = replace(tile, c=shape.c(tile.c), o=shape.o(tile.o))
    whole = shape.segment % tile.c == 0 and shape.o_per_group % tile.o == 0
    return tile if shape.capability[0] == 9 and shape.itemsize == 2 and whole else None


def forward_tile(shape: Shape) -> Tile:
    if shape.itemsize > 2:
        return Tile(32, 16, shape.o(64), 4)
    tile = _on_hopper(FORWARD_ON_HOPPER, shape.o_per_group, shape)
    outputs = 64 if shape.segment % 16 == 0 else 32  # the masks of odd channels take registers
    return tile or Tile(outputs, shape.c(32), shape.o(128), 8 if shape.o_per_group > 64 else 4)


def shifts_tile(shape: Shape) -> Tile:
    if shape.itemsize > 2:
        return Tile(32, shape.c(32), 16, 4)
    tile = _on_hopper(SHIFTS_ON_HOPPER, shape.segment, shape)
    return tile or Tile(64, shape.c(32), shape.o(64), 8 if shape.segment > 16 else 4)


def weight_tile(shape: Shape) -> Tile:
    if shape.itemsize > 2:
        return Tile(16, shape.c(32), shape.o(64), 4)
    c, o = shape.c(64), shape.o(128)
    return _on_hopper(WEIGHT_ON_HOPPER, shape.segment, shape) or Tile(32, c, o, 8 if c * o >= 4096 else 4)


def input_tile(shape: Shape) -> Tile:
    if shape.itemsize > 2:
        return Tile(32, shape.c(64), 16, 4)
    c, o = shape.c(128), shape.o(64)
    return _on_hopper(INPUT_ON_HOPPER, shape.segment, shape) or Tile(64, c, o, 8 if c * o >= 4096 else 4)
