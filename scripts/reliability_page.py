"""docs/reliability.md, from the counts of injected faults in docs/reliability.json."""

from collections import Counter

HEAD = """# Reliability

Made by `scripts/document` from `docs/reliability.json`, which `scripts/faults` writes: it runs `tests/faults`, where
every injection is counted, and keeps the counts only if all tests pass. [SECURITY.md](../SECURITY.md) says what is
promised.
"""
GROUPS = {
    "Death": "Killed, or the power cut, at random events (system calls that write, sync, rename, remove) and random"
    " times. Nothing incomplete under the output's name; run again, it goes on, and ends in the same bytes.",
    "Disk": "Full, forbidden, read-only, or changing under the merge.",
    "Used targets": "An output that exists, leftovers, two merges into one name, caches and statistics of other"
    " models.",
    "Broken inputs": "Damaged by accident: either an error that names the file, or a result that is right.",
    "Hostile inputs": "Made to do harm: nothing is executed, no memory or time is lost, no control character is shown.",
    "Mismatch": "Models that do not belong together: an error, a warning with figures, or a result that is right.",
    "Resources": "Too little memory, too few file handles, too little patience.",
}
FUZZ = """
## Fuzzing

`scripts/fuzz`: guided by coverage (atheris), from files made in code. An execution fails that ends in anything but a
result or an error of superpose, that takes memory beyond a bound, or that touches a file outside its folder.

| target | executions | seconds | failures |
|---|---:|---:|---:|"""
REST = """
## What is not in the tables, and why

- **NaN and infinity** are found when their tensor is read, not by the plan, which reads no tensor; what is finished
  then stays finished, and the error names every input of that tensor that has some (`tests/test_non_finite.py`).
- **A file that is cut short while it is mapped** ends the process by SIGBUS, in mid-instruction: no handler in Python
  can turn that into an error. Nothing appears under the output's name, and the next run names the file. Files that are
  replaced, rewritten or removed are refused by name.
- **Inputs are marked by a sample** of their content (1 MiB and 16 blocks of 64 KiB of every file) beside size and
  times: reading all of it twice would cost plain merges half of their time again. `--checksums full` marks all of it,
  and `superpose verify --recompute N` computes tensors once more.
- **Power cuts** are simulated by a layer that forgets what was not synced, page by page; no machine was switched off.
- **Ray**: its driver is killed at events like the others, fewer times, as a cluster takes seconds to start; nodes that
  die are in `tests/test_ray.py`. All nodes were on one machine. A task that ends while it is cancelled can bring the
  driver down in Ray's own code ("Tried to complete task that was not pending", exit code 1; ray-project/ray#54798
  describes the race): seen once, at Ctrl-C, with Ray 2.60. What was finished is kept, and the same command goes on, as
  after a kill.
- **Network file systems** were not there to be tested: locks hold between processes of one machine; on others the lock
  tells who holds it, as far as the file system knows.
- **float8** tensors are copied from the base, with a warning where fine-tunes differ: quantised weights are not merged.
"""


def reliability_page(told: dict) -> str:
    """Return the page, from the counts of a run."""
    run, rows = told["run"], told["faults"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    lost = _lost(rows)
    text = [
        HEAD,
        f"The run of this page: {run['command']}, {run['minutes']} minutes on {run['machine']}; {versions}."
        f" **{_count(rows):,} injections, and what they lost: {lost}.**\n",
        "| group | injections | lost |\n|---|---:|---|",
    ]
    by_group = {group: [row for row in rows if row["group"] == group] for group in GROUPS}
    text += [f"| {group} | {_count(found):,} | {_lost(found)} |" for group, found in by_group.items()]
    for group, says in GROUPS.items():
        text.append(f"\n## {group}\n\n{says}\n\n| fault | injections | what came of them | lost |\n|---|---:|---|---|")
        faults: dict[str, list] = {}
        for row in by_group[group]:
            faults.setdefault(row["fault"], []).append(row)
        text += [_line(fault, found) for fault, found in faults.items()]
    if told["fuzz"]:
        text.append(FUZZ)
        text += [
            f"| {_plain(row['target'])} | {row['executions']:,} | {row['seconds']:,.0f} | {row['crashes']} |"
            for row in told["fuzz"]
        ]
        text.append(f"| all | {sum(row['executions'] for row in told['fuzz']):,} | | |")
    return "\n".join(text) + "\n" + REST


def _line(fault: str, rows: list) -> str:
    places = ", ".join(dict.fromkeys(row["where"] for row in rows if row["where"]))
    outcomes = Counter()
    for row in rows:
        outcomes.update({name: count for name, count in row["outcomes"].items() if name != "LOST"})
    came = "; ".join(name if len(outcomes) == 1 else f"{count:,} {name}" for name, count in outcomes.most_common())
    name = f"{fault} ({places})" if places else fault
    return f"| {_plain(name)} | {_count(rows):,} | {_plain(came)} | {_lost(rows)} |"


def _count(rows: list) -> int:
    return sum(sum(row["outcomes"].values()) for row in rows)


def _lost(rows: list) -> str:
    lost = sum(row["outcomes"].get("LOST", 0) for row in rows)
    return f"in {lost} of them something" if lost else "nothing"


def _plain(text: str) -> str:
    """Return a text that neither ends a cell of a table nor begins a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")
