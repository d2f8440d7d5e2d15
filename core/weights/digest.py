"""A cheap identity of a weight file: equal for equal models, different for most others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from core.weights.mapped_file import MappedFile

_NUM_SAMPLES = 16
_SAMPLE_BYTES = 64


def digest_of(files: Iterable[tuple[MappedFile, int]]) -> str:
    """Returns SHA-256 (hex) over the header and size of every (file, bytes of its header).

    Two fine-tunes of one model have equal headers, so a few bytes of weights, evenly spread
    over the file, are hashed as well. It is an identity, not a proof against forgery.
    """
    digest = hashlib.sha256()
    for file, header_bytes in files:
        digest.update(file.size_bytes.to_bytes(8, "little"))
        digest.update(file.view(0, header_bytes).data)
        weights_bytes = file.size_bytes - header_bytes
        for sample in range(_NUM_SAMPLES):
            first = header_bytes + weights_bytes * sample // _NUM_SAMPLES
            digest.update(file.view(first, min(_SAMPLE_BYTES, file.size_bytes - first)).data)
    return digest.hexdigest()
