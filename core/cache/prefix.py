"""Keys for the contents of KV blocks.

Keys and values of a position follow from the weights and all tokens up to it, to the bit. So
a block's key is a hash of the key of the block before it and its own tokens, and the first
one's of what must be equal besides: the weights, and the salt of whoever may share.

128 bits of BLAKE2: to hit another's block by chance or by force takes 2^128 tries, for which
the salt, which is in every key, must be known. Tokens therefore need not be compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_SIZE = 16  # bytes of a key


def root_key(*, weights: str, salt: str) -> bytes:
    """What stands before the first block."""
    digest = blake2b(weights.encode(), digest_size=_SIZE).digest()
    return blake2b(digest + salt.encode(), digest_size=_SIZE).digest()


def extend_keys(
    keys: list[bytes], token_ids: Sequence[int], *, root: bytes, block_size: int
) -> None:
    """Adds to `keys`, one for each block, those of the full blocks that lack one."""
    first, end = len(keys) * block_size, len(token_ids) // block_size * block_size
    packed = array("I", token_ids[first:end]).tobytes()
    key = keys[-1] if keys else root
    size = 4 * block_size
    for start in range(0, len(packed), size):
        key = blake2b(key + packed[start : start + size], digest_size=_SIZE).digest()
        keys.append(key)
