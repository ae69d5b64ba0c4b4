"""What is measured: named cases, and the selections of them that a run takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product


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

    @property
    def modes(self) -> tuple[str, ...]:
        """What is measured of it."""
        if self.layer == OVERHEAD:
            return ("overhead",)
        return ("forward", "backward", "forward+backward", "memory")

    def __str__(self) -> str:
        dtypes = self.dtype
        if self.adapter_dtype != self.dtype:
            dtypes += f"/{self.adapter_dtype}"
        sizes = f"M {self.M} N {self.N} K {self.K} r {self.r}"
        return f"{self.layer} {sizes} {dtypes} dropout {self.dropout:g}"


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
) -> Iterator[Case]:
    """Their product; r varies slowest, so that a run cut short has the first rank whole."""
    for rank, (layer, N, K), m, p, d in product(r, layers, M, dropout, dtype):
        yield Case(layer, m, N, K, rank, p, d, adapter_dtype or d)


def _overhead(dtype: str) -> Iterator[Case]:
    yield from _cases([(OVERHEAD, 64, 64)], (1,), dtype=(dtype,))


def _quick() -> Iterator[Case]:
    layers = [square(side) for side in GRID_SIDES] + projections("llama-3.1-8b")
    yield from _overhead("bf16")
    yield from _cases([square(4096)], (8192,), adapter_dtype="fp32")
    yield from _cases(layers, (8192, 2048), r=(16, 64))


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
    yield from _overhead("fp32")
    yield from _cases(projections("smollm2-135m") + larger, (1, 32, 512), dtype=("fp32", "bf16"))
    # PEFT's default over a bf16 model
    yield from _cases([square(2048)], (32, 512), adapter_dtype="fp32")


def _tiny() -> Iterator[Case]:
    yield from _overhead("fp32")
    yield from _cases([("tiny", 48, 32)], (5,), r=(4,), dtype=("fp32",))


SELECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "quick": _quick,
    "grid": _grid,
    "models": _models,
    "ranks": _ranks,
    "tokens": _tokens,
    "cpu": _cpu,
    "tiny": _tiny,
}


def select(name: str) -> list[Case]:
    """The cases of a selection, each shape once: of two layers with the same one, the first."""
    found: dict[tuple[object, ...], Case] = {}
    for case in SELECTIONS[name]():
        found.setdefault(tuple(v for k, v in vars(case).items() if k != "layer"), case)
    return list(found.values())
