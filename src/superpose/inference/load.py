"""A model folder (or MODEL+ADAPTER) in memory, ready to read rows: by transformers, or by a function of the user."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superpose.checkpoints.architecture import Architecture, read_architecture
from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.lora import Adapter
from superpose.checkpoints.models import open_model
from superpose.errors import SuperposeError, nearest, raise_all
from superpose.inference.encoders import (
    causal_encoder,
    class_encoder,
    read_tokenizer,
    seq2seq_encoder,
)
from superpose.inference.examples import LiveModel
from superpose.inference.heads import read_head, with_head
from superpose.inference.library import quietly, the_library
from superpose.reading import read_tensor
from superpose.task_data import TaskData

ONE_AT_A_TIME = threading.RLock()
"""transformers changes its classes while it loads, so that no weights are initialised or tied, and puts them back: two
threads at once leave them changed. A loader may load by this as well."""
_ALIGNMENT = 64
"""Bytes, of torch's own memory."""


def load_model(location: str, task: TaskData, device: torch.device | None = None) -> LiveModel:
    """Return a model in memory that reads a task's rows, in float32 and without dropout.

    Args:
        location: folder, hub id, or MODEL+ADAPTER.
        task: which columns it reads, and what stands on top of it.
        device: where it goes; the CPU when not given.

    Returns:
        The model.

    Raises:
        SuperposeError: there is no such model, it lacks weights, or nothing is known that would answer the task.
    """
    checkpoint = _open(location)
    with ONE_AT_A_TIME:
        found = _call_loader(task, checkpoint) if task.loader else _by_transformers(checkpoint, task)
    found.module.eval()
    _align(found.module)
    if device is not None:
        found.module.to(device)
    return found


def _align(module: nn.Module) -> None:
    """Give weights that are views of files memory of their own, where torch would have put them.

    Products of matrices round in another way where these begin at odd addresses: results would depend on the layout of
    the files.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _open(location: str) -> Checkpoint:
    checkpoint = open_model(location)
    if isinstance(checkpoint, Adapter):
        what = "an adapter alone is no model that can be run"
        raise SuperposeError(what, where=location, mend="name the model that it is for: MODEL+ADAPTER")
    raise_all(list(checkpoint.problems))
    return checkpoint


def _by_transformers(checkpoint: Checkpoint, task: TaskData) -> LiveModel:
    library = the_library("running a model")
    folder, where = checkpoint.folder, checkpoint.name
    if folder is None or "model_type" not in checkpoint.config:
        what = "no config.json with a model_type: transformers cannot build it"
        raise SuperposeError(what, where=where, mend="give a model folder, or make the model yourself: --loader")
    architecture = read_architecture(folder, checkpoint.config, len(checkpoint.tensors))
    with quietly():
        try:
            config = library.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library fails in many ways; its text says how
            what = f"transformers cannot read its config: {str(error).strip().partition(chr(10))[0]}"
            mend = "check the folder's config.json; code that comes with a model is never run: load it by --loader"
            raise SuperposeError(what, where=f"{folder}/config.json", mend=mend) from error
        model_class = _body_class(library, config) if task.head else _head_class(library, config, where)
        module = _fill(model_class, config, checkpoint)
    names = _names(checkpoint, module, architecture)
    in_x_out = _in_x_out(module, names)
    family = _family(library, model_class)
    if task.head:
        head = read_head(Path(task.head).expanduser(), _width(config))
        encode = class_encoder(library, folder, task, head.classes, head.layer.out_features)
        return LiveModel(
            module, encode, with_head(module, head.layer, task.pooling), "classes", names, head.classes, in_x_out
        )
    if family in ("causal", "seq2seq"):
        tokenizer = read_tokenizer(library, folder)
        causal = family == "causal"
        encode = causal_encoder(tokenizer, task) if causal else seq2seq_encoder(tokenizer, folder, task, module)

        def tokens(inputs: Any) -> torch.Tensor:
            return module(**inputs, use_cache=False).logits

        return LiveModel(module, encode, tokens, "tokens", names, in_x_out=in_x_out, tokenizer=tokenizer)
    if family == "classes":
        if getattr(config, "pad_token_id", None) is None:
            module.config.pad_token_id = (
                -1
            )  # decoders look for the last token that is no padding, and nothing is padded
        classes = _class_names(config)
        encode = class_encoder(library, folder, task, classes, int(config.num_labels))
        return LiveModel(module, encode, lambda inputs: module(**inputs).logits, "classes", names, classes, in_x_out)
    encode = class_encoder(library, folder, task, (), 0)

    def features(inputs: Any) -> torch.Tensor:
        found = module(**inputs)
        return found.last_hidden_state if hasattr(found, "last_hidden_state") else found[0]

    return LiveModel(module, encode, features, "features", names, in_x_out=in_x_out)


def _fill(model_class: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """Build the model with the checkpoint's tensors, whatever files they come from."""
    tensors = {name: read_tensor(header) for name, header in checkpoint.tensors.items()}
    tensors |= {alias: tensors[name] for alias, name in checkpoint.aliases.items() if name in tensors}
    try:
        module, told = model_class.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # the library fails in many ways; its text says how
        what = f"transformers cannot load it: {str(error).strip().partition(chr(10))[0]}"
        raise SuperposeError(what, where=checkpoint.name, mend="check the folder's config.json") from error
    if lacking := sorted(told["missing_keys"]):
        mend = "give the folder of a whole model, or of its body with --head"
        raise SuperposeError(f"the model folder lacks {lacking[0]}", where=checkpoint.name, mend=mend)
    return module


