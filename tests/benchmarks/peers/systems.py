"""Who takes part: our number formats, and each peer in the configurations that suit it best."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm

from core.cache_folder import cache_folder
from core.models.registry import load_config
from core.weights.open import open_checkpoint
from services.local.ports import HeldPorts
from tests.benchmarks.peers.export import export
from tests.benchmarks.peers.trace_contest import Server, ServerCommand, openai_server
from tests.benchmarks.peers.turns import Child, PeerFailed, Turn, child_turn, mesh_turn
from tests.benchmarks.peers.work import Work

ROOT = Path(__file__).parents[3]
CHILDREN = Path(__file__).parent / "children"
INSTALL = ROOT / "infra" / "peers" / "install.sh"
INSTALL_TIMEOUT_S = 3600.0

KV_GIB = 2
MAX_STREAMS = 256
CONTEXT = 2048
EMULATED = 25.0  # so much slower is bf16 without instructions for it


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A system in one configuration. `rate` guesses tokens/s, for the estimate of the time only;
    `takes` says which work it is given."""

    name: str
    family: str
    open: Callable[[], AbstractContextManager[Turn]]
    start_s: float
    rate: Callable[[Work], float]
    takes: Callable[[Work], bool] = lambda _: True


def mesh_options(number_format: str, model: str | None, stages: str | None) -> list[str]:
    """What `penstock mesh` is started with; as for vLLM, without looking for known prefixes."""
    options = ["--dtype", number_format, "--kv-memory", f"{KV_GIB}GiB", "--no-prefix-cache"]
    for flag, value in (("--model", model), ("--stages", stages)):
        options += [flag, value] if value else []
    return options


def ours(name: str, options: Sequence[str], *, one_call: bool) -> Contestant:
    """A mesh started with these options. `one_call`: as peers get a list of prompts, ours gets the
    requests of a wave in one GenerateMany call; else each is a call of its own."""
    return Contestant(
        name=name,
        family="penstock",
        open=lambda: mesh_turn(options, one_call=one_call),
        start_s=8.0,
        rate=lambda work: _guess(work, {1: 120, 8: 500, 32: 1000, 64: 1300}, prefill=2000),
    )


def vllm(model: Path, logs: Path) -> list[Contestant]:
    """vLLM's offline API: bf16, int8, and bf16 pipelined over two processes.

    Its bf16 has no kernels without AVX-512: at 64 streams of 135M parameters, 53 tokens/s on two
    cores with AVX2. There it has float32 as well, and bf16 takes part in its own goal only.
    """
    python = install("vllm")
    folders = export(model, peers_folder() / "exports" / model.stem)
    single, pipelined = "0-1", "0|1"
    one, two = {}, {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}

    def contestant(
        name: str, number_format: str, threads: str, more: Mapping[str, object], slower: float
    ) -> Contestant:
        child = Child(
            python=python,
            script=CHILDREN / "run_vllm.py",
            options={
                "model": str(_vllm_folder(folders, number_format)),
                "dtype": _vllm_dtype(number_format),
                "max_model_len": CONTEXT,
                "max_num_seqs": MAX_STREAMS,
            }
            | more,
            environment=vllm_environment(python, threads=threads),
        )
        return Contestant(
            name=name,
            family="vllm",
            open=lambda: child_turn(child, log=logs / f"{name.replace(' ', '-')}.log"),
            start_s=28.0,
            rate=lambda work: (
                _guess(work, {1: 80, 8: 400, 32: 1000, 64: 1300}, prefill=2500) / slower
            ),
            # The pipelined configuration is in one goal only, and slower everywhere.
            takes=lambda work: (
                work.name == "decode 64"
                if slower >= EMULATED
                else not more or work.name in ("decode 64", "prefill")
            ),
        )

    if not llvm.get_host_cpu_features().get("avx512f"):
        return [
            contestant("vllm fp32", "fp32", single, one, 3.0),
            contestant("vllm bf16", "bf16", single, one, EMULATED),
        ]
    return [
        contestant("vllm bf16", "bf16", single, one, 1.0),
        contestant("vllm w8a8", "w8a8", single, one, 1.0),
        contestant("vllm bf16 pipelined", "bf16", pipelined, two, 2.0),
    ]


