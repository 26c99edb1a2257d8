"""Checksums in FFV1's slices, which its decoder looks at and only logs when they are wrong."""

import zlib

_TRAILER = 8  # bytes behind a slice: size (3), status (1), checksum (4)
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def slices_are_whole(packet: bytes) -> bool:
    """Return whether the checksum of every slice of a packet is right; False, too, where slices carry none (RFC 9043, 4.8)."""
    end = len(packet)
    while end > 0:
        start = end - _TRAILER - int.from_bytes(packet[max(0, end - _TRAILER) : end - _TRAILER + 3], "big")
        # The checksum has its highest bit first, zlib's its lowest; it starts from 0 and ends at 0, its own bytes included.
        if start < 0 or zlib.crc32(packet[start:end].translate(_REVERSED), 0xFFFFFFFF) != 0xFFFFFFFF:
            return False
        end = start
    return True
