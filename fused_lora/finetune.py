"""Fine-tuning a causal language model with LoRA: what `fused-lora finetune` runs.

Under torchrun each process takes its share of every batch and DistributedDataParallel averages the
gradients: the losses are those of one process with the same batch size. Which rows a step trains
on is a function of (seed, step), so that a resumed run goes on as if it had not been stopped.
"""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter_config import CONFIG_NAME
from .adapter_read import WEIGHTS_NAME
from .adapters import save_adapter
from .expert_layer import FusedLoRAExperts
from .expert_modules import in_order, plain_weight, projections, weight_of
from .inject import inject
from .linear import FusedLoRALinear
from .matching import find_experts, mixtures_of_experts
from .models import load_model, load_tokenizer
from .modules_to_save import find_modules_to_save
from .processes import Processes
from .quantized_weight import QuantizedWeight
from .settings import DTYPES, Settings
from .text import counted, next_token_loss, read_documents, split_held_out, token_blocks
from .training_state import STATE_NAME, TrainingState, load_tensors, read_state, save_state

_MAX_GRAD_NORM = 1.0


@dataclass
class History:
    """How a run went so far."""

    losses: list[float] = field(default_factory=list)  # of each step
    held_out_before: float = math.nan
    held_out_after: float = math.nan
    interrupted: bool = False

    @property
    def step(self) -> int:
        return len(self.losses)


