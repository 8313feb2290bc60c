"""Restricted reading of a pickle: a machine for its opcodes that imports nothing and calls nothing the pickle names.

Plain containers, numpy arrays and scalars are made (`makers.py` is the allow list). Classes and functions by name come
as `Named`, objects of RLlib's and gymnasium's data classes as `Record`, code by value as `Code` (`nodes.py`). Any other
call that the pickle asks for, whatever its opcode, ends the reading with an error that names it.
"""

from __future__ import annotations

import copyreg
import pickletools
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from rl_ckpt.errors import CorruptionError, UntrustedDataError
from rl_ckpt.rllib.embedded import hides_pickle
from rl_ckpt.rllib.native.makers import UnfinishedArray, UnfinishedDtype, finish, make, record
from rl_ckpt.rllib.native.nodes import Call, Code, Named, Record, inside

_ADVICE = "nothing was called; if you trust whoever wrote these files, import them with trust='full'"
_UNREADABLE = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)


def restricted_loads(data: bytes, file: str) -> Any:
    """The value that a pickle describes, without running any code of or named by it.

    Args:
        data: The whole pickle.
        file: Its name, for errors.

    Returns:
        Plain containers and numpy values, with `Named`, `Record` and `Code` in the place of what was not made.

    Raises:
        UntrustedDataError: It asks for a call that is not on the allow list; names what it wanted to call.
        CorruptionError: It is no pickle, or a truncated one.
    """
    machine = _Machine()
    try:
        result = machine.run(data)
    except _UNREADABLE as error:
        machine.refuse(None, file)  # a refused call may be why the rest does not fit
        raise CorruptionError(
            f"{file}: no pickle that can be read ({len(data)} bytes: {type(error).__name__}: {error}); "
            "the file is damaged or truncated"
        ) from error
    machine.refuse(result, file)
    return result


