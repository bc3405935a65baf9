"""What the numbers of a comparison suggest: rules of thumb, each with the number that it rests on."""

from __future__ import annotations

from superpose.comparison.result import Comparison, Group

NEARLY_SUM = 1.2
"""Median condition number up to which STF's system is nearly the identity, and STF nearly a sum."""
MUCH_LOST = 0.5
"""Fraction of entries lost in bfloat16 from which it is worth saying."""
SAME = 0.999
ALIKE = 0.5
NEARLY_ORTHOGONAL = 0.1
OPPOSED = -0.2
UNEVEN = 3.0
"""Ratio of norms from which one task drowns another."""
DARE_LIMIT = 0.005
"""Largest update that DARE is said to bear (arXiv:2311.03099: about 0.002 to 0.005)."""
LOW_RANK = 0.1
SHARED = 3.0
"""Times the chance level from which leading directions count as shared."""
NEARLY_PARALLEL = 100.0
"""Condition number from which a ridge is suggested: features that disagree are answered ten times over from there."""


def suggestions(comparison: Comparison) -> tuple[str, ...]:
    """Return what the numbers suggest, the most important first."""
    whole = comparison.whole
    return (*_about_tasks(whole), *_about_pairs(whole), *_about_precision(whole), *_about_spectra(comparison))


def _about_tasks(whole: Group) -> list[str]:
    found = [f"{task.name} is the base: leave it out" for task in whole.tasks if task.norm == 0 and whole.entries]
    moved = sorted((task for task in whole.tasks if task.norm > 0), key=lambda task: task.norm)
    if len(moved) > 1 and moved[-1].norm > UNEVEN * moved[0].norm:
        ratio = moved[-1].norm / moved[0].norm
        found.append(
            f"{moved[-1].name} moved {ratio:.1f} times as far as {moved[0].name}: it will drown it in a sum; give"
            " --weights to task_arithmetic or ties"
        )
    return found


def _about_pairs(whole: Group) -> list[str]:
    moved = {task.name for task in whole.tasks if task.norm > 0}
    pairs = [pair for pair in whole.pairs if {pair.first, pair.second} <= moved]
    if not whole.tasks[1:]:
        return ["one fine-tune alone: scale it with task_arithmetic, or interpolate with slerp"]
    if not pairs:
        return []
    found = [f"{p.first} and {p.second} are nearly the same model: keep one" for p in pairs if p.cosine > SAME]
    furthest = min(pairs, key=lambda p: p.cosine)
    closest = max((pair for pair in pairs if pair.cosine <= SAME), key=lambda p: p.cosine, default=None)
    if closest is not None and closest.cosine > ALIKE:
        found.append(
            f"{closest.first} and {closest.second} go the same way (cosine {closest.cosine:.2f}), like runs of one"
            " task: average or model_stock"
        )
    if furthest.cosine < OPPOSED:
        found.append(
            f"{furthest.first} and {furthest.second} work against each other (cosine {furthest.cosine:.2f}):"
            " expect a compromise from any method"
        )
    if max(abs(pair.cosine) for pair in pairs) < NEARLY_ORTHOGONAL:
        found.append(
            f"the task vectors are nearly orthogonal (largest cosine {max(abs(p.cosine) for p in pairs):.2f}): a sum"
            " loses little of each; stf, ties or task_arithmetic, and tune the scaling factor first"
        )
    return found


def _about_precision(whole: Group) -> list[str]:
    found = []
    moved = [task for task in whole.tasks if task.norm > 0]
    worst = max(moved, key=lambda task: task.rounded_away, default=None)
    if worst is not None and worst.rounded_away > MUCH_LOST:
        found.append(
            f"bfloat16 would round {worst.rounded_away:.0%} of {worst.name}'s changes away: write --dtype float32"
        )
    kept = max(moved, key=lambda task: task.unchanged, default=None)
    if kept is not None and kept.unchanged > MUCH_LOST:
        found.append(
            f"{kept.unchanged:.0%} of {kept.name}'s entries are the base's: if it was saved in bfloat16 after training"
            " in float32, merge the float32 checkpoint"
        )
    largest = max(whole.tasks, key=lambda task: task.largest)
    if largest.largest > DARE_LIMIT:
        found.append(
            f"{largest.name} has updates up to {largest.largest:.2g}, more than {DARE_LIMIT:g}: dare and dare_ties may"
            " hurt at a low density"
        )
    return found


def _about_spectra(comparison: Comparison) -> list[str]:
    whole, found = comparison.whole, []
    ranks = [task.effective_rank for task in whole.tasks if task.effective_rank is not None and task.norm > 0]
    if ranks and max(ranks) < LOW_RANK:
        found.append(f"the updates are of low rank (at most {max(ranks):.0%} of full): knots, or stf with density 1")
    overlaps = [
        (overlap / chance, side, pair, overlap, chance)
        for pair in whole.pairs
        for side, overlap, chance in (
            ("left", pair.left_overlap, pair.left_chance),
            ("right", pair.right_overlap, pair.right_chance),
        )
        if overlap is not None and chance
    ]
    times, side, pair, overlap, chance = max(overlaps, key=lambda entry: entry[0], default=(0.0, "", None, 0.0, 0.0))
    if times > SHARED and pair is not None:
        found.append(
            f"{pair.first} and {pair.second} share leading {side} directions"
            f" ({overlap:.2f}, chance {chance:.2f}): stf, which keeps each task's strength along them, will differ"
            " from a sum"
        )
    elif len(ranks) > 1 and whole.condition is not None and whole.condition < NEARLY_SUM:
        found.append(
            f"leading directions are hardly shared (median condition {whole.condition:.2g}): stf will be close to"
            " trimmed_task_arithmetic"
        )
    worst = whole.worst_condition
    if worst is not None and worst > NEARLY_PARALLEL:
        group = max(comparison.groups, key=lambda group: group.worst_condition or 0)
        found.append(
            f"stf's system is badly conditioned (at least {worst:.1g} in {group.name}): --ridge 0.001 to 0.1 bounds it"
        )
    return found
