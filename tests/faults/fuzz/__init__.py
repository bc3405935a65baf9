"""Fuzzing of what reads files that anybody may have made: targets, seeds, mutations, and `python -m faults.fuzz`."""
