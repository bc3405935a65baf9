"""What commands share: arguments to a recipe, errors to three lines and an exit code, tables."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superpose.errors import SuperposeError, printable
from superpose.free_memory import is_shortage

if TYPE_CHECKING:
    from superpose.recipe import Recipe
    from superpose.records import RunRecord

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
PATIENCE = 5.0
"""Seconds that tensors in flight have to be finished after an interruption; a large one can take many minutes."""
MOST_WARNINGS = 10
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG)

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE.yaml | BASE TUNED...",
        help="A recipe, or a base and its fine-tunes: folders, weight files, or hub ids org/name[@revision].",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", "-m", help="Merge method (default stf); its options follow as --OPTION VALUE."),
]
Weights = Annotated[str | None, typer.Option(help="One weight per fine-tune, with commas: 1,0.5,1.")]
StatisticsFiles = Annotated[
    str | None, typer.Option("--statistics", help="One file of `superpose statistics` per fine-tune, with commas.")
]
LearnedPlace = Annotated[
    str | None, typer.Option("--learned", help="What an earlier merge learned from data: its folder; no data is read.")
]
Dtype = Annotated[str | None, typer.Option(help="Dtype of the output: base, float32, bfloat16, ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of methods that draw random numbers.")]
NonFinite = Annotated[
    str | None,
    typer.Option(help="NaN and infinity in inputs: refuse (default); zero: the base's entry, or 0; or keep them."),
]
ShardSize = Annotated[str | None, typer.Option(help="Most bytes in a file, such as 5GB.")]
Form = Annotated[str | None, typer.Option(help="What comes out: model (default), adapter, or both.")]
AdapterRank = Annotated[
    int | None, typer.Option(min=1, help="Most directions of every module in the adapter; without, updates are exact.")
]
AdapterEnergy = Annotated[
    float | None, typer.Option(help="Share of every update's squared norm that the adapter keeps, such as 0.99.")
]
PerLayerRank = Annotated[
    bool, typer.Option("--per-layer-rank", help="Every module its own rank; engines read one rank for all.")
]
Rest = Annotated[
    str | None,
    typer.Option(help="What no low-rank update holds (norms, biases): save it in the adapter, drop it, or refuse."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
BackendName = Annotated[str, typer.Option("--backend", help="threads, serial or ray; the bytes are the same.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Cluster for --backend ray: auto or host:port; without, one is started on this machine."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Tensors at a time; one per core by default.")]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="Folder that keeps decompositions and merged matrices for other merges.")
]
CacheSize = Annotated[str, typer.Option(help="Most bytes kept in the cache; the least recently used go first.")]
SplitTensors = Annotated[
    bool, typer.Option("--split-tensors/--whole-tensors", help="Whether idle workers take part in another's tensor.")
]
Memory = Annotated[str, typer.Option(help="Bytes in flight at most.")]
Checksums = Annotated[
    str, typer.Option(help="Digests of the inputs in run.json: of a sample of each file, or of the full file.")
]
Measure = Annotated[bool, typer.Option("--measure", help="Measure how well each task's features survive.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of that name.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]


def recipe_from(
    models: Sequence[str],
    *,
    method: str | None,
    weights: str | None,
    dtype: str | None,
    seed: int | None,
    output: Mapping[str, Any],
    statistics: str | None = None,
    learned: str | None = None,
    non_finite: str | None = None,
) -> Recipe:
    """Return the recipe that the command line describes; flags override what a recipe file says.

    Args:
        models: a recipe file, or base and fine-tunes; among them the method's options.
        method: name of the method.
        weights: one number per fine-tune, with commas.
        dtype: of the output.
        seed: of methods that draw random numbers.
        output: what comes out, as far as flags say.
        statistics: one file per fine-tune, with commas.
        learned: folder of an earlier merge.
        non_finite: what becomes of NaN and infinity in inputs.

    Returns:
        The recipe.

    Raises:
        SuperposeError: it describes none.
    """
    from superpose.recipe import DEFAULT_METHOD, load_recipe

    paths, options = split_arguments(models)
    if len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        content = load_recipe(paths[0]).model_dump(mode="json", exclude_unset=True)
    elif len(paths) < 2:
        raise SuperposeError(
            "a base and at least one fine-tune are needed",
            where=f"arguments: {' '.join(models)}",
            mend="superpose merge BASE TUNED [TUNED ...] -o OUT, or superpose merge RECIPE.yaml -o OUT",
        )
    else:
        content = {"base": paths[0], "models": [{"path": path} for path in paths[1:]]}
    if method is not None and method != content.get("method", DEFAULT_METHOD):
        content = {**content, "method": method, "options": {}}
    content["options"] = {**content.get("options", {}), **options}
    said = {"dtype": dtype, "seed": seed, "learned": learned, "non_finite": non_finite}
    content |= {key: value for key, value in said.items() if value is not None}
    if statistics is not None:
        content["models"] = _with_statistics(content["models"], statistics)
    if output:
        content["output"] = {**content.get("output", {}), **output}
    if weights is not None:
        content["models"] = _with_weights(content["models"], weights)
    return load_recipe(content)


def output_from(
    shard_size: str | None,
    form: str | None,
    rank: int | None,
    energy: float | None,
    per_layer_rank: bool,
    rest: str | None,
) -> dict[str, Any]:
    """Return what flags say of the output, as the recipe's section has it.

    Args:
        shard_size: most bytes in a file.
        form: "model", "adapter" or "both".
        rank: most directions of an adapter's modules.
        energy: share of the squared norm that is kept.
        per_layer_rank: whether every module has its own rank.
        rest: what happens to what no low-rank update holds.

    Returns:
        The section; keys that no flag is about are left out.
    """
    given = {"shard_size": shard_size, "form": form, "rank": rank, "energy": energy, "rest": rest}
    said = {key: value for key, value in given.items() if value is not None}
    return {**said, "per_layer_rank": True} if per_layer_rank else said


def warn(record: RunRecord) -> None:
    """Print a merge's warnings on stderr, the first of them if they are many."""
    for warning in record.warnings[:MOST_WARNINGS]:
        typer.echo(f"warning: {printable(warning)}", err=True)
    if len(record.warnings) > MOST_WARNINGS:
        more = len(record.warnings) - MOST_WARNINGS
        typer.echo(f"warning: {more} more warnings are in {Path(record.output) / 'run.json'}", err=True)


