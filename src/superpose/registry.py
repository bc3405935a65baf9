"""What a merge method is, and the table of those that exist.

A method is a function on stacked tensors. The decorator records it and changes nothing: tests and users call the
function itself. What the function wants beyond the tensors and its options it names in its signature:

    kind      what the tensor is in its network
    weights   the recipe's weight of each model, shape (tasks,), float64
    base      the base tensor, shape (*shape)
    survey    numbers measured beforehand over the whole model (see `Survey`)
    generator the tensor's random numbers (see `superpose.maths.randomness`)
    statistics  of each model on its data: squared gradients of the tensor's shape, or `Grams`; None without
    learned   what was learned from data for the tensor: a number or a mask per task; None without
    cache     remembers what is costly to compute (see `Cache`), None where there is none
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from superpose.errors import SuperposeError, nearest
from superpose.kinds import Kind

if TYPE_CHECKING:
    from torch import Tensor

WANTED_BY_NAME = frozenset({"kind", "weights", "base", "survey", "generator", "cache", "statistics", "learned"})
LAWS = ("single", "same", "perm", "zero", "scale")


@dataclass(frozen=True)
class Caution:
    """Something the user should know about one tensor and can act on.

    Args:
        text: what happened and what helps.
        tasks: indices of the tasks concerned.
    """

    text: str
    tasks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Merged:
    """A merged tensor with numbers for the record.

    Args:
        tensor: the merged task vector (or weight, for methods that act on weights).
        stats: numbers about how it was found.
        cautions: what the user should know.
        beside: what is written beside it, as the method declared; flat, and for a piece of the tensor that piece's.
    """

    tensor: Tensor
    stats: Mapping[str, Any] = field(default_factory=dict)
    cautions: Sequence[Caution] = ()
    beside: Sequence[Tensor] = ()


class Factors(Protocol):
    """A matrix known as left @ right: `superpose.maths.low_rank.LowRank`."""

    @property
    def left(self) -> Tensor:
        """Shape (out, rank)."""
        ...

    @property
    def right(self) -> Tensor:
        """Shape (rank, in)."""
        ...


@dataclass(frozen=True)
class MergedFactors:
    """A merged task matrix known by two factors, with numbers for the record.

    Args:
        update: the matrix, a `LowRank`.
        stats: numbers about how it was found.
        cautions: what the user should know.
    """

    update: Any
    stats: Mapping[str, Any] = field(default_factory=dict)
    cautions: tuple[Caution, ...] = ()


@dataclass(frozen=True)
class Factored:
    """How a method merges task matrices that are known by two factors each, without writing them out.

    Args:
        function: (one `LowRank` per task, options, what it names of the rest) -> `LowRank` or `MergedFactors`; the same
            matrix as the method's own function makes of the matrices written out, whatever the factors, but for
            methods that act on factors.
        allows: (options, kind) -> whether it can, which methods that ask for single entries cannot.
        splits: whether maps of a fused projection make a difference; where not, their update stays one.
    """

    function: Callable[..., Factors | MergedFactors]
    allows: Callable[[Any, Kind], bool] = lambda options, kind: True
    splits: bool = True

    def __call__(self, tasks: Sequence[Factors], options: Any, **available: Any) -> MergedFactors:
        """Call the function with what it wants of `available`, and return a `MergedFactors`."""
        wants = list(inspect.signature(self.function).parameters)[2:]
        result = self.function(tasks, options, **{name: available[name] for name in wants})
        return result if isinstance(result, MergedFactors) else MergedFactors(result)


@dataclass(frozen=True)
class Grams:
    """Gram matrices of one linear map's inputs, one per model.

    Args:
        matrices: the mean of x x^T over each model's data, shape (in, in); float32 views of files, never written to.
        in_x_out: whether the map's weight is stored in x out.
    """

    matrices: tuple[Tensor, ...]
    in_x_out: bool = False


@dataclass(frozen=True)
class Breach:
    """A law that a method breaks by design.

    Args:
        why: the reason, with what holds instead.
        kinds: kinds of tensors for which it is broken.
        tasks: a number of tasks at which the breach shows.
    """

    why: str
    kinds: frozenset[Kind] = frozenset(Kind)
    tasks: int = 3


@dataclass(frozen=True)
class Cost:
    """What merging one tensor takes.

    Args:
        memory: bytes beyond the inputs and the output.
        flops: floating point operations.
    """

    memory: int
    flops: float


@dataclass(frozen=True)
class Remembered:
    """What a cache remembers: tensors, and numbers that can be written as JSON."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Cache(Protocol):
    """Remembers results by what they were computed from, over runs."""

    def remember(
        self, what: str, tensors: Sequence[Tensor], compute: Callable[[], Remembered], *, step: bool = False
    ) -> Remembered:
        """Return what `compute` returns, computed now or at another time from the same bytes.

        Args:
            what: what is computed, with everything it depends on beside the tensors.
            tensors: what it is computed from.
            compute: pure, in the bytes of its result too.
            step: whether the result is a step on the way to another that is remembered.

        Returns:
            The result.
        """
        ...

    def problems(self) -> Sequence[str]:
        """Return what went wrong with the cache since this was last asked."""
        ...


