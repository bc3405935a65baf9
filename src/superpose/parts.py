"""The inputs of one work item: the maps that a tensor holds, read in pieces from the files of all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.checkpoints.adapted import AdaptedTensor
from superpose.checkpoints.headers import TensorHeader
from superpose.errors import SuperposeError
from superpose.maths.bits import packed_bytes, unpack
from superpose.maths.finite import is_finite
from superpose.maths.low_rank import LowRank
from superpose.maths.randomness import Generator
from superpose.maths.streaming import TensorChunks
from superpose.non_finite import only_not_finite, refusal
from superpose.planning import WorkItem
from superpose.reading import Update, read_tensor, read_update
from superpose.registry import Cache, Grams, find_method


@dataclass(frozen=True)
class Context:
    """What all items of a merge share.

    Args:
        task_names: one per tuned model.
        weights: one per tuned model.
        device: where the arithmetic is done.
        measure: whether to measure how well each task's features survive.
        seed: of random numbers.
        cache: of what is costly to compute, if one is kept.
        split_tensors: whether idle workers take part in another's tensor.
        non_finite: what becomes of NaN and infinity in inputs: "refuse", "zero" or "keep".
    """

    task_names: tuple[str, ...]
    weights: tuple[float, ...]
    device: torch.device
    measure: bool
    seed: int = 0
    cache: Cache | None = None
    split_tensors: bool = True
    non_finite: str = "refuse"


@dataclass(frozen=True)
class Source:
    """What one tuned model makes of a part.

    Args:
        tensor: its weights, contiguous; None for the base's.
        update: what is added to them; None for nothing.
    """

    tensor: Tensor | None
    update: Update | None = None


@dataclass(frozen=True)
class Part:
    """One map of a tensor (the whole of it, or one of a fused projection), as contiguous views of the files.

    Args:
        item: what is done to the tensor.
        context: what all items share.
        name: the tensor's, with the part's number if there are several.
        base: the base's weights; without data where nobody can read them.
        tuned: what each tuned model makes of them.
    """

    item: WorkItem
    context: Context
    name: str
    base: Tensor
    tuned: tuple[Source, ...]

    @cached_property
    def factors(self) -> tuple[LowRank, ...]:
        """The task matrices as low-rank updates; only for an item that is merged in factors.

        Returns:
            One per task.

        Raises:
            SuperposeError: a factor holds NaN or infinity.
        """
        found = [source.update.low_rank for source in self.tuned if source.update is not None]
        factors = tuple(low_rank for low_rank in found if low_rank is not None)
        if all(is_finite(half.reshape(-1)) for low_rank in factors for half in (low_rank.left, low_rank.right)):
            return factors
        if self.context.non_finite != "zero":  # an entry of a factor is in a whole row: nothing could be kept in place
            raise refusal(self.item, self.context.task_names)
        return tuple(LowRank(_zeroed(low_rank.left), _zeroed(low_rank.right)) for low_rank in factors)

    def chunks(self, size: int, inputs: tuple[Tensor, Tensor] | None = None) -> TensorChunks:
        """Return the part's task vectors (or weights, if its method acts on them), in pieces.

        Args:
            size: entries of a piece.
            inputs: the whole of what `read` returns, where it is there anyway: pieces are then views of it.

        Returns:
            The chunks.
        """
        read = self.stacked if inputs is None else lambda start, stop: inputs[0][:, start:stop]
        return TensorChunks(
            len(self.tuned), self.base.numel(), size, read, self.context.weights,
            tuple(self.base.shape), self.item.kind, self.generator, self.factors if self.item.in_factors else None,
            self._squared_gradients if self.item.statistics else None,
        )  # fmt: skip

    def statistics(self, start: int, stop: int) -> Tensor | Grams | None:
        """Return what the models' data says of the entries start..stop of the flattened tensor.

        Args:
            start: first entry.
            stop: one past the last entry.

        Returns:
            Squared gradients, shape (tasks, entries), zero where a model has none; or the Gram matrices of a linear
            map; None where the method needs neither, or not every model has them.

        Raises:
            SuperposeError: a file of statistics holds NaN or infinity.
        """
        found = self.item.statistics
        if not found or find_method(self.item.method).statistics == "fisher":
            return self._squared_gradients(start, stop) if found else None
        if any(header is None for header in found):
            return None
        matrices = tuple(read_tensor(header).to(self.context.device) for header in found if header is not None)
        for header, matrix in zip(found, matrices, strict=True):
            self._check_statistics(header, matrix.reshape(-1))
        return Grams(matrices, self.item.in_x_out)

    def _squared_gradients(self, start: int, stop: int) -> Float[Tensor, "tasks entries"]:
        shape = (len(self.item.statistics), stop - start)
        stacked = torch.zeros(shape, dtype=self.item.compute, device=self.context.device)
        for row, header in zip(stacked, self.item.statistics, strict=True):
            if header is not None:
                row.copy_(read_tensor(header).reshape(-1)[start:stop])
                self._check_statistics(header, row)
                if row.numel() and float(row.min()) < 0:
                    where = f"{header.file}, tensor {header.name}"
                    mend = "make the file by superpose statistics fisher"
                    raise SuperposeError("Fisher information is negative", where=where, mend=mend)
        return stacked

    def _check_statistics(self, header: TensorHeader | None, entries: Tensor) -> None:
        if header is not None and not is_finite(entries):
            where = f"{header.file}, tensor {header.name}"
            mend = "make the file again, from a model whose outputs are finite"
            raise SuperposeError("statistics hold NaN or infinity", where=where, mend=mend)

    def learned(self, start: int, stop: int) -> Tensor | None:
        """Return what was learned for the tensor, one row per task.

        Args:
            start: first entry, of a mask.
            stop: one past the last entry.

        Returns:
            Coefficients, shape (tasks,), or masks, shape (tasks, entries); None where nothing was learned.
        """
        if self.item.learned is None:
            return None
        header, rows = self.item.learned
        found = read_tensor(header)[list(rows)].to(self.context.device)
        if found.dtype != torch.uint8:
            return found
        return torch.stack([unpack(row[start // 8 : packed_bytes(stop)], stop - start) for row in found])

    @property
    def generator(self) -> Generator:
        """The part's random numbers."""
        return Generator(self.context.seed, self.name, self.context.task_names)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return entries start..stop of the flattened task vectors (or weights), stacked, and of the base.

        Args:
            start: first entry.
            stop: one past the last entry.

        Returns:
            New memory in the dtype of the arithmetic: shape (tasks, entries), and shape (entries,).

        Raises:
            SuperposeError: an input holds NaN or infinity.
        """
        # New memory, never a view of a file: what is done to it cannot reach the inputs.
        shape = (1 + len(self.tuned), stop - start)
        pieces = torch.empty(shape, dtype=self.item.compute, device=self.context.device)
        base, stacked = pieces[0], pieces[1:]
        differs = find_method(self.item.method).acts_on == "task_vectors"
        if self.item.reads_base:
            base.copy_(self.base.reshape(-1)[start:stop])
        else:
            base.zero_()
        if all(source.update is None for source in self.tuned):
            for row, source in zip(stacked, self.tuned, strict=True):
                row.copy_(_tensor(source).reshape(-1)[start:stop])
            if differs:
                stacked -= base
        else:
            for row, source in zip(stacked, self.tuned, strict=True):
                _fill(row, source, start, stop, base, differs)
        if not is_finite(stacked if differs else pieces):  # where the base is not finite, no difference from it is
            if self.context.non_finite != "refuse":
                self._take_for_the_base(stacked, base, start, stop, differs)
            if not is_finite(pieces):
                raise refusal(self.item, self.context.task_names)
        return stacked, base

    def not_finite(self, start: int, stop: int) -> Tensor | None:
        """Return what is to be put back into the entries start..stop of the result: NaN, infinities, 0 elsewhere.

        Args:
            start: first entry.
            stop: one past the last entry.

        Returns:
            Shape (entries,), in the dtype of the arithmetic; None where all inputs are finite, or nothing is kept.
        """
        if self.context.non_finite != "keep" or self.item.in_factors:
            return None
        found = torch.zeros(stop - start, dtype=self.item.compute, device=self.context.device)
        for piece in self._pieces(start, stop):
            found += only_not_finite(piece.to(found))
        return found if bool((found != 0).any()) else None

    def stacked(self, start: int, stop: int) -> Tensor:
        """Return entries start..stop of the flattened task vectors (or weights), in new memory: see `read`."""
        return self.read(start, stop)[0]

    def weights(self, task: int, task_vector: Tensor, start: int, stop: int) -> Tensor:
        """Return the entries start..stop of a tuned model's weights, given those of its task vector."""
        source = self.tuned[task]
        if source.tensor is not None and source.update is None:
            return source.tensor.reshape(-1)[start:stop]
        return self.base.reshape(-1)[start:stop].to(task_vector) + task_vector

    def _take_for_the_base(self, stacked: Tensor, base: Tensor, start: int, stop: int, differs: bool) -> None:
        """Let entries of the base that are not finite be 0, and such entries of a tuned model the base's."""
        of_base, *of_tuned = self._by_model(start, stop)
        bad_base = _not_finite_in(of_base, base)
        base[bad_base] = 0
        for row, pieces in zip(stacked, of_tuned, strict=True):
            bad = _not_finite_in(pieces, base)
            # What a model has where the base has nothing is all its own.
            row[bad_base] = sum((piece.to(row)[bad_base] for piece in pieces), row.new_zeros(()))
            row[bad] = 0 if differs else base[bad]

    def _pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        for group in self._by_model(start, stop):
            yield from group

    def _by_model(self, start: int, stop: int) -> Iterator[list[Tensor]]:
        """Yield what the entries start..stop are made of, entry by entry: of the base, then of each tuned model."""
        yield [self.base.reshape(-1)[start:stop]] if self.item.reads_base else []
        for source in self.tuned:
            update = source.update.dense if source.update is not None else None
            whole = [source.tensor.reshape(-1), update] if source.tensor is not None else [update]
            yield [tensor[start:stop] for tensor in whole if tensor is not None]


