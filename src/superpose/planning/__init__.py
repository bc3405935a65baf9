"""Planning a merge: every decision, and every problem at once, from headers alone.

plan.py      a recipe and its checkpoints -> Plan
items.py     one tensor of the output: what happens to it, what it takes, what its bytes depend on
choices.py   which kind, rule, method and options each tensor has
checks.py    device, backend, output, room on the disk
"""

from superpose.planning.checks import check_output
from superpose.planning.items import CHUNK, SURVEY_CHUNK, Settings, WorkItem
from superpose.planning.plan import MASKS_FILE, Plan, make_plan, plan_tensors, shared_memory

__all__ = [
    "CHUNK",
    "MASKS_FILE",
    "SURVEY_CHUNK",
    "Plan",
    "Settings",
    "WorkItem",
    "check_output",
    "make_plan",
    "plan_tensors",
    "shared_memory",
]
