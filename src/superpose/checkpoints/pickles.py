"""The pickle in a file of torch.save, followed with numbers in place of values before PyTorch reads it.

PyTorch keeps a pickle from running code, but not from taking all memory or time: a few hundred instructions can build a
value that takes for ever to look up. Nor does it compare, where the file is mapped into memory, the size of a tensor's
entry with what the pickle says of it: what is missing would be read from the next tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MOST_INSTRUCTIONS = 5_000_000
"""About forty make a tensor."""
MOST_WORK = 50_000_000
"""Values that are put somewhere, counted through what they hold; fourfold for calls, which copy them."""
MOST_NESTED = 1_000_000
"""Values that one tuple may stand for: looked up as a key, it takes that many steps."""
COSTLY = frozenset({b"bytearray", b"encode"})
"""Of the calls that PyTorch allows, those that make as many bytes of a number or a short text as they are told to."""
_ITEMSIZES = {
    b"DoubleStorage": 8, b"FloatStorage": 4, b"HalfStorage": 2, b"BFloat16Storage": 2, b"LongStorage": 8,
    b"IntStorage": 4, b"ShortStorage": 2, b"CharStorage": 1, b"ByteStorage": 1, b"BoolStorage": 1, b"UntypedStorage": 1,
    b"ComplexFloatStorage": 8, b"ComplexDoubleStorage": 16,
}  # fmt: skip
"""Bytes per number; a type that is not here is not compared."""
_CONSTANTS = b"N\x88\x89"
_NUMBERS = {ord("J"): 4, ord("K"): 1, ord("M"): 2, ord("G"): 8}
_TEXTS = {ord("X"): 4, ord("U"): 1, 0x8A: 1}
_TUPLES = {ord(")"): 0, 0x85: 1, 0x86: 2, 0x87: 3}
_STORED = {ord("a"): 1, ord("b"): 1, ord("s"): 2}


class Value:
    """What stands for a value.

    Args:
        weight: values that it stands for: itself, and what it holds as often as it holds it.
        known: bytes of a text, a number, a name after "c", the values in a tuple; None for all else.
    """

    __slots__ = ("known", "weight")

    def __init__(self, weight: int, known: Any = None) -> None:
        self.weight = weight
        self.known = known


def check_pickle(pickled: bytes, sizes: Mapping[bytes, int]) -> None:
    """See that a pickle of tensors can be read in bounded time and memory, and that it fits what lies beside it.

    What is damaged, or nothing that torch.save writes, is left to PyTorch to refuse.

    Args:
        pickled: the pickle.
        sizes: bytes of each entry that holds a tensor's numbers, by the name that the pickle gives it.

    Raises:
        ValueError: it is not, in words.
    """
    try:
        _Follower(pickled, sizes).follow()
    except (IndexError, KeyError, TypeError, AttributeError):  # PyTorch comes to the same place, and says so
        return


class _Follower:
    """Follows the instructions of a pickle."""

    def __init__(self, pickled: bytes, sizes: Mapping[bytes, int]) -> None:
        self._pickled = pickled
        self._sizes = sizes
        self._place = 0
        self._work = 0
        self._stack: list[Value] = []
        self._marked: list[list[Value]] = []
        self._memo: dict[int, Value] = {}
        self._steps: dict[int, Callable[[int], None]] = {
            **dict.fromkeys(_CONSTANTS, lambda _: self._stack.append(Value(1))),
            **dict.fromkeys(b"]}\x8f", lambda _: self._stack.append(Value(1))),
            **dict.fromkeys(_NUMBERS, self._number),
            **dict.fromkeys(_TEXTS, self._text),
            **dict.fromkeys(_TUPLES, self._tuple),
            **dict.fromkeys(_STORED, self._store),
            **dict.fromkeys(b"qr", self._remember),
            **dict.fromkeys(b"hj", self._recall),
            **dict.fromkeys(b"eu", self._store_marked),
            **dict.fromkeys(b"R\x81", self._call),
            ord("("): self._mark,
            ord("t"): self._marked_tuple,
            ord("c"): self._name,
            ord("Q"): self._point,
            0x80: self._protocol,
        }

    def follow(self) -> None:
        """Follow the pickle to its end, or to an instruction that PyTorch does not know."""
        steps, pickled = self._steps, self._pickled
        for _ in range(MOST_INSTRUCTIONS):
            code = pickled[self._place]
            self._place += 1
            step = steps.get(code)
            if step is None:
                return
            step(code)
            if self._work > MOST_WORK:
                raise ValueError("its pickle copies its values over and over")
        raise ValueError(f"its pickle has more than {MOST_INSTRUCTIONS} instructions")

    def _take(self, length: int) -> bytes:
        taken = self._pickled[self._place : self._place + length]
        if len(taken) < length:
            raise IndexError(self._place)
        self._place += length
        return taken

    def _protocol(self, _: int) -> None:
        self._take(1)

    def _number(self, code: int) -> None:
        taken = self._take(_NUMBERS[code])
        self._stack.append(Value(1, int.from_bytes(taken, "little", signed=code == ord("J"))))

    def _text(self, code: int) -> None:
        length = int.from_bytes(self._take(_TEXTS[code]), "little")
        taken = self._take(length)
        self._stack.append(Value(1 + length, taken if code == ord("X") else int.from_bytes(taken, "little")))

    def _remember(self, code: int) -> None:
        self._memo[int.from_bytes(self._take(1 if code == ord("q") else 4), "little")] = self._stack[-1]

    def _recall(self, code: int) -> None:
        self._stack.append(self._memo[int.from_bytes(self._take(1 if code == ord("h") else 4), "little")])

    def _mark(self, _: int) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _tuple(self, code: int) -> None:
        count = _TUPLES[code]
        if count > len(self._stack):
            raise IndexError(self._place)
        held = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        self._add_tuple(held)

    def _marked_tuple(self, _: int) -> None:
        held, self._stack = self._stack, self._marked.pop()
        self._add_tuple(held)

    def _add_tuple(self, held: list[Value]) -> None:
        weight = sum(value.weight for value in held)
        if weight > MOST_NESTED:
            raise ValueError("its pickle holds tuples in tuples beyond counting")
        self._stack.append(Value(1 + weight, held))

    def _store(self, code: int) -> None:
        self._put(sum(self._stack.pop().weight for _ in range(_STORED[code])))

    def _store_marked(self, _: int) -> None:
        held, self._stack = self._stack, self._marked.pop()
        self._put(sum(value.weight for value in held))

    def _put(self, weight: int) -> None:
        self._work += weight
        self._stack[-1].weight += weight

    def _call(self, _: int) -> None:
        weight = self._stack.pop().weight
        self._work += 4 * weight
        self._stack[-1] = Value(1 + weight)

    def _name(self, _: int) -> None:
        first = self._pickled.find(b"\n", self._place) + 1
        end = self._pickled.find(b"\n", first)
        if not first or end < 0:
            raise IndexError(self._place)
        name = self._pickled[first:end]
        if name in COSTLY:
            raise ValueError(f"its pickle calls {name.decode()}")
        self._stack.append(Value(1, name))
        self._place = end + 1

    def _point(self, _: int) -> None:
        """Compare what a tensor points at, ("storage", type, name of the entry, device, count), with the entry."""
        _, kind, entry, _, count = self._stack[-1].known
        key = str(entry.known).encode() if isinstance(entry.known, int) else entry.known
        itemsize = _ITEMSIZES.get(kind.known, 0)
        if key not in self._sizes or not isinstance(count.known, int):
            raise ValueError("its pickle points at an entry that is not there")
        # A count is rounded down where the memory is no whole number of entries.
        if itemsize and not 0 <= self._sizes[key] - count.known * itemsize < itemsize:
            shown = key.decode("ascii", "replace")[:40]
            raise ValueError(f"entry {shown} has {self._sizes[key]} bytes, not the {count.known * itemsize} declared")
        self._stack[-1] = Value(self._stack[-1].weight)