def scaling_factors(arguments: Sequence[str], output: Path) -> tuple[list[float], list[str]]:
    """Return the scaling factors that make an output each (--scaling-factor 0.4 0.6), and the other arguments."""
    for place, argument in enumerate(arguments):
        if argument not in ("--scaling-factor", "--scaling_factor"):
            continue
        stop, factors = place + 1, []
        while stop < len(arguments) and (number := _number(arguments[stop])) is not None:
            factors.append(number)
            stop += 1
        if len(factors) > 1 or (factors and "{scaling_factor}" in output.name):
            return factors, [*arguments[:place], *arguments[stop:]]
    return [], list(arguments)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # a path, or the next option
        return None


@contextlib.contextmanager
def exit_codes(kept: Path | None = None) -> Iterator[None]:
    """Turn errors into lines on stderr and an exit code.

    Args:
        kept: folder in which the state of an interrupted merge stays.
    """
    try:
        with _interrupts_that_stay():
            yield
    except SuperposeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        raise _interruption(error, kept) from error
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError, OSError) as error:
        if is_shortage(error):
            mend = "run the same command again with --workers 1 and a smaller --memory, or raise the limit (ulimit -v)"
            problem = SuperposeError(
                f"memory ran out: {str(error).partition(chr(10))[0] or type(error).__name__}",
                where=str(kept or ""),
                mend=mend,
            )
            typer.echo(f"error: {problem}", err=True)
            raise typer.Exit(BAD_INPUT) from error
        if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
            raise
        place = error.filename or kept or "the output"
        mend = "free some space or choose another place, and run the same command again"
        typer.echo(f"error: {SuperposeError(str(error.strerror), where=str(place), mend=mend)}", err=True)
        raise typer.Exit(BAD_INPUT) from error


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which systems ask a process to end before they kill it: treated like Ctrl-C."""


@contextlib.contextmanager
def _interrupts_that_stay() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the work in good order; at once where that takes too long, or at a second one.

    Out of a library's native code the interruption can come as another error: what follows it is one all the same.
    """
    pressed: list[type[KeyboardInterrupt]] = []
    timers: list[threading.Timer] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        kind = _Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if pressed:
            _leave_at_once(_EXIT_CODES[kind])
        pressed.append(kind)
        timers.append(threading.Timer(PATIENCE, _leave_at_once, [_EXIT_CODES[kind]]))
        timers[0].daemon = True
        timers[0].start()
        raise kind

    # Someone else's handler, and a signal that the caller has ignored, are left alone; so are other threads.
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if here and handler in _DEFAULT_HANDLERS]
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    except Exception as error:  # raised again, whatever it is; after an interruption as what it was
        if pressed:
            raise pressed[0] from error
        raise
    finally:
        for timer in timers:
            timer.cancel()
        for number in ours:
            signal.signal(number, before[number])


