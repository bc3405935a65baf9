"""What all tests share: shapes checked at every call, one arithmetic thread, no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from jaxtyping import install_import_hook

install_import_hook(["superpose.maths", "superpose.methods"], "shapes.check")
torch.set_num_threads(1)
