"""What a model's tensors are, told by its modules: transformers builds the model without weights.

The names of a model in memory can differ from those in its files; transformers' own renaming connects the two.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superpose.checkpoints import known_architectures
from superpose.kinds import Kind

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """What the modules of a model say.

    Args:
        kinds: tensor name, as in the files, to kind.
        groups: names of grouped convolutions' weights, to their number of groups.
        tied: names that share another tensor's memory, to that tensor's name.
        reason: why nothing is known, "" when something is.
        paths: tensor name, as in the files, to its name in the model, where that is another.
        body: prefix of the body's names in the model, which files of a body saved alone lack.
    """

    kinds: Mapping[str, Kind] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    body: str = ""

    def path(self, name: str) -> str:
        """Return a tensor's name in the model, which is what adapters call it, given that in the files."""
        if self.body and name not in self.kinds and f"{self.body}.{name}" in self.kinds:
            name = f"{self.body}.{name}"
        return self.paths.get(name, name)


def read_architecture(folder: Path | None, config: Mapping[str, Any], tensors: int | None = None) -> Architecture:
    """Return what the modules of the model in a folder say about its tensors.

    Args:
        folder: where config.json lies; None for a bare weight file.
        config: its content.
        tensors: how many the checkpoint has, if known; a config that asks for more layers than that is not built.

    Returns:
        Kinds, groups and ties; empty, with the reason, where transformers is missing or does not know the model.
    """
    if folder is None or "model_type" not in config:
        return Architecture(reason="no config.json with a model_type")
    place = known_architectures.place_of(config, tensors, Path(__file__))
    if (known := _recalled(known_architectures.recall(place))) is not None:
        return known
    try:
        import torch
        import transformers
    except ImportError:
        return Architecture(reason="transformers is not installed (pip install 'superpose[transformers]')")
    if tensors is not None and _most_layers(config) > tensors:
        return Architecture(reason="its config.json asks for more layers than it has tensors")
    names = config.get("architectures") or ["AutoModel"]
    name = names[0] if isinstance(names, list) else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(model_class, type):
        return Architecture(reason=f"transformers {transformers.__version__} has no {name or names}")
    # A library for a thousand architectures fails in as many ways, none of which should stop a merge: names and shapes
    # tell kinds too. The plan shows the reason.
    try:
        with _quietly(), torch.device("meta"):
            loaded = transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            build = getattr(model_class, "_from_config", None) or model_class.from_config
            model = build(loaded)
            found = _read_modules(model)
    except Exception as error:  # any failure of the library leaves names and shapes, and is shown as the reason
        return Architecture(reason=f"transformers could not build it: {str(error).strip().partition(chr(10))[0][:120]}")
    known_architectures.keep(place, asdict(found))
    return found


def _recalled(content: Any) -> Architecture | None:
    """Return what was written by `read_architecture` before; None for anything else."""
    try:
        kinds = {str(name): Kind(kind) for name, kind in content["kinds"].items()}
        groups = {str(name): int(count) for name, count in content["groups"].items()}
        tied, paths = ({str(name): str(to) for name, to in content[key].items()} for key in ("tied", "paths"))
        return Architecture(kinds, groups, tied, paths=paths, body=str(content["body"]))
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return None


def _most_layers(config: Mapping[str, Any]) -> int:
    """Return the largest number of layers that a config, or one inside it, asks for."""
    found = [0]
    for key, value in config.items():
        if isinstance(value, Mapping):
            found.append(_most_layers(value))
        elif ("layer" in key or "depth" in key) and isinstance(value, int) and not isinstance(value, bool):
            found.append(value if key.startswith(("num_", "n_")) or key.endswith("layers") else 0)
        elif key == "depths" and isinstance(value, list):
            found += [entry for entry in value if isinstance(entry, int)]
    return max(found)


def _read_modules(model: nn.Module) -> Architecture:
    # Tensors are told apart by identity, so all of them have to stay alive while names are looked up.
    as_saved = _state_as_saved(model)
    names: dict[int, list[str]] = {}
    for name, tensor in as_saved.items():
        names.setdefault(id(tensor), []).append(name)
    kinds: dict[str, Kind] = {}
    groups: dict[str, int] = {}
    paths: dict[str, str] = {}
    heads = _head_modules(model)
    for place, module in model.named_modules():
        for parameter_name, tensor in module.named_parameters(recurse=False):
            kind = _kind(module, parameter_name, tensor, module in heads)
            own = f"{place}.{parameter_name}" if place else parameter_name
            told = names.get(id(tensor), ())
            paths |= {name: own for name in told[:1] if own not in told}
            for name in told:
                if kind is not None:
                    kinds.setdefault(name, kind)
                if kind is Kind.CONV and parameter_name == "weight" and getattr(module, "groups", 1) > 1:
                    groups[name] = int(getattr(module, "groups", 1))
        for _, tensor in module.named_buffers(recurse=False):
            for name in names.get(id(tensor), ()):
                kinds[name] = Kind.BUFFER
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    body = str(getattr(model, "base_model_prefix", ""))
    return Architecture(kinds, groups, dict(tied) if isinstance(tied, Mapping) else {}, paths=paths, body=body)


def _kind(module: nn.Module, parameter: str, tensor: Any, is_head: bool) -> Kind | None:
    """Return a parameter's kind from its module, None where the module does not tell."""
    import torch

    type_name = type(module).__name__
    if "norm" in type_name.lower():
        return Kind.NORM
    if is_head:
        return Kind.HEAD
    if isinstance(module, torch.nn.Embedding):
        return Kind.EMBEDDING
    linear = isinstance(module, torch.nn.Linear) or type_name == "Conv1D"
    if parameter == "bias" and (linear or hasattr(module, "kernel_size")):
        return Kind.BIAS
    if linear and parameter == "weight":
        return Kind.LINEAR
    if hasattr(module, "kernel_size") and tensor.ndim >= 3:
        return Kind.CONV
    if tensor.numel() == 1:
        return Kind.SCALAR
    return None


def _head_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that project to a vocabulary or to classes."""
    import torch

    heads: set[nn.Module] = set()
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None
    if output is not None:
        heads.add(output)
    config: Any = getattr(model, "config", None)
    labels = getattr(config, "num_labels", None)
    body = getattr(model, "base_model", model)
    if body is model:
        return heads
    inside = set(body.modules())
    for module in model.modules():
        outside = module not in inside and isinstance(module, torch.nn.Linear)
        if outside and module.out_features in (labels, getattr(config, "vocab_size", None)):
            heads.add(module)
    return heads


def _state_as_saved(model: Any) -> dict[str, Any]:
    """Return the model's tensors by the names that `save_pretrained` would give them.

    A tensor that the renaming puts together from several is a new one: its kind is told by name and shape.
    """
    state = model.state_dict(keep_vars=True)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 the names are the same
        return dict(state)
    return dict(revert_weight_conversion(model, dict(state)))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' messages about a model that is built only to be looked at from the user's terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
