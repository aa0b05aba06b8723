"""Holes for small arrays in the device's memory, against an allocator that works as XLA's does."""

from __future__ import annotations

from typing import Any

import pytest

from vjax.runner.memory import separate_holes

MIB = 1 << 20
GRAIN = 256
#: A free piece is given away whole when less than this of it would be left, and it is no twice as large as asked for.
KEPT_WHOLE = 128 * MIB


class BestFit:
    """Free pieces as address -> size. The smallest one that fits is taken, from its beginning; what is freed becomes
    one with its free neighbours."""

    def __init__(self, free: dict[int, int]):
        self.free = dict(free)
        self.used: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        size = -(-size // GRAIN) * GRAIN
        address = min((a for a, s in self.free.items() if s >= size), key=lambda a: (self.free[a], a))
        piece = self.free.pop(address)
        if piece >= 2 * size or piece - size >= KEPT_WHOLE:
            self.free[address + size] = piece - size
            piece = size
        self.used[address] = piece
        return address

    def release(self, address: int) -> None:
        size = self.used.pop(address)
        size += self.free.pop(address + size, 0)
        for before, length in list(self.free.items()):
            if before + length == address:
                del self.free[before]
                address, size = before, length + size
        self.free[address] = size


#: Between weights, and the large piece behind them.
FRAGMENTS: dict[str, dict[int, int]] = {
    "none": {},
    "small": {1 * MIB: 512, 2 * MIB: 3 * GRAIN},
    "of_any_size": {1 * MIB: 512, 2 * MIB: 300 << 10, 4 * MIB: 1 * MIB, 16 * MIB: 6 * MIB, 64 * MIB: 30 * MIB},
}


@pytest.fixture(params=FRAGMENTS)
def memory(request) -> tuple[BestFit, list[int]]:
    """The device after the start, holes of 384 KiB, 4.5 and 118 MiB made and something large behind them."""
    device = BestFit({**FRAGMENTS[request.param], 1 << 30: 4 << 30})

    def allocate(size: int) -> tuple[Any, int]:
        return (address := device.allocate(size)), address

    holes, _ = separate_holes((384 << 10, 9 * MIB // 2, 118 * MIB), allocate)
    device.allocate(2 << 30)
    for hole in holes:
        device.release(hole)
    return device, holes


def test_small_arrays_do_not_move_temporaries(memory):
    """Steps whose arguments and results live on while the next ones are dispatched take the same temporaries."""
    device, _ = memory
    small: list[list[int]] = []
    taken = {}
    for step in range(20):
        small.append([device.allocate(40_000 + 1000 * (step % 3)), device.allocate(4), device.allocate(256)])
        for temporaries in (520_000, 1_190_000, 7_130_000, 97_000_000, 1_400_000_000):
            address = device.allocate(temporaries)
            taken.setdefault(temporaries, set()).add(address)
            device.release(address)
        if len(small) > 2 + step % 2:
            for address in small.pop(0):
                device.release(address)
    assert [len(addresses) for addresses in taken.values()] == [1] * 5


def test_a_hole_is_no_larger_than_it_was(memory):
    device, holes = memory
    assert [device.free[hole] for hole in holes] == [384 << 10, 9 * MIB // 2, 118 * MIB]


def test_the_large_piece_stays_whole(memory):
    device, _ = memory
    pieces = sorted(device.free.values())
    for _ in range(12):
        device.allocate(30_000)
    assert max(device.free.values()) == pieces[-1]
