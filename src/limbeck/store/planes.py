"""Arrays of numbers as byte planes, and back, without trusting what is read.

Byte i of every number is kept beside byte i of the others: high bytes, which repeat, compress well when noisy low bytes
do not come between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import StoreError

Array = NDArray[Any]
Columns = dict[str, bytes]

MOST_ENTRIES = 2**26  # places of one block: bounds what a damaged or hostile store can make a reader allocate


def split_planes(name: str, array: Array, width: int) -> Columns:
    """One-dimensional `array` as columns `name_0` .. `name_{width-1}`: the lowest `width` bytes of every number."""
    octets = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), array.itemsize)
    return {f"{name}_{i}": octets[:, i].tobytes() for i in range(width)}


def join_planes(columns: Mapping[str, bytes], name: str, kind: str, width: int, length: int) -> Array:
    """The inverse of `split_planes`: `length` numbers of numpy type `kind`. Raises StoreError when a plane is missing or has another length."""
    for i in range(width):
        plane = columns.get(f"{name}_{i}")
        if not isinstance(plane, bytes | bytearray | memoryview):
            raise damaged(f"{name}_{i}", "it is missing")
        if len(plane) != length:
            raise damaged(f"{name}_{i}", f"it holds {len(plane)} bytes, expected {length}")
    octets = np.zeros((length, np.dtype(kind).itemsize), dtype=np.uint8)
    for i in range(width):
        octets[:, i] = np.frombuffer(columns[f"{name}_{i}"], dtype=np.uint8)
    return octets.view(kind).ravel()


def bytes_for(largest: int) -> int:
    """How many bytes hold every number from 0 to `largest`, at least one."""
    return max(1, (int(largest).bit_length() + 7) // 8)


def check_block(n: int, width: int) -> None:
    """Refuse a block of more places than one allocation should have. Raises StoreError."""
    if not 0 <= n * width <= MOST_ENTRIES:
        raise StoreError(
            f"a block of {n} positions with {width} places each: at most {MOST_ENTRIES} places go into one block, take fewer positions"
        )


def damaged(column: str, what: str) -> StoreError:
    """The error for a column that no encoder with these settings writes."""
    return StoreError(f"target column {column}: {what}. The block is damaged, or was written with other settings.")
