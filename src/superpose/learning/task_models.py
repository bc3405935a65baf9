"""Models in memory for learning: their merged weights are one set of parameters, their heads stay their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from superpose.errors import SuperposeError
from superpose.inference import LiveModel, TaskData, load_model
from superpose.kinds import Kind
from superpose.learning.task_vectors import TaskVectors
from superpose.parts import Context
from superpose.planning import WorkItem
from superpose.reading import read_tensor


def load_for(location: str, data: TaskData, device: torch.device) -> LiveModel:
    """Return a task's model in memory; its parameters ask for no gradient yet.

    Args:
        location: of the model.
        data: how it reads rows.
        device: where it goes.

    Returns:
        The model.
    """
    live = load_model(location, data, device)
    live.module.requires_grad_(False)
    return live


class SharedWeights:
    """One set of parameters in the places of the merged tensors of several models.

    Args:
        models: the models; each loses its own copy.
        items: of the merged tensors.
        tied: names of tensors that share the memory of another, to that.

    Raises:
        SuperposeError: no merged tensor is in a model.
    """

    def __init__(self, models: Sequence[LiveModel], items: Iterable[WorkItem], tied: Mapping[str, str]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        wanted = list(items)
        aliases: dict[str, list[str]] = {}
        for alias, owner in tied.items():
            aliases.setdefault(owner, []).append(alias)
        for live in models:
            own = dict(live.module.named_parameters(remove_duplicate=False))
            shared: dict[int, nn.Parameter] = {}
            for item in wanted:
                own_names = [header.name for header in item.tuned if header is not None]
                told = (item.name, *aliases.get(item.name, ()), *own_names)
                names = [live.names.get(name, name) for name in told]
                found = next((own[name] for name in names if name in own), None)
                if found is None:
                    continue
                if found.shape != item.shape:
                    where, mend = f"tensor {item.name}", "give the task the model that was fine-tuned (model:)"
                    what = f"the task's model has it in shape {list(found.shape)}, not {list(item.shape)}"
                    raise SuperposeError(what, where=where, mend=mend)
                if item.name not in self.parameters:
                    # New memory: what is loaded can be views of files.
                    self.parameters[item.name] = nn.Parameter(found.detach().clone().float(), requires_grad=False)
                shared[id(found)] = self.parameters[item.name]
            for part in live.module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if id(parameter) in shared:
                        setattr(part, name, shared[id(parameter)])
        if not self.parameters:
            mend = "give each task the model that was fine-tuned (model:), or a loader whose names are the checkpoint's"
            raise SuperposeError("no merged tensor is in the tasks' models", where="tasks", mend=mend)

    def fill(self, name: str, weights: Tensor) -> None:
        """Set one merged tensor in all models."""
        if name in self.parameters:
            self.parameters[name].data.copy_(weights.reshape(self.parameters[name].shape))

    def ask_for_gradients(self) -> list[str]:
        """Let the shared parameters have gradients, and return their names."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        return list(self.parameters)


def fix_the_rest(models: Sequence[LiveModel], items: Iterable[WorkItem], context: Context) -> None:
    """Give models what is not learned: the base's tensors where a rule keeps them, averaged running statistics.

    Args:
        models: the models.
        items: all of the plan.
        context: of the merge.
    """
    for item in items:
        kept = item.action == "copy" and item.base.is_float and item.why.startswith("rule")
        averaged = item.action == "merge" and item.kind is Kind.BUFFER
        if not kept and not averaged:
            continue
        value = TaskVectors([item], context, room=0).mean(item.name) if averaged else read_tensor(item.base)
        for live in models:
            state = live.module.state_dict()
            name = live.names.get(item.name, item.name)
            if name in state:
                state[name].copy_(value.reshape(state[name].shape))