def remembered(cache: Cache | None, what: str, matrices: Tensor, merge: Callable[[], Merged]) -> Merged:
    """Merge matrices, or remember having done so.

    Args:
        cache: where results are kept, if anywhere.
        what: how they are merged: the method, and all its options that the result depends on.
        matrices: one per task, stacked.
        merge: what merges them, before scaling; nothing is written beside its result.

    Returns:
        What `merge` returns, with the same bytes.
    """
    if cache is None or not matrices.numel():
        return merge()

    def compute() -> Remembered:
        merged = merge()
        cautions = [(caution.text, caution.tasks) for caution in merged.cautions]
        return Remembered({"matrix": merged.tensor}, {"stats": dict(merged.stats), "cautions": cautions})

    found = cache.remember(what, list(matrices), compute)
    cautions = tuple(Caution(text, tuple(tasks)) for text, tasks in found.numbers["cautions"])
    return Merged(found.tensors["matrix"], found.numbers["stats"], cautions)


@runtime_checkable
class Survey(Protocol):
    """Numbers that need every tensor of the model, measured in read-only passes before the merge.

    A survey may know only on the way what it has to read: it then announces the most passes that it can need, reads
    nothing in those that it does not, and tells by a method `reads(options, dtype)` how many it needs as a rule.

    Each pass maps every tensor to a value; values are added to the first with `+=`, in plan order, so that rounding
    does not depend on who computed what first. A value waits for its turn: that of a small tensor has to be small.
    Memory then stays constant in the size of the model. `chunks` is a tensor's stacked task vectors (or weights), read
    in pieces as often as one iterates: `superpose.maths.streaming.TensorChunks`.
    """

    def passes(self, options: Any, dtype: Any) -> int:
        """Return how many passes these options need; 0 for none."""
        ...

    def measure(self, step: int, name: str, chunks: Any, state: Any, options: Any) -> Any:
        """Return one tensor's value for pass `step`, given the state that the pass before ended with."""
        ...

    def finish(self, step: int, total: Any, state: Any, options: Any, dtype: Any) -> Any:
        """Return the state after pass `step`, given the sum of its values."""
        ...

    def for_tensor(self, name: str, chunks: Any, state: Any, options: Any) -> Any:
        """Return what the method gets as `survey` for one tensor; `state` is None when there was no pass.

        The value has `within(start, stop)`, the same for the entries start..stop of the flattened tensor.
        """
        ...

    def memory(self, tasks: int, entries: int, dtype: Any) -> int:
        """Return the bytes that the value of one tensor of so many entries takes at most."""
        ...