class Run:
    """A model with adapters, its data and its optimiser: made once, trained, saved.

    Args:
        settings: see `Settings`.
        out: the folder that `save` writes to and ``resume`` reads from.
        resume: go on from what an earlier run saved in ``out``; ``settings`` must be that run's,
            but for ``steps`` (`training_state.read_state` has them).
        say: gets a line of text for each stage.

    Raises what reading the model or the data raises, and ValueError for a saved state that is
    damaged or another run's, before anything is trained.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        *,
        resume: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.out = settings, out
        if settings.peft and find_spec("peft") is None:
            raise ValueError("peft: is not installed; pip install 'fused-lora[peft]'")
        saved = read_state(out) if resume else None
        if saved is not None:
            done = len(saved.losses)
            if done >= settings.steps:
                raise ValueError(
                    f"steps: {out / STATE_NAME} has done {done} of {settings.steps}; "
                    "wanted a larger number"
                )
        else:
            check_new(out)
        self.processes = Processes(settings.device)
        self.device = self.processes.device
        self.say = say if self.processes.is_first else lambda _: None
        self.history = History()
        if settings.batch_size % self.processes.count:
            raise ValueError(
                f"batch_size: got {settings.batch_size}, wanted a multiple of the "
                f"{self.processes.count} processes"
            )
        tokenizer = load_tokenizer(settings.model)
        documents = read_documents(settings.data, tokenizer)
        blocks = token_blocks(documents, tokenizer, settings.seq_len)
        self.data_hash = sha256(blocks.numpy().tobytes()).hexdigest()
        self.training, self.held_out = split_held_out(blocks, settings.held_out)
        self.say(
            f"data: {settings.data}, {len(self.training)} blocks of {settings.seq_len} tokens to "
            f"train on, {len(self.held_out)} held out"
        )
        self.dtype = (
            DTYPES[settings.dtype]
            if settings.dtype != "auto"
            else (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        )
        model = load_model(settings.model, self.dtype, self.device)
        _check_vocabulary(model, blocks)
        self.model = self._attach(model)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.say(f"kernels: {self.which_ran()}")
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.0, weight_decay=0.0)
        if saved is not None:
            self._load_state(saved)

    def _attach(self, model: nn.Module) -> nn.Module:
        s = self.settings
        torch.manual_seed(s.seed)
        _, missing = find_modules_to_save(model, s.modules_to_save)
        if missing:
            raise ValueError(f"modules_to_save: the model has no module called {missing[0]}")
        if not s.peft:
            unknown = find_experts(model, s.target_parameters).skipped
            if unknown:
                why = "; ".join(f"{name} {reason}" for name, reason in unknown.items())
                there = ", ".join(mixtures_of_experts(model)) or "none"
                raise ValueError(f"target_parameters: {why}; the model's mixtures: {there}")
            report = inject(
                model,
                s.r,
                s.lora_alpha,
                self._targets(),
                target_parameters=s.target_parameters,
                modules_to_save=s.modules_to_save,
                lora_dropout=s.lora_dropout,
                use_rslora=s.use_rslora,
                backend=s.backend,
                quantize=s.codes(),
            )
            if report.unused_quantize:
                raise ValueError(report.unused_quantize[0])
            codes = f", the adapted weights in {s.quantize}" if s.quantize != "none" else ""
            self.say(f"model: {s.model} in {self.dtype}{codes}, {report}")
            return model
        from peft import LoraConfig, get_peft_model

        from .peft import fuse

        config = LoraConfig(
            r=s.r,
            lora_alpha=s.lora_alpha,  # PEFT takes floats too
            lora_dropout=s.lora_dropout,
            use_rslora=s.use_rslora,
            target_modules=self._targets(),
            target_parameters=list(s.target_parameters) or None,
            modules_to_save=list(s.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )
        wrapped: nn.Module = get_peft_model(model, config)
        self.say(f"model: {s.model} in {self.dtype}, PEFT: {fuse(wrapped, backend=s.backend)}")
        return wrapped

    def _targets(self) -> str | list[str]:
        """One name goes as it is: it may be "all-linear"."""
        targets = list(self.settings.target_modules)
        return "all-linear" if targets == ["all-linear"] else targets

    def which_ran(self) -> str:
        """Backend and strategy of the layers' calls, as "210 layers: torch, forward library"."""
        tokens = self.settings.batch_size // self.processes.count * self.settings.seq_len
        found: Counter[str] = Counter()
        training = self.model.training
        self.model.train()  # dropout counts
        for layer in _adapted(self.model):
            if not hasattr(layer, "explain"):
                found["PEFT's own"] += 1
                continue
            weight = getattr(layer, "base_layer", layer).weight
            dtype = self.dtype if isinstance(weight, QuantizedWeight) else weight.dtype
            e = layer.explain(
                torch.empty(tokens, layer.in_features, dtype=dtype, device=self.device)
            )
            found[f"{e.backend}, forward {e.strategy}, dx {e.strategy_dx}"] += 1
        for mixture, base in self._mixtures():
            first = weight_of(base, projections(base)[0])
            x = torch.empty(tokens, first.shape[2], dtype=first.dtype, device=first.device)
            index = torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)
            e = mixture.explain(x, index, x[:, :1])
            found[f"{e.backend}, forward {e.strategy}, dx {e.strategy_dx} (experts)"] += 1
        self.model.train(training)
        return "; ".join(f"{count} layers: {how}" for how, count in found.items())

    def _mixtures(self) -> Iterator[tuple[Any, Any]]:
        """Every mixture of experts with adapters, and the module that it is of."""
        if not self.settings.peft:
            for module in self.model.modules():
                if isinstance(module, FusedLoRAExperts):
                    yield module, module.base_layer
            return
        from .peft_experts import FusedPeftExperts

        for module in self.model.modules():
            if isinstance(module, FusedPeftExperts):
                yield module, module.get_base_layer()

    def evaluate(self) -> float:
        """Mean loss per token over the held-out rows. Every process measures the same."""
        self.model.eval()
        with torch.no_grad():
            losses = [self._loss(self.model, row[None]).item() for row in self.held_out]
        return sum(losses) / counted(self.held_out[:, 1])

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Summed over the tokens of ``rows`` that count."""
        tokens, labels = rows.to(self.device).unbind(1)
        return next_token_loss(model(input_ids=tokens, use_cache=False).logits, labels)

    def train(self, on_step: Callable[[History, float], None]) -> History:
        """Trains up to ``settings.steps``; a new run measures the held-out loss first.

        ``on_step(history, tokens_per_second)`` is called after each step. Ctrl-C ends it after the
        step it falls in, and the history says so; a second one raises KeyboardInterrupt. Raises
        FloatingPointError if the loss is not finite.
        """
        s, history = self.settings, self.history
        model = self.processes.wrap(self.model)
        seconds: list[float] = []
        with _interrupts() as interrupted:
            if not history.step:
                history.held_out_before = self.evaluate()
                self.say(f"held-out loss before: {history.held_out_before:.4f}")
            while history.step < s.steps and not history.interrupted:
                start = time.perf_counter()
                loss = self._step(model, history.step)
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss} at step {history.step}; a smaller lr may help"
                    )
                history.losses.append(loss)
                seconds = [*seconds[-9:], time.perf_counter() - start]
                on_step(history, len(seconds) * s.batch_size * s.seq_len / sum(seconds))
                history.interrupted = self.processes.any(interrupted()) and history.step < s.steps
        return history

    def _step(self, model: nn.Module, step: int) -> float:
        s, processes = self.settings, self.processes
        rows = self.training[batch(step, s.batch_size, len(self.training), s.seed)]
        share = rows[processes.rank :: processes.count]
        torch.manual_seed((s.seed << 32) + (step << 8) + processes.rank)  # of the dropout masks
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * learning_rate(step, s.steps)
        model.train()
        # DDP divides by the processes; tokens that count may be more in one's rows than another's.
        loss = self._loss(model, share) * processes.count / counted(rows[:, 1])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained.values(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return processes.mean(loss.detach())

    def save(self) -> None:
        """Writes the adapter in PEFT's format and what `resume` needs; each file whole or not."""
        if not self.processes.is_first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if self.settings.peft:
            self.model.save_pretrained(str(self.out))  # type: ignore[operator]
        else:
            save_adapter(self.model, self.out)
        history = self.history
        state = TrainingState(
            self.settings, self.data_hash, history.losses, history.held_out_before
        )
        save_state(self.out, state, self.trained, self.optimizer)

    def _load_state(self, state: TrainingState) -> None:
        path = self.out / STATE_NAME
        if state.settings != replace(self.settings, steps=state.settings.steps):
            raise ValueError(f"{path}: was saved by a run with other settings")
        if state.data != self.data_hash:
            raise ValueError(f"data: {self.settings.data} is not what {path} was trained on")
        load_tensors(self.out, self.trained, self.optimizer)
        self.history.losses = state.losses
        self.history.held_out_before = state.held_out_before
        self.say(f"resumed: {path}, after step {self.history.step}")

    def compare_with_peft(self) -> tuple[float, float]:
        """Loads the saved adapter with real PEFT and compares logits on a held-out row.

        Returns the largest difference from this run's logits, and the largest difference that the
        adapter makes to the base model's. Raises RuntimeError if the first is over half the second.
        """
        from peft import PeftModel

        rows = self.held_out[:1, 0].to(self.device)

        def logits(model: nn.Module) -> Tensor:
            model.eval()
            with torch.no_grad():
                found: Tensor = model(input_ids=rows, use_cache=False).logits
            return found.float()

        ours = logits(self.model)
        base = load_model(self.settings.model, self.dtype, self.device)
        for path, module in self.model.named_modules():
            if isinstance(module, FusedLoRALinear) and isinstance(module.weight, QuantizedWeight):
                weight = cast(Tensor, base.get_submodule(path).weight)
                weight.data = module.weight.dequantize(weight.dtype)  # what the adapter learned on
            elif isinstance(module, FusedLoRAExperts):
                experts = base.get_submodule(path)
                for name in in_order(experts):
                    codes = weight_of(module.base_layer, name)
                    if isinstance(codes, QuantizedWeight):
                        plain_weight(experts, name).data.copy_(codes.dequantize())
        without = logits(base)
        theirs = logits(PeftModel.from_pretrained(base, str(self.out)))
        difference = (ours - theirs).abs().max().item()
        effect = (theirs - without).abs().max().item()
        if not difference <= effect / 2:
            raise RuntimeError(
                f"PEFT's logits differ by {difference:.3g} from ours, the adapter's effect is "
                f"{effect:.3g}: {self.out} is not what was trained"
            )
        return difference, effect


