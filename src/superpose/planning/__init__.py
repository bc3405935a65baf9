"""Planning a merge: every decision, and every problem at once, from headers alone.

plan.py      a recipe and its checkpoints -> Plan
items.py     one tensor of the output: what happens to it, what it takes, what its bytes depend on
choices.py   which kind, rule, method and options each tensor has
checks.py    device, backend, output, room on the disk
adapters.py  task matrices that stay factors, and results that are written as an adapter
"""

from superpose.planning.adapters import ADAPTER_FILE, WIDE_FILE
from superpose.planning.checks import check_output
from superpose.planning.items import CHUNK, SURVEY_CHUNK, FactorOutput, Settings, WorkItem, sources_of
from superpose.planning.plan import MASKS_FILE, Plan, make_plan, plan_tensors, shared_memory

__all__ = [
    "ADAPTER_FILE",
    "CHUNK",
    "MASKS_FILE",
    "SURVEY_CHUNK",
    "WIDE_FILE",
    "FactorOutput",
    "Plan",
    "Settings",
    "WorkItem",
    "check_output",
    "make_plan",
    "plan_tensors",
    "shared_memory",
    "sources_of",
]
