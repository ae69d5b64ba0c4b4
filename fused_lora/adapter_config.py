"""PEFT's adapter_config.json: untrusted input, checked before anything is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import checks
from .layer_numbers import LayerNumbers
from .patterns import alphas_of, ranks_of

CONFIG_NAME = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_BLOCKS = 16  # kinds of a model's blocks
_MAX_WAYS = 1 << 14  # in which the alternatives of a pattern's groups combine

# Fields that we use, and fields that say nothing about the computation.
_USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
}
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # means something with use_qalora only
    "revision",
    "runtime_config",
    "task_type",
}
# Values under which a field that could change the computation does not. Any other field must be
# null, false or empty.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    # The others change the base weights, which a folder with A and B alone cannot bring back.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read_config(path: Path) -> dict[str, Any]:
    """The checked config with every field that we use."""
    folder = path.parent
    if folder.is_file():
        raise FileNotFoundError(f"{folder}: is a file, wanted the adapter's folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder (the Hub is not asked)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: has more than {_MAX_CONFIG_BYTES:,} bytes, is no adapter config")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a JSON {type(config).__name__}, wanted an object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: got {config.get('peft_type')!r}, wanted 'LORA'")
    for field, value in config.items():
        if field in _USED or field in _HARMLESS:
            continue
        neutral = (
            any(value is v or value == v for v in _NEUTRAL[field])
            if field in _NEUTRAL
            else (value is None or value is False or value in ("", [], {}))
        )
        if not neutral:
            raise ValueError(
                f"{path}: {field}: got {value!r}, which changes the computation and is not "
                "supported; PEFT loads it, and fused_lora.peft.fuse makes that model fast"
            )
    defaults: dict[str, Any] = {
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "target_modules": None,
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    config = defaults | {k: v for k, v in config.items() if v is not None}
    _check_config(path, config)
    return config


def numbers_of(config: dict[str, Any]) -> LayerNumbers:
    """Of the blocks that its names are for."""
    fields = ("target_modules", "layers_to_transform", "layers_pattern")
    return LayerNumbers.of(*(config[field] for field in fields))


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if "r" not in config:
        raise ValueError(f"{path}: r: is missing")
    if not config["target_modules"] and not config["target_parameters"]:
        raise ValueError(f"{path}: target_modules: is missing")
    for field in ("use_rslora", "use_dora"):
        if not isinstance(config[field], bool):
            raise ValueError(f"{path}: {field}: got {config[field]!r}, wanted true or false")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[field], dict):
            raise ValueError(f"{path}: {field}: got {config[field]!r}, wanted an object")
    lists = ("target_parameters", "modules_to_save")
    for field in ("target_modules", "exclude_modules", "layers_pattern", *lists):
        value = config[field]
        if isinstance(value, str) and field not in lists:
            _check_pattern(path, value)
        elif value is not None and not (
            isinstance(value, list) and all(isinstance(name, str) and name for name in value)
        ):
            wanted = "a list of strings" if field in lists else "a string or a list of them"
            raise ValueError(f"{path}: {field}: got {value!r}, wanted {wanted}")
    blocks = config["layers_pattern"] or ()
    blocks = (blocks,) if isinstance(blocks, str) else blocks
    if len(blocks) > _MAX_BLOCKS:
        raise ValueError(f"{path}: layers_pattern: has {len(blocks)}, wanted at most {_MAX_BLOCKS}")
    before = (f".*{pattern}" for pattern in blocks)  # as it is looked for
    for pattern in (*config["rank_pattern"], *config["alpha_pattern"], *before):
        _check_pattern(path, pattern)
    try:
        numbers_of(config)
        checks.check_rank(config["r"])
        checks.check_number("lora_alpha", config["lora_alpha"])
        ranks_of(config["rank_pattern"], config["r"], [])
        alphas_of(config["alpha_pattern"], config["lora_alpha"], [])
        checks.check_dropout("lora_dropout", config["lora_dropout"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check_pattern(path: Path, pattern: str) -> None:
    """Refuses what could take for ever to match: repeated groups, or too many ways to match."""
    marks = re.sub(r"\\.|\[[^]]*\]", "", pattern).replace("(?:", "(")
    repetitions = len(re.findall(r"[*+?{]", marks))
    ways, bars = 1, [1]  # alternatives of each open group; those outside of any only add up
    for char in marks:
        if char == "(":
            bars.append(1)
        elif char == "|":
            bars[-1] += 1
        elif char == ")" and len(bars) > 1:
            ways = min(ways * bars.pop(), _MAX_WAYS + 1)
    # A repetition can end at any character of a path, of which there are some sixty.
    most = max(4, _MAX_WAYS >> 5 * max(repetitions - 1, 0))
    # In verbose mode spaces can stand between a group and its repetition.
    verbose = re.search(r"\(\?[a-zA-Z-]*x", marks)
    if verbose or re.search(r"\)[*+?{]", pattern) or repetitions > 4 or ways > most:
        raise ValueError(
            f"{path}: got the pattern {pattern!r}, wanted at most four repetitions, none of a "
            f"group, and at most {_MAX_WAYS} combinations of alternatives, with repetitions fewer"
        )
