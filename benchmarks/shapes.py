"""What is measured: named cases, and the selections of them that a run takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal

Kind = Literal["plain", "quantised", "multi"]
PLAIN = "none"
# nf4 and fp4 quantise their scales too, as QLoRA does; fp8 has a scale for each 128 x 128 block;
# with "fp8 activations" x is rounded to fp8 too.
FORMATS = ("nf4", "nf4 single", "fp4", "int8", "fp8", "fp8 activations")


@dataclass(frozen=True)
class Case:
    """One LoRA layer and its input x [M, K]; weight [N, K], no bias."""

    layer: str
    M: int
    N: int
    K: int
    r: int
    dropout: float
    dtype: str = "bf16"  # of x and of the weight
    adapter_dtype: str = "bf16"  # of A and B; PEFT's own default is fp32
    format: str = PLAIN  # of the frozen weight, one of FORMATS
    adapters: int = 1  # in the batch, each with its own rows of x
    ragged: bool = False  # whether adapters have different numbers of rows

    @property
    def kind(self) -> Kind:
        """What sort of layer it is."""
        if self.adapters > 1:
            return "multi"
        return "plain" if self.format == PLAIN else "quantised"

    @property
    def modes(self) -> tuple[str, ...]:
        """What is measured of it."""
        if self.layer == OVERHEAD:
            return ("overhead",)
        if self.kind == "multi" and self.M == self.adapters:  # decoding
            return ("forward",)
        modes = ("forward", "backward", "forward+backward", "memory")
        return ("weight", *modes) if self.kind == "quantised" else modes

    @property
    def rows(self) -> list[int]:
        """How many rows of x each adapter has, side by side; the ragged ones as 1, 2, 3, ..."""
        shares = range(1, self.adapters + 1) if self.ragged else [1] * self.adapters
        ends = [self.M * sum(shares[: i + 1]) // sum(shares) for i in range(self.adapters)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def __str__(self) -> str:
        dtypes = self.dtype
        if self.adapter_dtype != self.dtype:
            dtypes += f"/{self.adapter_dtype}"
        parts = [self.layer, f"M {self.M} N {self.N} K {self.K} r {self.r} {dtypes}"]
        if self.format != PLAIN:
            parts.append(self.format)
        if self.adapters > 1:
            parts.append(f"{self.adapters} adapters" + ", ragged" * self.ragged)
        return " ".join([*parts, f"dropout {self.dropout:g}"])


# So small that a call's time is its way through Python and PyTorch.
OVERHEAD = "overhead"

# Model -> (hidden, key and value, intermediate), from each model's config.json.
MODELS = {
    "llama-3.1-8b": (4096, 1024, 14336),
    "llama-3.1-70b": (8192, 1024, 28672),
    "qwen2.5-7b": (3584, 512, 18944),
    "qwen2.5-32b": (5120, 1024, 27648),
    "mistral-7b": (4096, 1024, 14336),
    "smollm2-135m": (576, 192, 1536),
}
# Mixture of experts -> (hidden, intermediate, experts, experts a token), from each config.json; and
# for CPUs a small one, and OLMoE's with a quarter of its sides.
EXPERTS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "small": (512, 256, 32, 4),
    "olmoe-quarter": (512, 256, 64, 8),
}
RANKS = (4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
# LoRAFusion's grid (https://arxiv.org/abs/2510.00206): M x (K = N), r 16.
GRID_M = (2048, 4096, 6144, 8192)
GRID_SIDES = (4096, 5120, 8192)

Layer = tuple[str, int, int]  # name, N, K


def projections(model: str) -> list[Layer]:
    """The seven projections of a block, those of one shape together."""
    hidden, kv, intermediate = MODELS[model]
    return [
        (f"{model} q,o", hidden, hidden),
        (f"{model} k,v", kv, hidden),
        (f"{model} gate,up", intermediate, hidden),
        (f"{model} down", hidden, intermediate),
    ]


def square(side: int) -> Layer:
    """A layer with K = N."""
    return (f"square {side}", side, side)


def _cases(
    layers: Iterable[Layer],
    M: Iterable[int],
    r: Iterable[int] = (16,),
    dropout: Iterable[float] = (0.0, 0.1),
    dtype: Iterable[str] = ("bf16",),
    adapter_dtype: str | None = None,
    format: Iterable[str] = (PLAIN,),
) -> Iterator[Case]:
    """Their product; r varies slowest, so that a run cut short has the first rank whole."""
    for rank, (layer, N, K), m, p, d, f in product(r, layers, M, dropout, dtype, format):
        yield Case(layer, m, N, K, rank, p, d, adapter_dtype or d, f)


def many_adapters(
    side: int,
    dtype: str,
    training: int,
    decoding: Iterable[int],
    format: str = PLAIN,
    adapter_dtype: str | None = None,
) -> Iterator[Case]:
    """Joint training of 4 adapters on ``training`` rows, and decoding, a row an adapter."""
    common = (side, side, 16, 0.0, dtype, adapter_dtype or dtype, format)
    for ragged in (True, False):
        yield Case("joint training", training, *common, adapters=4, ragged=ragged)
    for adapters in decoding:
        yield Case("decoding", adapters, *common, adapters=adapters)


def _overhead(dtype: str) -> Iterator[Case]:
    yield from _cases([(OVERHEAD, 64, 64)], (1,), dtype=(dtype,))


def _quick() -> Iterator[Case]:
    """What is compared most comes first: the last may be left to another call."""
    layers = [square(side) for side in GRID_SIDES] + projections("llama-3.1-8b")
    yield from _overhead("bf16")
    yield from _cases([square(4096)], (8192,), adapter_dtype="fp32")
    yield from _cases(layers, (8192, 2048), r=(16,))
    gate_up = projections("llama-3.1-8b")[2]
    formats = ("nf4", "fp8", "fp8 activations")
    yield from _cases([gate_up], (8192, 16), dropout=(0.0,), format=formats)
    for format in (PLAIN, "nf4"):
        yield from many_adapters(4096, "bf16", 8192, (64,), format)
    yield from _cases(layers, (8192, 2048), r=(64,))


def _grid() -> Iterator[Case]:
    yield from _cases(map(square, GRID_SIDES), GRID_M)


def _models() -> Iterator[Case]:
    yield from _cases((layer for model in MODELS for layer in projections(model)), (8192, 512))


def _ranks() -> Iterator[Case]:
    yield from _cases([square(4096)], (4096,), r=RANKS)


def _tokens() -> Iterator[Case]:
    yield from _cases([square(4096)], TOKENS)


def _cpu() -> Iterator[Case]:
    larger = [square(2048), ("llama-3.1-8b k,v", 1024, 4096)]
    layers = projections("smollm2-135m") + larger
    yield from _overhead("fp32")
    yield from _cases(layers, (1, 32, 128, 512), dtype=("fp32",))
    # The longest last: 512 rows in bf16 take PEFT seconds on a CPU without instructions for it.
    for M in (1, 32, 128, 512):
        yield from _cases(layers, (M,), adapter_dtype="fp32")  # PEFT's default over bf16
        yield from _cases(larger, (M,))


def _quantized() -> Iterator[Case]:
    layers = [square(4096), projections("llama-3.1-8b")[2]]
    yield from _cases(layers, (8192, 512, 16), dropout=(0.0,), format=FORMATS)


def _multi() -> Iterator[Case]:
    for side in GRID_SIDES:
        yield from many_adapters(side, "bf16", 8192, (16, 64, 256))
        yield from many_adapters(side, "bf16", 8192, (64,), "nf4")


def _cpu_quantized() -> Iterator[Case]:
    layers = [projections("smollm2-135m")[i] for i in (0, 2)]
    # For the memory of a model of 7B parameters.
    yield from _cases(
        [("llama-2-7b gate,up", 11008, 4096)], (512,), dropout=(0.0,), format=("nf4",)
    )
    yield from _cases([square(4096)], (512,), dropout=(0.0,), format=FORMATS)
    yield from _cases(layers, (512, 16), dropout=(0.0,), dtype=("fp32", "bf16"), format=FORMATS)


def _cpu_multi() -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        yield from many_adapters(576, dtype, 1024, (16, 64, 256))
    # PEFT's default over bf16
    yield from many_adapters(576, "bf16", 1024, (16, 64, 256), adapter_dtype="fp32")
    yield from many_adapters(576, "fp32", 1024, (64,), "nf4")


def _tiny() -> Iterator[Case]:
    yield from _overhead("fp32")
    yield from _cases([("tiny", 48, 32)], (5,), r=(4,), dtype=("fp32",))
    yield from _cases(
        [("tiny", 64, 64)], (5,), r=(4,), dropout=(0.0,), dtype=("fp32",), format=FORMATS
    )
    yield from many_adapters(32, "fp32", 10, (3,))
    yield from many_adapters(64, "fp32", 10, (3,), "nf4")


SELECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "quick": _quick,
    "grid": _grid,
    "models": _models,
    "ranks": _ranks,
    "tokens": _tokens,
    "quantized": _quantized,
    "multi": _multi,
    "cpu": _cpu,
    "cpu-quantized": _cpu_quantized,
    "cpu-multi": _cpu_multi,
    "tiny": _tiny,
}


def select(*names: str) -> list[Case]:
    """The cases of selections, each shape once: of two layers with the same one, the first."""
    found: dict[tuple[object, ...], Case] = {}
    for case in chain.from_iterable(SELECTIONS[name]() for name in names):
        found.setdefault(tuple(v for k, v in vars(case).items() if k != "layer"), case)
    return list(found.values())