def leave_when_swallowed() -> None:
    """Let an interruption end the process that native code could raise nowhere: nobody would hear of it any more."""
    before = sys.unraisablehook

    def swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _leave_at_once(_EXIT_CODES.get(type(unraisable.exc_value), INTERRUPTED))
        before(unraisable)

    sys.unraisablehook = swallowed


def _leave_at_once(code: int) -> None:
    """End the process without waiting for the tensors in flight: nothing is lost by that but their time."""
    os.write(2, b"\nstopped at once; what is finished is kept\n")
    os._exit(code)


_DEFAULT_HANDLERS = (signal.default_int_handler, signal.SIG_DFL)
_EXIT_CODES = {KeyboardInterrupt: INTERRUPTED, _Terminated: TERMINATED}


def _interruption(error: KeyboardInterrupt, kept: Path | None) -> typer.Exit:
    typer.echo("\nterminated" if isinstance(error, _Terminated) else "\ninterrupted", err=True)
    if kept is not None and kept.exists():
        typer.echo(f"what is finished is kept in {printable(str(kept))}; run the same command again to go on", err=True)
    return typer.Exit(_EXIT_CODES.get(type(error), INTERRUPTED))


def size(count: float) -> str:
    """Return a number of bytes in words: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print a table on stdout; as wide as it needs where there is no terminal to fit into."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))  # as text: a name with brackets is no markup
    console.print(table)


def split_arguments(arguments: Sequence[str], switches: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Tell paths from options that the command line does not know, which come as --name value or --name=value.

    Args:
        arguments: what was left over.
        switches: options that may stand without a value, and are then true.

    Returns:
        Paths, and options by name.

    Raises:
        SuperposeError: an option has no value.
    """
    paths, options = [], {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            paths.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and name in switches and (not rest or rest[0].lower() not in ("true", "false")):
            value = "true"
        elif not equals:
            if not rest or rest[0] == "" or rest[0].startswith("--"):
                flag = argument.partition("=")[0]
                raise SuperposeError(f"option {flag} has no value", where="command line", mend=f"write {flag} VALUE")
            value = rest.pop(0)
        options[name] = value
    return paths, options


def _with_statistics(models: Sequence[dict], text: str) -> list[dict]:
    files = text.split(",")
    if len(files) != len(models):
        what, mend = f"{len(files)} files for {len(models)} fine-tunes", "name one per fine-tune, with commas"
        raise SuperposeError(what, where="--statistics", mend=mend)
    return [{**model, "statistics": file} for model, file in zip(models, files, strict=True)]


def _with_weights(models: Sequence[dict], text: str) -> list[dict]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(models):
        mend = f"write {len(models)} numbers with commas"
        raise SuperposeError(f"'{text}' is not one weight per fine-tune", where="--weights", mend=mend)
    return [{**model, "weight": number} for model, number in zip(models, numbers, strict=True)]