def parts_of(item: WorkItem, context: Context) -> Iterator[Part]:
    """Yield the maps that a tensor holds: itself, or each of a fused projection."""
    base = read_tensor(item.base) if item.reads_base else torch.empty(item.shape, device="meta")
    tuned = [_source(header, base, item, context) for header in item.tuned if header is not None]
    if item.parts is None:
        yield Part(item, context, item.name, base, tuple(tuned))
        return
    axis, sizes = item.parts
    blocks = zip(*(_split(source, axis, sizes) for source in (Source(base), *tuned)), strict=True)
    for number, (own, *others) in enumerate(blocks):
        yield Part(item, context, f"{item.name}#{number}", _tensor(own), tuple(others))


def _source(header: TensorHeader, base: Tensor, item: WorkItem, context: Context) -> Source:
    if not isinstance(header, AdaptedTensor):
        return Source(read_tensor(header))
    tensor = read_tensor(header.onto) if header.onto is not None else None
    return Source(tensor, read_update(header, base if tensor is None else tensor, item.compute, context.device))


def _split(source: Source, axis: int, sizes: Sequence[int]) -> list[Source]:
    tensors: Sequence[Tensor | None] = [None] * len(sizes)
    if source.tensor is not None:
        tensors = [block.contiguous() for block in source.tensor.split(list(sizes), dim=axis)]
    updates: Sequence[Update | None] = [None] * len(sizes)
    if source.update is not None:
        updates = source.update.split(axis, sizes)
    return [Source(tensor, update) for tensor, update in zip(tensors, updates, strict=True)]


def _not_finite_in(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return where any of the pieces is NaN or infinite."""
    found = torch.zeros_like(like, dtype=torch.bool)
    for piece in pieces:
        found |= ~torch.isfinite(piece.to(like.device))
    return found


def _zeroed(factor: Tensor) -> Tensor:
    return torch.where(torch.isfinite(factor), factor, torch.zeros_like(factor))


def _tensor(source: Source) -> Tensor:
    assert source.tensor is not None, "an update alone"
    return source.tensor


def _fill(row: Tensor, source: Source, start: int, stop: int, base: Tensor, differs: bool) -> None:
    """Write the entries start..stop of a task vector, or of the weights if `differs` is false, into a row."""
    if source.tensor is not None:
        row.copy_(source.tensor.reshape(-1)[start:stop])
        if differs:
            row -= base  # before the update is added: it is small beside them
    elif differs:
        row.zero_()
    else:
        row.copy_(base)
    update = source.update.dense if source.update is not None else None
    if update is not None:
        row += update[start:stop]
