"""llama.cpp's batch API, driven through the pipe of protocol.py."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import llama_cpp as lib
import numpy as np
from protocol import Generate, answer_tasks

BATCH = 2048  # tokens in one call, llama.cpp's default
CELLS = 256  # a sequence's room is a multiple of this


def load(options: dict[str, Any]) -> Generate:
    """Takes `model`, `threads`, and for another number format `ftype` and `target`, its file."""
    lib.llama_backend_init()
    path = options["model"]
    if "ftype" in options:
        path = _requantised(path, options["target"], options["ftype"])
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return _Runner(model, threads=options["threads"]).generate


def _requantised(source: str, target: str, ftype: int) -> str:
    """Writes the model in another format, unless it was done before."""
    if not Path(target).exists():
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = ftype, True
        part = target + ".part"
        if lib.llama_model_quantize(source.encode(), part.encode(), ctypes.byref(parameters)):
            raise SystemExit(f"llama.cpp cannot write {target}")
        Path(part).rename(target)
    return target


class _Runner:
    """A model, and a context that fits the prompts it was last given."""

    def __init__(self, model: Any, *, threads: int) -> None:
        self._model, self._threads = model, threads
        self._num_words = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        self._shape = (0, 0)
        self._context: Any = None

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> int:
        longest = max(map(len, prompts)) + num_new_tokens
        self._prepare(len(prompts), -(-longest // CELLS) * CELLS)
        tokens = self._prefill(prompts)
        lengths = [len(prompt) for prompt in prompts]
        for turn in range(num_new_tokens - 1):
            for sequence, token in enumerate(tokens):
                self._add(token, position=lengths[sequence] + turn, sequence=sequence, last=True)
            tokens = [token for _, token in self._compute()]
        return len(prompts) * num_new_tokens

    def _prepare(self, num_sequences: int, cells: int) -> None:
        if self._shape != (num_sequences, cells):
            if self._context:
                lib.llama_free(self._context)
            parameters = lib.llama_context_default_params()
            parameters.n_ctx = num_sequences * cells
            parameters.n_seq_max = num_sequences
            parameters.n_batch = BATCH
            parameters.n_threads = parameters.n_threads_batch = self._threads
            self._context = lib.llama_init_from_model(self._model, parameters)
            if not self._context:
                raise SystemExit(f"llama.cpp makes no context of {num_sequences} x {cells}")
            self._shape = (num_sequences, cells)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first new token of each sequence."""
        found = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                last = position == len(prompt) - 1
                self._add(token, position=position, sequence=sequence, last=last)
                if self._batch.n_tokens == BATCH:
                    found += self._compute()
        found += self._compute()
        return [token for _, token in sorted(found)]

    def _add(self, token: int, *, position: int, sequence: int, last: bool) -> None:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = last
        batch.n_tokens = index + 1

    def _compute(self) -> list[tuple[int, int]]:
        """Runs the batch and empties it: (sequence, most likely next token) where it was asked."""
        batch = self._batch
        if not batch.n_tokens:
            return []
        if lib.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not decode a batch")
        found = []
        for index in range(batch.n_tokens):
            if batch.logits[index]:
                logits = lib.llama_get_logits_ith(self._context, index)
                words = np.ctypeslib.as_array(logits, shape=(self._num_words,))
                found.append((batch.seq_id[index][0], int(words.argmax())))
        batch.n_tokens = 0
        return found


if __name__ == "__main__":
    answer_tasks(load)
