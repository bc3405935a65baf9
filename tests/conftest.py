"""What all tests share: shapes checked at every call, one arithmetic thread, no hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SUPERPOSE_NO_CACHE"] = "1"  # tests ask transformers itself, and write nothing into the user's folders

import torch
from jaxtyping import install_import_hook

install_import_hook(["superpose.maths", "superpose.methods"], "shapes.check")
torch.set_num_threads(1)
