"""Gram matrices of what linear maps are given: the mean of x x^T over all tokens.

    G = (1/N) sum_t x_t x_t^T        (in x in), for every linear map

Jin et al. 2022, arXiv:2212.09849. Maps that are given the same tensor (query, key and value) share one matrix, which is
computed and kept once. A map that shares its weight with an embedding is left out: the two are merged as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from superpose.errors import SuperposeError
from superpose.inference import Batch, LiveModel
from superpose.statistics.passes import AddBatch

ROWS = "rows of "
"""Before a map's name: how many tokens it was given."""


@dataclass(frozen=True)
class Gram:
    """How the Gram matrices of a model are added up.

    Args:
        live: the model.
        example: a batch by which is seen which maps are given the same tensor.
    """

    live: LiveModel
    example: Batch
    kind: str = "gram"
    width: int = 8

    @cached_property
    def owners(self) -> dict[str, str]:
        """Weight of each linear map -> the one whose matrix it shares, both by the checkpoint's names.

        Those share one that are given the same tensors, call by call. A map that the example does not use has its own:
        other examples may use it, as they do the experts of a mixture.
        """
        maps = self._maps()
        kept: list[Tensor] = []  # alive until the pass ends: a freed tensor's place is given to another
        given_to: dict[str, list[tuple]] = {}

        def note(name: str, given: Tensor) -> None:
            kept.append(given)
            place = (given.data_ptr(), tuple(given.shape), tuple(given.stride()), given._version)
            given_to.setdefault(name, []).append(place)

        with torch.no_grad(), _watching(maps, note):
            self.live.forward(self.example.inputs)
        if not given_to:
            mend = "Gram matrices are those of linear maps: give a model that has some"
            raise SuperposeError("no linear map of the model was used", where="statistics gram", mend=mend)
        first: dict[tuple, str] = {}
        shared = {name: first.setdefault(tuple(places), name) for name, places in given_to.items()}
        return {name: shared.get(name, name) for name in (*shared, *maps)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each matrix, by the first map that shares it."""
        maps = self._maps()
        return {name: (_width(maps[name]),) * 2 for name in sorted(set(self.owners.values()))}

    def sums(self, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Return zeros to add to, in float64, and counts of rows."""
        shapes = self.shapes()
        found = {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in names}
        return found | {ROWS + name: torch.zeros((), dtype=torch.float64) for name in names}

    @contextmanager
    def adding(self, sums: Mapping[str, Tensor], first: Batch) -> Iterator[AddBatch]:
        """Yield what adds a batch's matrices to the sums.

        Args:
            sums: by the checkpoint's names; those of some of the maps, or of all.
            first: not looked at.

        Yields:
            Batch -> None.
        """
        del first
        maps = self._maps()
        wanted = {name: maps[name] for name in sums if name in maps}

        def run(batch: Batch) -> None:
            def add(name: str, given: Tensor) -> None:
                rows = given.detach().reshape(-1, given.shape[-1]).float()
                # What all examples of a batch share (relative positions) is each one's own: batches make no difference.
                times = len(batch) if given.ndim > 2 and len(given) == 1 else 1
                sums[name].add_(rows.T @ rows, alpha=times)
                sums[ROWS + name].add_(times * len(rows))

            with torch.no_grad(), _watching(wanted, add):
                self.live.forward(batch.inputs)

        yield run

    def mean(self, name: str, sums: Mapping[str, Tensor], examples: int) -> Tensor:
        """Return a map's matrix in float32; zero where the map was never used."""
        del examples
        return (sums[name] / sums[ROWS + name].clamp_min(1).to(sums[name].device)).float()

    def _maps(self) -> dict[str, nn.Module]:
        """Return the linear maps by the checkpoint's names of their weights."""
        names = {id(parameter): name for name, parameter in self.live.parameters().items()}
        looked_up = {id(part.weight) for part in self.live.module.modules() if isinstance(part, nn.Embedding)}
        return {
            names[id(part.weight)]: part
            for part in self.live.module.modules()
            if _is_linear(part) and id(part.weight) in names and id(part.weight) not in looked_up
        }


@contextmanager
def _watching(maps: Mapping[str, nn.Module], note) -> Iterator[None]:
    """Call `note(name, given)` whenever one of the maps is used."""

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, object]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor):
                note(name, given)

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _width(module: nn.Module) -> int:
    """Return the number of a linear map's inputs."""
    assert isinstance(module.weight, Tensor), "a linear map has a weight"
    return module.weight.shape[1] if isinstance(module, nn.Linear) else module.weight.shape[0]
