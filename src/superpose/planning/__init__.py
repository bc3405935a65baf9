"""Planning a merge: every decision, and every problem at once, from headers alone.

plan.py      a recipe and its checkpoints -> Plan
items.py     one tensor of the output: what happens to it, what it takes, what its bytes depend on
choices.py   which kind, rule, method and options each tensor has
checks.py    device, backend, output, room on the disk
data.py      statistics of models, what was learned from data, and what is to be learned first
adapters.py  task matrices that stay factors, and results that are written as an adapter
"""

from superpose.planning.adapters import ADAPTER_FILE, WIDE_FILE
from superpose.planning.checks import check_device, check_output
from superpose.planning.data import EVERY_TENSOR, LEARNED_FILE, attach_learned
from superpose.planning.items import CHUNK, SURVEY_CHUNK, FactorOutput, Settings, WorkItem, sources_of, stamps_of
from superpose.planning.plan import MASKS_FILE, Plan, make_plan, plan_tensors, shared_memory

__all__ = [
    "ADAPTER_FILE",
    "CHUNK",
    "EVERY_TENSOR",
    "LEARNED_FILE",
    "MASKS_FILE",
    "SURVEY_CHUNK",
    "WIDE_FILE",
    "FactorOutput",
    "Plan",
    "Settings",
    "WorkItem",
    "attach_learned",
    "check_device",
    "check_output",
    "make_plan",
    "plan_tensors",
    "shared_memory",
    "sources_of",
    "stamps_of",
]
