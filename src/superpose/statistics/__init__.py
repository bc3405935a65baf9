"""Statistics of a model on real data: what Fisher merging and RegMean read.

request = prepare("fisher", "model", TaskData(data="rows.jsonl", label="label", examples=256))
compute(request, Path("model.fisher.safetensors"))
"""

from superpose.statistics.compute import Request, check_output_file, compute, prepare, tensors_of
from superpose.statistics.passes import Advance

__all__ = ["Advance", "Request", "check_output_file", "compute", "prepare", "tensors_of"]