def _check_vocabulary(model: Any, blocks: Tensor) -> None:
    """ValueError if the tokenizer has tokens [rows, 0, seq_len] that the model has no row for."""
    size, largest = len(model.get_input_embeddings().weight), int(blocks[:, 0].max())
    if largest >= size:
        raise ValueError(
            f"model: its tokenizer gives the token {largest}, and its embedding has {size} rows; "
            "wanted one saved after resize_token_embeddings"
        )


def _adapted(model: nn.Module) -> Iterator[Any]:
    """Every layer with an adapter, ours or PEFT's; not what is of experts' parameters."""
    for module in model.modules():
        of_peft = isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
        of_parameter = type(module).__name__ == "ParamWrapper"
        if isinstance(module, FusedLoRALinear) or (of_peft and not of_parameter):
            yield module


def check_new(out: Path) -> None:
    """Raises FileExistsError if ``out`` is a file, or a folder with an adapter or a run in it."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file, wanted a folder")
    for name in (CONFIG_NAME, WEIGHTS_NAME, STATE_NAME):
        if (out / name).exists():
            raise FileExistsError(
                f"out: {out} has an adapter in it already; wanted a new folder, or --resume"
            )


def batch(step: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """The rows that a step trains on: an epoch goes through all of them, in its own order."""
    first = step * batch_size
    positions = range(first, first + batch_size)
    epochs = {position // rows for position in positions}
    orders = {
        e: torch.randperm(rows, generator=torch.Generator().manual_seed((seed << 20) + e))
        for e in epochs
    }
    return torch.stack([orders[p // rows][p % rows] for p in positions])


def learning_rate(step: int, steps: int) -> float:
    """Share of the highest rate: up over the first tenth of the steps, then down a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. A second one raises KeyboardInterrupt as ever."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: signals are not ours there
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