def _head_class(library: Any, config: Any, where: str) -> Any:
    names = config.architectures or []
    found = getattr(library, names[0], None) if names else None
    if not isinstance(found, type):
        what = f"transformers {library.__version__} has no {names[0] if names else 'class for it'}"
        raise SuperposeError(what, where=where, mend="name its class in config.json (architectures), or use --loader")
    return found


def _body_class(library: Any, config: Any) -> Any:
    return library.models.auto.modeling_auto.MODEL_MAPPING[type(config)]


def _family(library: Any, model_class: type) -> str:
    """Return what a class of transformers answers with: "classes", "causal", "seq2seq", or "features"."""
    auto = library.models.auto.modeling_auto
    families = {
        "classes": ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
        "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
        "causal": ("CAUSAL_LM",),
    }
    for family, tables in families.items():
        for table in tables:
            if model_class.__name__ in _flat(getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()):
                return family
    return "features"


def _flat(values: Any) -> set[str]:
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}


def _class_names(config: Any) -> tuple[str, ...]:
    told = getattr(config, "id2label", None) or {}
    names = tuple(str(told.get(number, f"LABEL_{number}")) for number in range(int(config.num_labels)))
    return () if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _width(config: Any) -> int | None:
    return getattr(config, "hidden_size", None) or getattr(config, "d_model", None)


def _names(checkpoint: Checkpoint, module: nn.Module, architecture: Architecture) -> dict[str, str]:
    """Return the module's name of each tensor of the checkpoint, where it is found there."""
    there = {
        *dict(module.named_parameters(remove_duplicate=False)),
        *dict(module.named_buffers(remove_duplicate=False)),
    }
    prefix = str(getattr(module, "base_model_prefix", ""))
    found = {}
    for name in checkpoint.tensors:
        path = architecture.path(name)
        # A body read from a whole model's files lacks the prefix, and the other way round.
        tried = (name, path, f"{prefix}.{name}", path.removeprefix(f"{prefix}."), name.removeprefix(f"{prefix}."))
        match = next((candidate for candidate in tried if candidate in there), None)
        if match is not None:
            found[name] = match
    return found


def _in_x_out(module: nn.Module, names: dict[str, str]) -> frozenset[str]:
    """Return the tensors of linear maps that are stored in x out (GPT-2's)."""
    turned = {f"{place}.weight" for place, part in module.named_modules() if type(part).__name__ == "Conv1D"}
    return frozenset(name for name, parameter in names.items() if parameter in turned)


def _call_loader(task: TaskData, checkpoint: Checkpoint) -> LiveModel:
    function = find_function(task.loader, "--loader")
    place = checkpoint.folder or (checkpoint.files[0] if checkpoint.files else None)
    if place is None or "+" in checkpoint.name:
        mend = "merge the adapter into its model first"
        raise SuperposeError("a loader is given the folder of one model", where=checkpoint.name, mend=mend)
    try:
        found = function(place, task)
    except SuperposeError:
        raise
    except Exception as error:  # it is anybody's code; the text says what happened
        what = f"the loader failed: {type(error).__name__}: {error}"
        raise SuperposeError(
            what, where=task.loader, mend="mend it; it gets the model's folder and the task"
        ) from error
    if not isinstance(found, LiveModel):
        what = f"the loader returned {type(found).__name__}"
        raise SuperposeError(what, where=task.loader, mend="return a superpose.inference.LiveModel")
    unknown = sorted(set(found.names.values()) - set(found.module.state_dict()))
    if unknown:
        mend = nearest(unknown[0], found.module.state_dict())
        raise SuperposeError(
            f"the loader's names tell of {unknown[0]}, which its module lacks", where=task.loader, mend=mend
        )
    return replace(found, module=found.module.float())


def find_function(named: str, where: str) -> Any:
    """Return what `module:function` or `file.py:function` names; importing it runs its code.

    Args:
        named: the text.
        where: who says it, for errors.

    Returns:
        The function.

    Raises:
        SuperposeError: there is none.
    """
    module_name, colon, function_name = named.rpartition(":")
    mend = "write module:function or file.py:function"
    if not colon or not module_name or not function_name:
        raise SuperposeError(f"'{named}' names no function", where=where, mend=mend)
    try:
        module = _module(module_name)
    except Exception as error:  # it is anybody's code; the text says what happened
        what = f"'{module_name}' cannot be imported: {type(error).__name__}: {error}"
        raise SuperposeError(what, where=where, mend=mend) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SuperposeError(f"'{module_name}' has no function '{function_name}'", where=where, mend=mend)
    return function


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    file = Path(name).expanduser()
    spec = importlib.util.spec_from_file_location(f"superpose_loader_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