class _Machine:
    """Stack, marks and memo of one reading."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._calls: list[Call] = []
        self._code: list[Code] = []

    def run(self, data: bytes) -> Any:
        """Executes all opcodes; the value that STOP leaves, finished."""
        steps = _STEPS
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return finished(self._stack.pop())
            steps[opcode.name](self, arg)
        raise ValueError("no STOP")

    def refuse(self, result: Any, file: str) -> None:
        """Raises for calls that are neither allowed nor part of code that was not made."""
        found = inside(result)
        reached = {id(value) for value in found}
        excused = {id(value) for code in self._code for value in inside(*code.parts)}
        bad = [call for call in self._calls if id(call) in reached or id(call) not in excused]
        if bad:
            names = ", ".join(dict.fromkeys(call.what for call in bad))
            raise UntrustedDataError(f"{file}: the pickle wants to call {names}, which is not allowed; {_ADVICE}")
        if any(hides_pickle(value) for value in found):
            raise UntrustedDataError(
                f"{file}: a text in it hides a numpy file with a pickle, which RLlib would load; {_ADVICE}"
            )

    # Every method below is one opcode, or the common part of some.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def call(self, what: Any, args: Any) -> None:
        """Pushes what a call gives: a value, a description, or a `Call` that is refused in the end."""
        if isinstance(what, Code):
            self.code(what, args)
            return
        made = make(what, tuple(args)) if isinstance(what, Named) else NotImplemented
        if made is NotImplemented:
            self.bad_call(what, args)
            return
        if isinstance(made, Code):
            self._code.append(made)
        self.push(made)

    def code(self, what: Code, args: Any) -> None:
        """Pushes what code by value would give: as it was not made, neither is this."""
        self._code.append(Code(what.maker, [what, *args]))
        self.push(self._code[-1])

    def bad_call(self, what: Any, args: Any) -> None:
        if isinstance(what, Named) and what.module in ("copyreg", "copy_reg") and args and isinstance(args[0], Named):
            what = args[0]  # whose constructor it would call
        name = what.dotted if isinstance(what, Named) else getattr(what, "what", None) or f"a {type(what).__name__}"
        call = Call(name, [what, *args])
        self._calls.append(call)
        self.push(call)

    def reduce(self, _: Any) -> None:
        args = self._stack.pop()
        self.call(self._stack.pop(), args)

    def new(self, kind: Any, args: Any, more: Any = None) -> None:
        if isinstance(kind, Code):
            self.code(kind, (*args, more))
            return
        made = record(kind, tuple(args)) if isinstance(kind, Named) and not more else NotImplemented
        if made is NotImplemented:
            self.bad_call(kind, args)
        else:
            self.push(made)

    def newobj(self, _: Any) -> None:
        args = self._stack.pop()
        self.new(self._stack.pop(), args)

    def newobj_ex(self, _: Any) -> None:
        kwargs, args = self._stack.pop(), self._stack.pop()
        self.new(self._stack.pop(), args, kwargs)

    def inst(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.new(Named(module, name), self.since_mark())

    def obj(self, _: Any) -> None:
        kind, *args = self.since_mark()
        self.new(kind, args)

    def build(self, _: Any) -> None:
        state, value = finished(self._stack.pop()), self._stack[-1]
        if finish(value, state) is not NotImplemented:
            return
        if isinstance(value, Call):
            value.parts.append(state)
            return
        self._stack.pop()
        kind = value.dotted if isinstance(value, Named) else type(value).__name__
        self.bad_call(Named(kind, "__setstate__"), (value, state))

    def global_(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.push(Named(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a global whose name is no text")
        self.push(Named(module, name))

    def extension(self, code: int) -> None:
        known = {number: ".".join(key) for key, number in copyreg._extension_registry.items()}  # type: ignore[attr-defined]
        self.bad_call(None, ())
        self._calls[-1].what = f"extension {code} of copyreg ({known.get(code, 'not registered here')})"

    def persistent(self, arg: Any) -> None:
        self.bad_call(None, ())
        self._calls[-1].what = "persistent_load"

    def buffer(self, _: Any) -> None:
        raise ValueError("its values are in a buffer outside of the file")

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        items = [finished(item) for item in items]
        if isinstance(target, list | deque):
            target.extend(items)
        elif isinstance(target, Code | Call):
            target.parts.extend(items)
        else:
            self.bad_call(Named(_kind(target), "extend"), [*items])

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        pairs = [(finished(items[i]), finished(items[i + 1])) for i in range(0, len(items), 2)]
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Record):
            target.items.update(pairs)
        elif isinstance(target, Code | Call):
            target.parts.extend(pairs)
        else:
            self.bad_call(Named(_kind(target), "__setitem__"), pairs)

    def add_items(self, _: Any) -> None:
        items = self.since_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise TypeError("members for something that is no set")
        target.update(finished(item) for item in items)

    def pop_mark(self, _: Any) -> None:
        self.since_mark()

    def dict_(self, _: Any) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def tuple_of(self, count: int | None) -> None:
        items = self.since_mark() if count is None else self._stack[-count:]
        if count is not None:
            if len(items) < count:
                raise IndexError("stack underflow")
            del self._stack[-count:]
        self.push(tuple(finished(item) for item in items))

    def get(self, key: Any) -> None:
        self.push(self._memo[int(key)])

    def put(self, key: Any) -> None:
        self._memo[int(key)] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._marks.pop()


def finished(value: Any) -> Any:
    """An array or dtype as itself; anything else unchanged.

    Raises:
        ValueError: An array whose values never came.
    """
    if isinstance(value, UnfinishedArray):
        if value.array is None:
            raise ValueError("an array without values")
        return value.array
    return value.dtype if isinstance(value, UnfinishedDtype) else value


def _kind(value: Any) -> str:
    return value.kind.dotted if isinstance(value, Record) else getattr(value, "dotted", type(value).__name__)


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _nothing(machine: _Machine, _: Any) -> None:
    return None


_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
    *("BINBYTES", "BINBYTES8", "SHORT_BINBYTES"),
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    "BYTEARRAY8": lambda machine, arg: machine.push(bytearray(arg)),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.push([finished(item) for item in machine.since_mark()]),
    "DICT": _Machine.dict_,
    "FROZENSET": lambda machine, _: machine.push(frozenset(finished(item) for item in machine.since_mark())),
    "APPEND": lambda machine, _: machine.append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine._stack.pop(-2), machine._stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "ADDITEMS": _Machine.add_items,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": lambda machine, _: machine.push(machine._stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "BUILD": _Machine.build,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.extension),
    **dict.fromkeys(("PERSID", "BINPERSID"), _Machine.persistent),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), _Machine.buffer),
}