@dataclass(frozen=True)
class Method:
    """A registered merge method; `function` is the plain function."""

    name: str
    function: Callable[..., Tensor | Merged]
    options: type
    source: str
    acts_on: Literal["task_vectors", "weights"]
    whole_for: frozenset[Kind]
    survey: Survey | None
    cost: Callable[[Sequence[int], int, Any], Cost] | None
    breaks: Mapping[str, Breach]
    statistics: Literal["fisher", "gram"] | None
    learns: Callable[[Any], bool] | None
    without_data: str
    models: tuple[int, int | None]
    plain: Mapping[str, Any]
    notes: Callable[[Any, int], Sequence[str]] | None
    beside: Callable[[str, int, int], Sequence[tuple[str, str, tuple[int, ...]]]] | None
    factored: Factored | None
    for_adapters: Mapping[str, Any]
    needs_base: Callable[[Any], bool] | None
    wants: frozenset[str]

    @property
    def summary(self) -> str:
        """What comes out, in a line: the first of the description, or of the function's docstring."""
        return (self.description or inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """The docstring of the method's module: formula, traps, when to prefer it."""
        return inspect.cleandoc(sys.modules[self.function.__module__].__doc__ or "")

    def plain_options(self) -> Any:
        """Return the options under which nothing is left out and nothing scaled: those of the laws."""
        return self.options(**self.plain)

    def holds(self, law: str, kind: Kind) -> bool:
        """Whether a law holds for tensors of a kind."""
        return law not in self.breaks or kind not in self.breaks[law].kinds

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beyond weights, in words."""
        found = [f"{self.statistics} statistics"] if self.statistics else []
        if self.learns is not None and self.learns(self.options()) and not self.without_data:
            found.append("data, or what was learned from it")
        return tuple(found)

    def reads_base(self, options: Any) -> bool:
        """Whether it reads the base's weights, beside what task vectors tell."""
        if self.acts_on == "weights" or self.beside is not None:
            return True
        return "base" in self.wants and (self.needs_base is None or self.needs_base(options))

    def sees_whole(self, kind: Kind) -> bool:
        """Whether a tensor of this kind has to be in memory as a whole."""
        return kind in self.whole_for

    def reads(self, options: Any, dtype: Any) -> int:
        """Return how often its survey reads the model, as a rule."""
        if self.survey is None:
            return 0
        return getattr(self.survey, "reads", self.survey.passes)(options, dtype)

    def __call__(self, tensors: Tensor, options: Any, **available: Any) -> Merged:
        """Call the function with what it wants of `available`, and return a `Merged`."""
        result = self.function(
            tensors, options, **{name: value for name, value in available.items() if name in self.wants}
        )
        return result if isinstance(result, Merged) else Merged(result)


_METHODS: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    options: type,
    source: str,
    acts_on: Literal["task_vectors", "weights"] = "task_vectors",
    whole_for: Iterable[Kind] = frozenset(Kind),
    survey: Survey | None = None,
    cost: Callable[[Sequence[int], int, Any], Cost] | None = None,
    breaks: Mapping[str, str | Breach] | None = None,
    statistics: Literal["fisher", "gram"] | None = None,
    learns: Callable[[Any], bool] | None = None,
    without_data: str = "",
    models: tuple[int, int | None] = (1, None),
    plain: Mapping[str, Any] | None = None,
    notes: Callable[[Any, int], Sequence[str]] | None = None,
    beside: Callable[[str, int, int], Sequence[tuple[str, str, tuple[int, ...]]]] | None = None,
    factored: Factored | None = None,
    for_adapters: Mapping[str, Any] | None = None,
    needs_base: Callable[[Any], bool] | None = None,
) -> Callable:
    """Return a decorator that registers a merge method and leaves the function as it is.

    Args:
        name: the method's name in recipes and on the command line.
        options: frozen dataclass of its options, every field with a default.
        source: paper, arXiv number, equation or algorithm.
        acts_on: whether the function gets task vectors (tuned minus base) or the tuned weights.
        whole_for: kinds of tensors that the function must see as a whole. For other kinds it may be called on pieces
            of the flattened tensor: then an entry of its result may depend on that entry of the inputs alone, beside
            `survey` and `weights`.
        survey: passes over the whole model beforehand.
        cost: (shape, tasks, options) -> `Cost` of merging one whole tensor.
        breaks: the laws (see `LAWS`) that the method breaks by design, each with the reason or a `Breach`.
        statistics: kind of file that it needs of each model, which `superpose statistics` makes. Fisher information
            comes in the shape of the tensor (or piece); Gram matrices as `Grams`, for linear maps alone.
        learns: (options) -> whether something is learned from data first, by `superpose.learning` under its name.
        without_data: what it does instead where a recipe has no data; an error, when not given.
        models: fewest and most tuned models it can merge; None for no limit.
        plain: the options under which nothing is left out and nothing scaled; density 1 and scaling factor 1, as far as
            it has them, when not given.
        notes: (options, number of tuned models) -> what to tell the user before anything is computed.
        beside: (tensor name, entries, number of tuned models) -> name, dtype (as in safetensors) and shape of each
            tensor that is written beside the merged one, in `tasks/`.
        factored: how it merges low-rank updates in factors, if it can.
        for_adapters: defaults of options where all models are adapters.
        needs_base: (options) -> whether it reads the `base` that it asks for; always, when not given.

    Returns:
        The decorator.

    Raises:
        ValueError: the name is taken, or the declaration contradicts itself.
    """

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())
        wants = frozenset(p.name for p in parameters[2:])
        if unknown := wants - WANTED_BY_NAME:
            raise ValueError(f"{name}: nothing is handed over as {sorted(unknown)}; {sorted(WANTED_BY_NAME)} are")
        breaches = {law: Breach(found) if isinstance(found, str) else found for law, found in (breaks or {}).items()}
        if unknown := set(breaches) - set(LAWS):
            raise ValueError(f"{name}: no such law: {sorted(unknown)}")
        if name in _METHODS and _METHODS[name].function.__module__ != function.__module__:
            raise ValueError(f"a method named {name} exists: {_METHODS[name].function.__module__}")
        _METHODS[name] = Method(
            name, function, options, source, acts_on, frozenset(whole_for), survey, cost,
            breaches, statistics, learns, without_data, models, _plain(options) if plain is None else plain,
            notes, beside, factored, for_adapters or {}, needs_base, wants,
        )  # fmt: skip
        return function

    return register


def _plain(options: type) -> dict[str, float]:
    names = {field.name for field in dataclasses.fields(options)}
    return {name: 1.0 for name in ("density", "scaling_factor") if name in names}


def registered() -> list[Method]:
    """Return every registered method, by name."""
    return [_METHODS[name] for name in sorted(_METHODS)]


def find_method(name: str, *, where: str = "") -> Method:
    """Return the method of that name.

    Args:
        name: as registered.
        where: who asks, for the error.

    Returns:
        The method.

    Raises:
        SuperposeError: there is none.
    """
    try:
        return _METHODS[name]
    except KeyError:
        raise SuperposeError(f"no method is named '{name}'", where=where, mend=nearest(name, _METHODS)) from None
