"""The command `fused-lora`."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import __version__
from .finetune import History, Run
from .plots import plot_losses
from .settings import ALL_PROJECTIONS, DTYPES, NAMES, Settings
from .training_state import read_state

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, highlight=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        _say(f"fused-lora {__version__}")
        raise typer.Exit


@app.callback()
def _fused_lora(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA layers fused into their base product."""
    context.with_resource(_our_warnings_said())


_DEFAULT = Settings()
_QUIET = 30.0  # seconds without a line, where there is no terminal for a progress bar


@app.command()
def finetune(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help='"smollm2", a .gguf file, a folder, or a name on the Hub.')
    ] = _DEFAULT.model,
    data: Annotated[
        str,
        typer.Option(
            help='A text file, a .jsonl or .ndjson file ("text", "messages", or "prompt" and '
            '"completion", whose prompts do not count in the loss), or python-docs.'
        ),
    ] = _DEFAULT.data,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the adapter; a free one in runs/ if none.")
    ] = None,
    r: Annotated[int, typer.Option(help="Rank of the adapters.")] = _DEFAULT.r,
    lora_alpha: Annotated[float, typer.Option(help="scaling = alpha / r.")] = _DEFAULT.lora_alpha,
    lora_dropout: Annotated[float, typer.Option()] = _DEFAULT.lora_dropout,
    target_modules: Annotated[
        str, typer.Option(help="Names of the layers, with commas between, or all-linear.")
    ] = ",".join(ALL_PROJECTIONS),
    target_parameters: Annotated[
        str,
        typer.Option(
            help="Of mixtures of experts, such as mlp.experts.gate_up_proj,mlp.experts.down_proj."
        ),
    ] = "",
    modules_to_save: Annotated[
        str,
        typer.Option(
            help="Trained in whole and saved with the adapter, such as lm_head,embed_tokens."
        ),
    ] = "",
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="scaling = alpha / sqrt(r).")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = _DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = _DEFAULT.batch_size,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = _DEFAULT.seq_len,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = _DEFAULT.lr,
    held_out: Annotated[int, typer.Option(help="Rows to measure on.")] = _DEFAULT.held_out,
    seed: Annotated[int, typer.Option()] = _DEFAULT.seed,
    dtype: Annotated[
        str, typer.Option(help="Of the frozen weights: auto, float32, bfloat16, float16.")
    ] = _DEFAULT.dtype,
    quantize: Annotated[
        str,
        typer.Option(
            help="Codes of the frozen weights: none, nf4 (QLoRA), fp4, mxfp4, int8, fp8. Or by "
            "layer: mlp.experts=mxfp4,.*_proj=none,nf4: regular expressions for the ends of paths, "
            "of which the first match counts; a format alone is for all others."
        ),
    ] = _DEFAULT.quantize,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = _DEFAULT.device,
    backend: Annotated[str, typer.Option(help="auto, triton, torch.")] = _DEFAULT.backend,
    peft: Annotated[
        bool,
        typer.Option("--peft", help="Train PEFT's own model, its layers fused (none quantised)."),
    ] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --out; only --steps may be given too.")
    ] = False,
) -> None:
    """Fine-tune a causal language model; the adapter is saved in PEFT's format."""
    options = {f.name: context.params[f.name] for f in fields(Settings)}
    for name in NAMES:
        names = map(str.strip, options[name].split(","))
        options[name] = tuple(target for target in names if target)
    for name in ("model", "data"):  # resuming and merging find them from any folder
        if Path(options[name]).exists():
            options[name] = str(Path(options[name]).resolve())
    try:
        if resume and out is None:
            raise ValueError("resume: wanted --out, the folder of the run to go on with")
        out = out or _free_folder()
        settings = _resumed(context, out) if resume else Settings(**options)
        run = Run(settings, out, resume=resume, say=_say)
        try:
            interrupted = _train(run)
        finally:
            run.processes.close()
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        raise _failed(error) from None
    if interrupted:
        raise typer.Exit(130)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder with an adapter in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, where the adapter does not name it.")
    ] = None,
) -> None:
    """Write an adapter's model with the adapter merged into its weights, as safetensors."""
    from .merge import merge_adapter

    try:
        base = merge_adapter(adapter, out, model)
    except (ValueError, TypeError, OSError) as error:
        raise _failed(error) from None
    _say(f"merged: {adapter} into {base}, saved in {out}")


@app.command()
def info(
    model: Annotated[
        str | None, typer.Option(help="Also what this model's layers would take.")
    ] = None,
    r: Annotated[int, typer.Option(help="Rank of its adapters.")] = _DEFAULT.r,
    tokens: Annotated[int, typer.Option(help="Rows of x in a call.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Of its weights.")] = "bfloat16",
) -> None:
    """Show the machine, the versions, and which backend and strategy a model's layers take."""
    from . import info

    for name, value in info.machine().items():
        _say(f"{name:12} {value}")
    if model is None:
        return
    try:
        if tokens < 0:
            raise ValueError(f"tokens: got {tokens}, wanted at least 0")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, wanted one of {list(DTYPES)}")
        report, calls = info.layers(model, r, tokens, DTYPES[dtype])
    except (ValueError, TypeError, OSError) as error:
        raise _failed(error) from None
    _say(f"\n{model}: {report}")
    for shape, explanation in calls.items():
        weight = f"weight {list(shape)}"
        _say(f"\nx [{tokens}, {shape[-1]}], {weight}, r {r}, {dtype}: {explanation}")


