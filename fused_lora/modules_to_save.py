"""PEFT's ``modules_to_save``: whole modules that are trained, and saved with the adapters.

A classifier's head, or embeddings that got new tokens. As in PEFT a copy is trained, so that
`disable_adapter` has the original, and what shares its weight with it does not follow.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from . import checks
from .paths import own_path, place_of
from .switch import Switchable

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class ModuleToSave(Switchable):
    """In the place of a module: its trained copy.

    What the module has (``weight``, ``num_embeddings``, ...) is had from here, of the copy.

    Attributes:
        original_module: frozen. trained_module: the copy.
        disabled: how many `disable_adapter` blocks it is in; in one the original one computes.
    """

    # transformers saves no tensors that share memory but those that it knows of, as patterns.
    _tied_weights_keys = {"original_module": ""}  # noqa: RUF012

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.trained_module = copy.deepcopy(module)
        self.training = module.training  # and what is in it keeps its own

    def __getattr__(self, name: str) -> Any:
        """Of this module, or else of the one that computes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "trained_module" not in self.__dict__.get("_modules", {}):
                raise  # not made yet
        return getattr(self._module(), name)

    def _module(self) -> nn.Module:
        return self.original_module if self.disabled else self.trained_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module takes and gives."""
        return self._module()(*args, **kwargs)

    def start_training(self) -> None:
        """The copy's parameters get gradients, the original ones none."""
        self.original_module.requires_grad_(False)
        for parameter in self.trained_module.parameters():
            parameter.requires_grad_(_has_gradient(parameter))


def _has_gradient(parameter: Tensor) -> bool:
    """Whether it can have one: codes have none."""
    return parameter.is_floating_point() or parameter.is_complex()


def find_modules_to_save(
    model: nn.Module, modules_to_save: object
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules whose paths end with one of the names, by path, and names that match nothing.

    Raises TypeError unless it is None or a collection of strings, ValueError for a module that is
    in another of them, at several paths, hooked, or a list of modules.
    """
    if modules_to_save is None:
        return {}, []
    kinds = (list, tuple, set, frozenset)
    if not isinstance(modules_to_save, kinds) or not all(
        isinstance(name, str) and name for name in modules_to_save
    ):
        raise TypeError(f"modules_to_save: got {modules_to_save!r}, wanted a list of names")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        owner = path.rpartition(".")[0]
        wrapped = own_path(path) == own_path(owner)  # in a wrapper, which is taken
        if own_path(path).endswith(tuple(modules_to_save)) and not wrapped:
            paths.setdefault(module, []).append(path)
    found = {path: module for module, (path, *_) in paths.items()}
    for module, (path, *others) in paths.items():
        outer = [p for p in found if path.startswith(f"{p}.")]
        if outer:
            raise ValueError(
                f"modules_to_save: {path} is in {outer[0]}, which is matched too; wanted longer "
                "names, for one of them"
            )
        if others:
            raise ValueError(
                f"modules_to_save: {path} and {others[0]} are one module, and on disk it has one "
                "path; wanted a name that one of them ends with"
            )
        if not any(map(_has_gradient, module.parameters())):
            raise ValueError(f"modules_to_save: {path} has no parameters to train")
        if isinstance(module, _CONTAINERS):
            kind = type(module).__name__
            raise ValueError(f"modules_to_save: {path} is a {kind}, which no one calls")
        for inner, each in module.named_modules(prefix=path):
            checks.check_unhooked(f"modules_to_save: {inner}", each)
    ends = tuple(map(own_path, found))
    missing = [name for name in modules_to_save if not any(path.endswith(name) for path in ends)]
    return found, missing


def warn_of_ties(model: nn.Module, saved: dict[str, nn.Module]) -> None:
    """Warns of parameters that are also used elsewhere: those places keep the original values."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for shared in names.values():
        places = {name: place_of(name, saved) for name in shared}
        here = next((name for name in shared if places[name]), None)
        others = [name for name in shared if here and places[name] != places[here]]
        if others:
            kept = next(
                (
                    f". {name} keeps the original ones: name it too to train both"
                    for name in others
                    if not places[name]
                ),
                "",
            )
            warnings.warn(
                f"fused_lora: modules_to_save: {here} is {others[0]} too; from now on each has "
                f"values of its own, as in PEFT{kept}",
                stacklevel=3,
            )


def trained_copies(model: nn.Module) -> dict[str, ModuleToSave]:
    """The model's, by path without wrappers."""
    modules = model.named_modules()
    return {own_path(path): m for path, m in modules if isinstance(m, ModuleToSave)}


def tensors_of(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module to save keeps on disk, by path in the model: of a copy, or still to be one."""
    kept = module.trained_module if isinstance(module, ModuleToSave) else module
    for name, tensor in kept.state_dict().items():
        if not isinstance(tensor, Tensor):  # of get_extra_state
            got = f"{path}.{name} is a {type(tensor).__name__}"
            raise ValueError(f"modules_to_save: {got}, and files have tensors only")
        yield f"{path}.{own_path(name)}", tensor


def unload(model: nn.Module) -> None:
    """Puts the trained copies in the places of their wrappers."""
    for path, wrapper in list(model.named_modules(remove_duplicate=False)):
        if isinstance(wrapper, ModuleToSave):
            model.set_submodule(path, wrapper.trained_module.requires_grad_(False))


def forget_ties(model: nn.Module, saved: Collection[str]) -> None:
    """Tells transformers' models which of their parameters are no longer one.

    Else ``tie_weights`` would make them one again, and so would others, of a merged model on disk,
    if its config says so.
    """
    places = list(map(own_path, saved))
    tied, cut = set[int](), dict[int, Any]()  # configs, by their address
    for prefix, module in model.named_modules():
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, name, None)
            if not isinstance(ties, dict) or isinstance(module, ModuleToSave):
                continue
            at = own_path(prefix) + "." * bool(prefix)
            kept = {
                one: other
                for one, other in ties.items()
                if place_of(at + one, places) == place_of(at + other, places)
            }
            config = getattr(module, "config", None)
            if kept:
                tied.add(id(config))
            if len(kept) < len(ties):
                setattr(module, name, kept)
                cut[id(config)] = config
    for address, config in cut.items():
        if address not in tied and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