def _vllm_folder(folders: Mapping[str, Path], number_format: str) -> Path:
    """Weights for vLLM; it widens those of bf16 itself."""
    return folders["bf16" if number_format == "fp32" else number_format]


def _vllm_dtype(number_format: str) -> str:
    """Of activations, and of weights that are not quantised."""
    return "float32" if number_format == "fp32" else "bfloat16"


def vllm_server(model: Path, contestant: str, logs: Path) -> Server:
    """vLLM's OpenAI server in the configuration of one of its contestants."""
    python = install("vllm")
    checkpoint = open_checkpoint(model)
    try:
        config = load_config(checkpoint)
    finally:
        checkpoint.close()
    number_format = contestant.split()[1]
    folders = export(model, peers_folder() / "exports" / model.stem)
    folder = _vllm_folder(folders, number_format)
    with HeldPorts() as held:
        port = held.take()
    sizes = {
        "dtype": _vllm_dtype(number_format),
        "max-model-len": config.context_length,
        "max-num-seqs": 64,
    }
    options = {"model": folder, "host": "127.0.0.1", "port": port} | sizes
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command.append("--no-enable-prefix-caching")
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    start = ServerCommand(
        command=command,
        environment=vllm_environment(python, threads="0-1"),
        address=f"127.0.0.1:{port}",
        model=str(folder),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )
    return openai_server(start, log=logs / "vllm-server.log")


def llamacpp(model: Path, logs: Path) -> list[Contestant]:
    """llama.cpp: the file as it is, and again in formats that it may have faster kernels for."""
    python = install("llamacpp")
    if model.suffix != ".gguf":
        raise PeerFailed(f"reads GGUF files only, not {model.name}")
    exports = peers_folder() / "exports" / model.stem
    exports.mkdir(parents=True, exist_ok=True)
    environment = {"PATH": os.environ["PATH"]}
    contestants = []
    for number_format, ftype in ((None, None), ("Q8_0", 7), ("Q4_0", 2)):
        options: dict[str, object] = {"model": str(model), "threads": 2}
        if ftype is not None:
            options |= {"ftype": ftype, "target": str(exports / f"{number_format}.gguf")}
        child = Child(
            python=python,
            script=CHILDREN / "run_llamacpp.py",
            options=options,
            environment=environment,
        )
        name = f"llama.cpp {number_format or 'as it is'}"
        contestants.append(_llamacpp_contestant(name, child, logs, again=ftype is not None))
    return contestants


def _llamacpp_contestant(name: str, child: Child, logs: Path, *, again: bool) -> Contestant:
    return Contestant(
        name=name,
        family="llamacpp",
        open=lambda: child_turn(child, log=logs / f"{name.replace(' ', '-')}.log"),
        start_s=3.0,
        rate=lambda work: _guess(work, {1: 150, 8: 170, 32: 180, 64: 230}, prefill=350),
        # It is made for one stream, which is what it is compared at.
        takes=lambda work: work.name == "decode 1" or (not again and work.name == "decode 8"),
    )


def vllm_environment(python: Path, *, threads: str) -> dict[str, str]:
    """Both cores, and what vLLM itself asks for when it starts."""
    cache = peers_folder() / "vllm-cache"
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "VLLM_CPU_OMP_THREADS_BIND": threads,
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(python.parents[1] / "lib" / "libiomp5.so"),
        # Version 0.32 cannot read back what it has compiled ahead of time, and would compile for
        # 40 s at each start; torch's own cache of the same kernels works.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


def install(name: str) -> Path:
    """Makes the environment of a peer unless it is there; returns its interpreter."""
    folder = peers_folder() / name
    try:
        done = subprocess.run(
            [INSTALL, name, folder],
            env=os.environ | {"PYTHON3": sys.executable},
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"did not install in {INSTALL_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PeerFailed(f"did not install: {lines[-1]}")
    return folder / "bin" / "python"


def peers_folder() -> Path:
    """Environments, exported weights and compiled kernels of the peers, apart from ours."""
    return cache_folder() / "peers"


PEERS: Mapping[str, Callable[[Path, Path], Sequence[Contestant]]] = {
    "vllm": vllm,
    "llamacpp": llamacpp,
}


def _guess(work: Work, rates: Mapping[int, float], *, prefill: float) -> float:
    if work.num_new_tokens == 1:
        return prefill
    return next((rate for streams, rate in rates.items() if work.streams <= streams), rates[64])
