"""LoRA adapters as PEFT writes them (and loralib's state dicts): headers in, low-rank updates of a base's tensors out.

    update of a module = scale * B @ A,   A: rank x in,   B: out x rank,   scale = alpha / rank (sqrt(rank): rsLoRA)

Stored weights that are in x out (GPT-2, embeddings) get the transposed update. What is no sum with low-rank factors is
refused by name; DoRA is one after its weights are written out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose.checkpoints.adapted import AdaptedTensor, FactorPair
from superpose.checkpoints.files import formats, headers_of, read_json
from superpose.checkpoints.headers import TensorHeader
from superpose.errors import SuperposeError, nearest

ADAPTER_CONFIG = "adapter_config.json"
LONGEST_PATTERN, MOST_REPEATS = 200, 3
"""Of a pattern for ranks: beyond, matching it can take for ever."""
MOST_MATCHING = 200_000_000
"""Steps that matching all patterns with all modules may take: a pattern with three repeats takes the cube of a name."""
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Models, and linear maps in them, whose weights are stored in x out."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
WRITE_OUT = "apply it to its base (peft's merge_and_unload) and give the model that this saves"
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<end>\.weight|\.bias)?"
)
_FULL = re.compile(r"(?P<module>.+?)(?:\.modules_to_save)?(?:\.default)?(?:\.base_layer)?\.(?P<end>weight|bias)")
_FOREIGN = re.compile(r"\b(lora_\w+|trainable_tokens\w*|vera_\w+|ia3_\w*|hada_\w+|lokr_\w+|oft_\w+|prompt_\w+)\b")
# What these change, factors alone do not tell.
_REFUSED = {
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "layer_replication": "layers are replicated",
    "trainable_token_indices": "single tokens' rows are trained",
    "target_parameters": "factors act on parameters that are no module's weight",
    "use_bdlora": "factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "monteclora_config": "factors are random",
    "velora_config": "it is no plain LoRA",
    "kasa_config": "it is no plain LoRA",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraModule:
    """The factors of one module.

    Args:
        path: of the module in the model.
        down: A.
        up: B.
        scale: factor on B @ A.
        embedding: whether the module looks rows up, so that its weight is the transposed update.
        fan_in_fan_out: whether the adapter says that the weight is stored in x out.
        enabled: which maps of a fused projection have factors (loralib's MergedLinear); () for all as one.
        bias: of B, if there is one.
        magnitude: DoRA's, if there is one.
    """

    path: str
    down: TensorHeader
    up: TensorHeader
    scale: float
    embedding: bool = False
    fan_in_fan_out: bool = False
    enabled: tuple[bool, ...] = ()
    bias: TensorHeader | None = None
    magnitude: TensorHeader | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows out and columns in of the update, kernels flattened."""
        groups = sum(self.enabled)
        out = self.up.shape[0] // groups * len(self.enabled) if groups else self.up.shape[0]
        return out, math.prod(self.down.shape[1:])

    def pairs(self, transposed: bool) -> tuple[FactorPair, ...]:
        """Return its updates: one, or one for each map of a fused projection that has factors."""
        if not self.enabled:
            rows = (0, self.down.shape[0]), (0, self.up.shape[0])
            return (FactorPair(self.down, self.up, self.scale, transposed, *rows, looked_up=self.embedding),)
        groups = sum(self.enabled)
        rank, tall = self.down.shape[0] // groups, self.up.shape[0] // groups
        places = [number for number, used in enumerate(self.enabled) if used]
        return tuple(
            FactorPair(
                self.down, self.up, self.scale, transposed,
                (group * rank, (group + 1) * rank), (group * tall, (group + 1) * tall), place * tall,
            )
            for group, place in enumerate(places)
        )  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """One adapter, known by its headers.

    Args:
        name: what the user called it.
        folder: where it lies.
        revision: the commit that a hub id resolved to, "" for local ones.
        base: what it says it was trained on, "" if it does not say.
        config: content of adapter_config.json.
        modules: those with factors, by path.
        full: tensors that it replaces as a whole, by their names in the model.
        copies: the base's own weights of modules with factors, which PEFT saves for embeddings.
        problems: what is wrong with its files.
    """

    name: str
    folder: Path
    revision: str
    base: str
    config: Mapping[str, Any]
    modules: Mapping[str, LoraModule]
    full: Mapping[str, TensorHeader]
    copies: Mapping[str, TensorHeader]
    problems: tuple[SuperposeError, ...]

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """What it changes, by the names of the model: each with a tensor that tells of it."""
        return {**self.full, **{f"{path}.weight": module.down for path, module in self.modules.items()}}

    @property
    def files(self) -> list[Path]:
        """Its weight files."""
        return sorted({header.file for header in self.tensors.values()})


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def open_adapter(folder: Path, name: str, revision: str = "") -> Adapter:
    """Read an adapter's config and headers; no tensor is read.

    Args:
        folder: with adapter_config.json and the weights.
        name: what the user called it.
        revision: the commit that a hub id resolved to.

    Returns:
        The adapter; what is wrong with it is in its `problems`.

    Raises:
        SuperposeError: it has no readable config or weights.
    """
    config_file = folder / ADAPTER_CONFIG
    config = read_json(config_file)
    if not isinstance(config, dict):
        mend = "fetch or save the adapter again"
        raise SuperposeError("the adapter's config is no mapping", where=str(config_file), mend=mend)
    problems = _refusals(config, config_file)
    found = headers_of(_weight_file(folder))
    problems += found.problems
    if problems:
        return Adapter(name, folder, revision, _base_of(config), config, {}, {}, {}, tuple(problems))
    parts, full = {}, {}
    for key, header in sorted(found.tensors.items()):
        inner = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(inner):
            word = match["part"] + (".bias" if match["end"] == ".bias" else "")
            parts.setdefault(match["module"], {})[word] = header
        elif (match := _FULL.fullmatch(inner)) and not _FOREIGN.search(inner):
            full[f"{match['module']}.{match['end']}"] = header
        else:
            what = f"tensor {key} is no part of LoRA that is known here"
            problems.append(SuperposeError(what, where=str(header.file), mend=WRITE_OUT))
    modules = {}
    if problem := _slow_patterns(config, parts):
        problems.append(SuperposeError(problem, where=str(config_file), mend="write module names in place of patterns"))
        parts = {}
    for path, headers in parts.items():
        try:
            modules[path] = _module(path, headers, config, config_file)
        except SuperposeError as problem:
            problems.append(problem)
    if not modules and not full and not problems:
        mend = "give an adapter with weights"
        problems.append(SuperposeError("the adapter holds no tensors", where=str(folder), mend=mend))
    copies = {name: full.pop(name) for name in list(full) if name.removesuffix(".weight") in modules}
    return Adapter(name, folder, revision, _base_of(config), config, modules, full, copies, tuple(problems))


def stores_in_x_out(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether a model stores its linear maps in x out, as GPT-2 does; by its config, else by a fused projection."""
    if "model_type" in config:
        return config["model_type"] in CONV1D_MODELS
    fused = (header.shape for name, header in tensors.items() if name.endswith("attn.c_attn.weight"))
    return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in fused)


def adapted_tensor(
    module: LoraModule, name: str, shape: tuple[int, ...], *, in_x_out: bool | None, onto: TensorHeader | None = None
) -> AdaptedTensor:
    """Return a module's weight with the adapter applied.

    Args:
        module: the factors.
        name: of the weight.
        shape: of the weight as stored.
        in_x_out: whether the model stores its linear maps so, which a square weight does not show; None where only the
            adapter's own word is there. That word is for all of its modules at once, and can be wrong.
        onto: the weight that is adapted; None for that of the merge's base.

    Returns:
        The header.

    Raises:
        SuperposeError: the factors do not fit the weight.
    """
    out, in_ = module.size
    flat = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape
    fits, turned = flat == (out, in_), flat == (in_, out)
    if not fits and not turned:
        shown = " x ".join(map(str, shape))
        what = f"an update of {out} x {in_} does not fit a weight of {shown}"
        where = f"{module.down.file}, tensor {module.down.name} (base: {name})"
        raise SuperposeError(what, where=where, mend="use an adapter of this very base")
    said = module.fan_in_fan_out if in_x_out is None else in_x_out and _is_conv1d(module.path)
    transposed = turned and (not fits or module.embedding or said)
    header = module.down
    return AdaptedTensor(
        name, header.dtype, shape, header.file, onto=onto, pairs=module.pairs(transposed), magnitude=module.magnitude
    )


def _is_conv1d(path: str) -> bool:
    return path.rpartition(".")[2] in CONV1D_MODULES


def stored_shape(module: LoraModule) -> tuple[int, ...]:
    """Return a weight's shape as stored, where only the adapter tells."""
    out, in_ = module.size
    if module.embedding or module.fan_in_fan_out:
        return in_, out
    return out, *module.down.shape[1:]


def _module(path: str, headers: Mapping[str, TensorHeader], config: Mapping[str, Any], file: Path) -> LoraModule:
    embedding = "lora_embedding_A" in headers
    ending = "embedding_" if embedding else ""
    down, up = headers.get(f"lora_{ending}A"), headers.get(f"lora_{ending}B")
    if down is None or up is None:
        there = next(iter(headers.values()))
        missing = "A" if down is None else "B"
        what = f"module {path} has no lora_{ending}{missing}"
        raise SuperposeError(what, where=f"{there.file}, tensor {there.name}", mend="fetch or save the adapter again")
    where = f"{down.file}, tensor {down.name}"
    if len(down.shape) < 2 or len(up.shape) != len(down.shape) or math.prod(up.shape[2:]) != 1 or not up.shape[1]:
        what = f"factors of shapes {list(down.shape)} and {list(up.shape)} make no update"
        raise SuperposeError(what, where=where, mend=WRITE_OUT)
    if not (down.is_float and up.is_float):
        raise SuperposeError(f"factors of dtype {down.dtype} are no LoRA", where=where, mend=WRITE_OUT)
    rank, enabled = up.shape[1], _enabled(path, down, up, config, file)
    declared = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    if not _is_number(alpha) or not _is_number(declared) or declared < 1:
        mend = "write r and lora_alpha, as they were in training, into it"
        raise SuperposeError("the adapter does not say r and lora_alpha", where=str(file), mend=mend)
    if declared != rank:
        what = f"its factors have rank {rank}, {ADAPTER_CONFIG} says {declared}"
        raise SuperposeError(what, where=where, mend="mend r or rank_pattern, or fetch the adapter again")
    magnitude = headers.get("lora_magnitude_vector")
    if magnitude is None and config.get("use_dora"):
        what = f"module {path} has no lora_magnitude_vector, and {ADAPTER_CONFIG} says use_dora"
        raise SuperposeError(what, where=where, mend="fetch or save the adapter again")
    if magnitude is not None and magnitude.numel != up.shape[0]:
        what = f"{magnitude.numel} magnitudes for {up.shape[0]} rows"
        raise SuperposeError(what, where=f"{magnitude.file}, tensor {magnitude.name}", mend="fetch the adapter again")
    if magnitude is not None and (embedding or len(down.shape) > 2):
        raise SuperposeError("DoRA of an embedding or a convolution", where=where, mend=WRITE_OUT)
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    bias = headers.get(f"lora_{ending}B.bias")
    return LoraModule(path, down, up, scale, embedding, bool(config.get("fan_in_fan_out")), enabled, bias, magnitude)


def _enabled(
    path: str, down: TensorHeader, up: TensorHeader, config: Mapping[str, Any], file: Path
) -> tuple[bool, ...]:
    """Return which maps of a fused projection have factors of their own, () for a single map."""
    rank = up.shape[1]
    if down.shape[0] == rank:
        return ()
    groups, rest = divmod(down.shape[0], rank)
    where = f"{down.file}, tensor {down.name}"
    if len(down.shape) > 2:
        raise SuperposeError("factors of a grouped convolution", where=where, mend=WRITE_OUT)
    if rest or up.shape[0] % groups:
        what = f"factors of shapes {list(down.shape)} and {list(up.shape)} do not belong together"
        raise SuperposeError(what, where=where, mend="fetch or save the adapter again")
    given = config.get("enable_lora")
    if not isinstance(given, list) or sum(map(bool, given)) != groups:
        what = f"module {path} has factors for {groups} maps of a fused projection, and nothing says which"
        mend = f'write "enable_lora": [true, false, true] (for query and value of three) into {file}'
        raise SuperposeError(what, where=where, mend=mend)
    return tuple(map(bool, given))


def _refusals(config: Mapping[str, Any], file: Path) -> list[SuperposeError]:
    """Return what makes an adapter something else than low-rank updates of its base."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        mend = f"{WRITE_OUT}, or turn it into LoRA (peft.convert_to_lora)"
        return [SuperposeError(f"an adapter of type {kind} is no LoRA", where=str(file), mend=mend)]
    problems = []
    for key, why in _REFUSED.items():
        if config.get(key):
            problems.append(SuperposeError(f"{key}: {why}", where=str(file), mend=WRITE_OUT))
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        what = f"init_lora_weights: {start} changes the base before training, so that factors alone are no update of it"
        mend = "save it as LoRA (peft's path_initial_model_for_weight_conversion), and set init_lora_weights to true"
        problems.append(SuperposeError(what, where=str(file), mend=mend))
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        sound = isinstance(pattern, dict) and all(_is_number(value) for value in pattern.values())
        if not sound or not all(_is_pattern(word) for word in pattern):
            mend = "fetch or save the adapter again"
            problems.append(SuperposeError(f"{key} is no mapping of patterns to numbers", where=str(file), mend=mend))
    return problems


def _is_pattern(word: str) -> bool:
    if re.search(r"\)[*+{]", word) or _repeats(word) > MOST_REPEATS or len(word) > LONGEST_PATTERN:
        return False
    try:
        re.compile(word)
    except re.error:
        return False
    return True


def _slow_patterns(config: Mapping[str, Any], paths: Collection[str]) -> str:
    """Return what is said of patterns that would take long to match, "" if they do not."""
    longest = max(map(len, paths), default=0)
    patterns = [word for key in ("rank_pattern", "alpha_pattern") for word in config.get(key) or ()]
    steps = len(paths) * sum(max(longest, 1) ** max(_repeats(word), 1) for word in patterns)
    return "" if steps <= MOST_MATCHING else f"matching {len(patterns)} patterns for ranks would take too long"


def _repeats(word: str) -> int:
    return len(re.findall(r"[*+{]", word))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2.0**53


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """Return the value of the first pattern that the end of a module's path matches, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _base_of(config: Mapping[str, Any]) -> str:
    return str(config.get("base_model_name_or_path") or "")


def _weight_file(folder: Path) -> Path:
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            return folder / name
    loose = sorted(file for file in folder.iterdir() if file.suffix in formats() and file.is_file())
    if len(loose) == 1:  # loralib's state dicts have any name
        return loose[0]
    found = ", ".join(file.name for file in loose) or "none"
    mend = f"save the adapter again (weights here: {found})"
    raise SuperposeError(f"the folder has no {ADAPTER_FILES[0]}", where=str(folder), mend=mend)


def match_names(paths: Sequence[str], names: Mapping[str, Any]) -> tuple[str, str]:
    """Find how an adapter's names and those of a base correspond: saved with or without the prefix of a body.

    Args:
        paths: the tensors that the adapter changes, as it names them.
        names: of the base's tensors.

    Returns:
        (to strip from an adapter's name, to put before it) such that most are found.
    """
    heads = sorted({name.partition(".")[0] + "." for name in names if "." in name})
    strips = sorted({path.partition(".")[0] + "." for path in paths if "." in path})
    candidates = [("", ""), *(("", head) for head in heads), *((strip, "") for strip in strips)]
    candidates += [(strip, head) for strip in strips for head in heads]

    def found(pair: tuple[str, str]) -> int:
        return sum(path.startswith(pair[0]) and pair[1] + path[len(pair[0]) :] in names for path in paths)

    return max(candidates, key=found)


def unknown(paths: Sequence[str], names: Sequence[str], adapter: Adapter) -> list[SuperposeError]:
    """Return the problem that an adapter changes tensors which the base does not have."""
    if not paths:
        return []
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    what = f"it changes {len(paths)} tensor{'s' if len(paths) > 1 else ''} that the base does not have: {shown}"
    trained = f"; it was trained on {adapter.base}" if adapter.base else ""
    mend = f"use an adapter of this very base{trained}; {nearest(paths[0], names)}"
    return [SuperposeError(what, where=str(adapter.folder), mend=mend)]
