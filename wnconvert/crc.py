"""CRC-32, of a whole from those of its parts, so that parts can be written in any order."""

from __future__ import annotations

import functools

try:
    # Ten times as fast as zlib.
    from isal.isal_zlib import crc32
except ImportError:  # it is not made for this machine
    from zlib import crc32

__all__ = ["combine", "crc32"]

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def combine(first: int, second: int, length: int) -> int:
    """The checksum of two byte strings, one after the other.

    Args:
        first: `crc32` of the first.
        second: `crc32` of the second.
        length: bytes of the second.
    """
    return _multiply(_shift(length), first) ^ second


@functools.lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x^(8 * length) modulo the polynomial."""
    result, power = _ONE, _ONE >> 8
    while length:
        if length & 1:
            result = _multiply(power, result)
        power = _multiply(power, power)
        length >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) in reflected order, modulo the polynomial."""
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product
