"""Comparing fine-tunes before merging them: how far each moved, how they agree, what a merge may meet.

measure.py   one tensor -> sums that add up, and the spectra of task matrices
result.py    sums -> tasks, pairs, layer groups
suggest.py   what the numbers suggest
"""

from superpose.comparison.measure import compare_items
from superpose.comparison.result import Comparison, Group, Pair, Task, group_name, group_tensors
from superpose.comparison.suggest import suggestions

__all__ = ["Comparison", "Group", "Pair", "Task", "compare_items", "group_name", "group_tensors", "suggestions"]
