"""How well a model's features tell classes apart that it was not fine-tuned for: a linear probe.

Multinomial logistic regression on standardised features, with a penalty on its weights; the same few labelled examples
for every model.
"""

from __future__ import annotations

import torch
from suite import Answers
from torch import Tensor, nn

PENALTY = 1e-3
"""On the mean squared weight of a class, times the number of features."""
STEPS = 100


def probed(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Answers:
    """Return which test examples a probe answers rightly.

    Args:
        train: features, shape (examples, width), and classes of the examples that it learns from.
        test: those that it is asked.
    """
    (known, labels), (asked, right) = train, test
    mean, spread = known.mean(dim=0), known.std(dim=0).clamp(min=1e-6)
    inputs = ((known - mean) / spread).double()
    weight = torch.zeros(int(labels.max()) + 1, known.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(nn.functional.linear(inputs, weight, bias), labels)
        found = found + PENALTY * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        said = nn.functional.linear(((asked - mean) / spread).double(), weight, bias).argmax(dim=1)
    return Answers((said == right).tolist())
