"""What a fine-tuning run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from . import checks
from .calls import Backend
from .codes import FORMATS, Format
from .models import SMOLLM2
from .quantize import Quantize, Quantizer
from .text import PYTHON_DOCS

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = ("target_modules", "target_parameters", "modules_to_save")  # settings that are names
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What is trained on what, and how. Raises ValueError or TypeError for what makes no sense."""

    model: str = SMOLLM2
    data: str = PYTHON_DOCS
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_PROJECTIONS
    target_parameters: tuple[str, ...] = ()  # of mixtures of experts
    modules_to_save: tuple[str, ...] = ()  # trained in whole
    use_rslora: bool = False
    steps: int = 60
    batch_size: int = 1  # rows of seq_len tokens a step, over all processes
    seq_len: int = 512
    lr: float = 1e-3  # highest of a linear warm-up over a tenth of the steps and a cosine to zero
    held_out: int = 8  # rows that are measured and not trained on
    seed: int = 0
    dtype: str = "auto"  # of the frozen weights: bfloat16 on a GPU, float32 without
    # Codes of the adapted layers' frozen weights: nf4, fp4, ..., or of those with such paths:
    # "nf4,mlp.experts=mxfp4".
    quantize: str = "none"
    device: str = "auto"
    backend: Backend = "auto"
    peft: bool = False  # train through PEFT's own model, with its layers fused
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        checks.check_rank(self.r)
        checks.check_dropout("lora_dropout", self.lora_dropout)
        checks.check_backend(self.backend)
        for name in ("use_rslora", "peft", "gradient_checkpointing"):
            checks.check_flag(name, getattr(self, name))
        for name in ("steps", "batch_size", "held_out"):
            checks.check_integer(name, getattr(self, name), 1)
        checks.check_integer("seq_len", self.seq_len, 2)
        checks.check_integer("seed", self.seed, 0)
        if self.seed >= 2**31:  # of PyTorch's 64 bits a step's number and the process take 32
            raise ValueError(f"seed: got {self.seed}, wanted less than 2^31")
        for name in ("lr", "lora_alpha"):  # with an alpha of 0 nothing is learnt
            value = getattr(self, name)
            checks.check_number(name, value)
            if value <= 0:
                raise ValueError(f"{name}: got {value}, wanted more than 0")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, wanted auto or one of {list(DTYPES)}")
        for name in ("model", "data", "device", "quantize"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, wanted a string")
        formats = self._formats()
        for _, format in formats:
            if format not in ("none", *FORMATS) or len(dict(formats)) < len(formats):
                raise ValueError(
                    f"quantize: got {self.quantize!r}, wanted none or one of {', '.join(FORMATS)}, "
                    "or PATTERN=FORMAT,... for the layers whose paths it matches"
                )
        if self.quantize != "none" and self.peft:
            raise ValueError(
                "quantize: got peft too, but PEFT's model takes no codes of ours; wanted one of "
                "them. Adapters are saved in PEFT's format without peft, too; and what PEFT trains "
                "over bitsandbytes' layers (BitsAndBytesConfig) fused_lora.peft.fuse takes"
            )
        for name in NAMES:
            targets = getattr(self, name)
            if not all(isinstance(target, str) for target in targets):
                raise TypeError(f"{name}: got {targets!r}, wanted names")
        if not self.target_modules and not self.target_parameters:
            raise TypeError(f"target_modules: got {self.target_modules!r}, wanted names")
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: got {self.device!r}, wanted auto, cpu, cuda or cuda:N")

    def _formats(self) -> list[tuple[str, str]]:
        """Patterns, the last one for all other layers if it is "", and what they get."""
        pairs = (part.rpartition("=") for part in self.quantize.split(","))
        formats = [(pattern.strip(), format.strip()) for pattern, _, format in pairs]
        return sorted(formats, key=lambda pair: pair[0] == "")

    def codes(self) -> Quantize:
        """``quantize`` as `inject` takes it."""
        formats: dict[str, Format | Quantizer | None] = {}
        for pattern, format in self._formats():
            formats.setdefault(pattern or ".*", None if format == "none" else cast(Format, format))
        return formats if formats.keys() != {".*"} else formats[".*"]