@app.command()
def tune(
    shapes: Annotated[
        list[str] | None, typer.Option(help="M,N,K: M rows into a weight [N, K]. Repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="All layer shapes of this model, with --tokens rows.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Rows of x, for --model.")] = 8192,
    r: Annotated[list[int], typer.Option(help="Rank. Repeatable.")] = [_DEFAULT.r],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    dropout: Annotated[bool, typer.Option("--dropout", help="With dropout, too.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:1.")] = "cuda",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that compile everything first.")
    ] = 0,
) -> None:
    """Measure every strategy and tile on this GPU and keep the best in your own table.

    The table lies in the user's cache folder; calls of these shapes take its choices from then on.
    Training never tunes.
    """
    from . import info, tables
    from .kernels.device import device_info
    from .tune import Measurement, shape, tune

    try:
        problems = [shape(text) for text in shapes or []]
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, wanted one of {list(DTYPES)}")
        if model is not None:
            _, calls = info.layers(model, r[0], tokens, DTYPES[dtype])
            problems += [(tokens, *side) for side in calls if len(side) == 2]
            if any(len(side) == 3 for side in calls):
                _say("experts: left out, nothing of theirs is tuned")
        if not problems:
            raise ValueError("shapes: got none; give --shapes M,N,K, or --model")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device: got {device}, but PyTorch sees no CUDA GPU here")
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("")

            def progress(done: int, total: int, m: Measurement) -> None:
                bar.update(task, completed=done, total=total, description=m.key)
                if m.problem:
                    _say(f"{m.key} {m.strategy or ''} {m.config}: left out: {m.problem}")

            best = tune(
                problems,
                ranks=r,
                dtypes=[DTYPES[dtype]],
                dropouts=[False, True] if dropout else [False],
                device=device,
                progress=progress,
                workers=workers,
            )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise _failed(error) from None
    for key, choice in best.items():
        _say(f"{key:56} {choice.strategy or 'tile':12} {choice.seconds * 1e6:9.1f} us")
    _say(f"saved: {tables.user_path(device_info(torch.device(device)).name)}")


def _failed(error: Exception) -> typer.Exit:
    console.print(f"error: {error}", style="red", markup=False)
    return typer.Exit(2)


def _say(line: str) -> None:
    console.print(line, markup=False)


@contextmanager
def _our_warnings_said() -> Iterator[None]:
    """While entered: as lines of the program's own."""
    show = warnings.showwarning

    def say(message: Warning | str, *rest: Any, **how: Any) -> None:
        if str(message).startswith("fused_lora:"):
            _say(f"warning: {message}")
        else:
            show(message, *rest, **how)

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


def _free_folder() -> Path:
    numbers = itertools.count(2)
    out = Path("runs/finetune")
    while out.exists():
        out = Path(f"runs/finetune-{next(numbers)}")
    return out


def _resumed(context: typer.Context, out: Path) -> Settings:
    given = [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    others = sorted(set(given) - {"resume", "out", "steps"})
    if others:
        raise ValueError(
            f"resume: goes on with the settings saved in {out}; wanted no other option than "
            f"--out and --steps, got {', '.join('--' + name.replace('_', '-') for name in others)}"
        )
    settings = read_state(out).settings
    return replace(settings, steps=context.params["steps"]) if "steps" in given else settings


def _train(run: Run) -> bool:
    """Trains, saves and reports; whether it was interrupted."""
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    first, steps = run.processes.is_first, run.settings.steps
    with Progress(*columns, console=console, disable=not first or not console.is_terminal) as bar:
        task = bar.add_task("", total=steps, completed=run.history.step, loss=0.0, rate=0.0)
        said = time.monotonic()

        def on_step(history: History, rate: float) -> None:
            nonlocal said
            bar.update(task, completed=history.step, loss=history.losses[-1], rate=rate)
            if not first or console.is_terminal:
                return
            if history.step % max(1, steps // 10) == 0 or time.monotonic() - said > _QUIET:
                said = time.monotonic()
                left = (steps - history.step) * run.settings.batch_size * run.settings.seq_len
                _say(
                    f"step {history.step}/{steps}  loss {history.losses[-1]:.3f}  "
                    f"{rate:,.0f} tokens/s  {left / rate:.0f} s left"
                )

        history = run.train(on_step)
    run.save()
    if not history.interrupted:
        history.held_out_after = run.evaluate()
    if not first:
        return history.interrupted
    plot_losses(history, run.out / "loss.png")
    _say(f"saved: {run.out}/adapter_model.safetensors, adapter_config.json, loss.png")
    if history.interrupted:
        _say(f"interrupted after step {history.step}")
        _say(f"go on with: fused-lora finetune --resume --out {run.out}")
        return True
    before, after = history.held_out_before, history.held_out_after
    _say(f"held-out loss: {before:.4f} before, {after:.4f} after")
    _say(f"kernels: {run.which_ran()}")
    if importlib.util.find_spec("peft") is None:
        _say("peft is not installed: the saved adapter was not loaded back")
        return False
    difference, effect = run.compare_with_peft()
    _say(
        f"loaded again with peft.PeftModel.from_pretrained: largest difference of the logits "
        f"{difference:.2g} (the adapter itself moves them by up to {effect:.3g})"
    )
    if run.settings.quantize != "none":
        _say(
            f"that is over the weights in {run.settings.quantize}, dequantised, on which it was "
            "trained; over the unquantised ones, or merged into them, its results are others"
        )
    return False


def main() -> None:
    """Entry point."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    sys.exit(app())
