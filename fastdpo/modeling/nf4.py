"""Bytes of a 4-bit weight as bitsandbytes lays it out, NF4 with double quantization."""

BLOCK, NESTED_BLOCK = 64, 256
"""Entries that share one scale, and scales that share one."""

TABLE_BYTES = 4 * (16 + 256 + 1)
"""The tables of a weight, 16 and 256 fp32 values, and one fp32 offset."""

ENTRY_BYTES = 1 / 2 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK)
"""Bytes of an entry of a large weight, its scales included."""


def nf4_parts(entries: int) -> list[int]:
    """Bytes of a weight without its tables, tensor by tensor.

    Half a byte an entry, a uint8 scale for `BLOCK` entries, an fp32 one for `NESTED_BLOCK` scales.
    """
    scales = -(-entries // BLOCK)
    return [-(-entries // 2), scales, 4 * -(-scales // NESTED_BLOCK)]


def nf4_bytes(entries: int) -> int:
    """Bytes of a weight, its tables included."""
    return sum(nf4_parts(entries)) + TABLE_BYTES
