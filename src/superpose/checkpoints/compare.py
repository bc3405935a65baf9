"""Whether a tuned checkpoint fits its base: every tensor found, of the right shape, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from superpose.checkpoints.folder import Checkpoint
from superpose.checkpoints.headers import TensorHeader
from superpose.checkpoints.names import find_prefix
from superpose.errors import SuperposeError
from superpose.kinds import Kind

MOST_SHOWN = 5
"""Problems of one sort that are listed one by one; the rest is counted."""
SAME_BASE = "use a fine-tune of this very base"


@dataclass(frozen=True)
class Alignment:
    """How a tuned checkpoint answers the base's tensors.

    Args:
        sources: base name -> the tuned tensor; a base tensor that need not be there can be absent.
        problems: what does not fit.
        notes: what was assumed.
    """

    sources: Mapping[str, TensorHeader]
    problems: tuple[SuperposeError, ...]
    notes: tuple[str, ...]


def align(
    base: Checkpoint,
    tuned: Checkpoint,
    wanted: Mapping[str, Kind],
    *,
    tied: Mapping[str, str],
    dropped: Callable[[str], bool],
) -> Alignment:
    """Find the tuned tensor of every base tensor that takes part in the merge.

    Args:
        base: the base.
        tuned: the tuned checkpoint.
        wanted: base names that need a tuned tensor, with their kinds; buffers may be absent.
        tied: names that share another tensor's memory, to that tensor's name.
        dropped: whether a tensor that only the tuned checkpoint has is left out by a rule.

    Returns:
        The tensors found, and everything that does not fit.
    """
    strip, add = find_prefix(base.tensors, tuned.tensors) or ("", "")
    notes, sources, problems, missing = [], {}, [], []
    if strip or add:
        notes.append(f"{tuned.name}: names were matched by putting '{add}' in place of '{strip}'")
    used = set()
    for name, kind in wanted.items():
        # Names without the body's prefix belong to a head and stay as they are.
        renamed = add + name[len(strip) :] if name.startswith(strip) else name
        header = _find(renamed, name, tuned, tied)
        if header is None:
            if kind is not Kind.BUFFER:
                missing.append(name)
            continue
        used.add(header.name)
        sources[name] = header
        problems.extend(_misfit(base.tensors[name], header, kind))
    problems = _missing(missing, base, tuned) + problems
    known = {add + name[len(strip) :] if name.startswith(strip) else name for name in base.tensors}
    known |= set(base.tensors) | set(base.aliases) | set(tied)
    second = sorted(name for name in tuned.tensors if name in tied and name not in used and name not in base.tensors)
    if second:
        notes.append(f"{tuned.name}: {', '.join(second)} left out: in the base they are tied to {tied[second[0]]}")
    known |= used
    extra = [name for name in sorted(tuned.tensors) if name not in known and not dropped(name)]
    problems += _extra(extra, tuned, sources)
    return Alignment(sources, tuple(problems), tuple(notes))


def _find(renamed: str, name: str, tuned: Checkpoint, tied: Mapping[str, str]) -> TensorHeader | None:
    """Return the tuned tensor by its name, or by another name of the same memory."""
    for candidate in (renamed, name):
        if candidate in tuned.tensors:
            return tuned.tensors[candidate]
        if candidate in tuned.aliases:
            return tuned.tensors[tuned.aliases[candidate]]
    # Saved without its own copy: the other name of the same memory.
    others = [tied[name]] if name in tied else []
    others += [alias for alias, owner in tied.items() if owner == name]
    return next((tuned.tensors[other] for other in others if other in tuned.tensors), None)


def _misfit(base: TensorHeader, tuned: TensorHeader, kind: Kind) -> list[SuperposeError]:
    where = f"{tuned.file}, tensor {tuned.name} (base: {base.file})"
    if base.shape != tuned.shape:
        shapes = f"{_shape(tuned.shape)}, the base has {_shape(base.shape)}"
        rows = len(base.shape) == len(tuned.shape) and base.shape[1:] == tuned.shape[1:]
        if kind in (Kind.EMBEDDING, Kind.HEAD) and rows:
            return [
                SuperposeError(
                    f"{tuned.shape[0]} rows (vocabulary or classes), the base has {base.shape[0]}",
                    where=where,
                    mend=f"keep the base's: a rule {{match: '{base.name}', keep: base}}; or make the rows agree first",
                )
            ]
        return [
            SuperposeError(
                f"shape {shapes}",
                where=where,
                mend=f"{SAME_BASE}, or keep the base's: a rule {{match: '{base.name}', keep: base}}",
            )
        ]
    if base.is_float != tuned.is_float:
        return [SuperposeError(f"dtype {tuned.dtype}, the base has {base.dtype}", where=where, mend=SAME_BASE)]
    return []


def _missing(names: Sequence[str], base: Checkpoint, tuned: Checkpoint) -> list[SuperposeError]:
    problems = []
    for name in names[:MOST_SHOWN]:
        problems.append(
            SuperposeError(
                "tensor missing",
                where=f"{_files(tuned)}, tensor {name}",
                mend=f"fetch or save it again, or keep the base's: a rule {{match: '{name}', keep: base}}",
            )
        )
    if len(names) > MOST_SHOWN:
        what = f"{len(names) - MOST_SHOWN} more tensors of the base are missing"
        where = f"{_files(tuned)}, tensors {', '.join(names[MOST_SHOWN : MOST_SHOWN + 3])}, ..."
        problems.append(SuperposeError(what, where=where, mend="is it a fine-tune of this base?"))
    return problems


def _extra(names: Sequence[str], tuned: Checkpoint, sources: Mapping[str, TensorHeader]) -> list[SuperposeError]:
    if not names or not sources:  # a checkpoint of which nothing fits was reported as missing everything
        return []
    shown = ", ".join(names[:MOST_SHOWN]) + (f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else "")
    pattern = names[0] if len(names) == 1 else names[0].partition(".")[0] + ".*"
    return [
        SuperposeError(
            f"{len(names)} tensor{'s' if len(names) > 1 else ''} that the base does not have",
            where=f"{tuned.tensors[names[0]].file}, tensor {shown}",
            mend=f"leave them out with a rule {{match: '{pattern}', drop: true}}",
        )
    ]


def _files(checkpoint: Checkpoint) -> str:
    files = checkpoint.files
    return str(files[0]) if len(files) == 1 else str(checkpoint.folder or checkpoint.name)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
