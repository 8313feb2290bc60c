"""References: classes and functions by name, "package.module:Qualname", and back.

Owns: the names under which a checkpoint knows code. Promises: a name is given only to what is found under it again, and
nothing of a checkpoint's is run to find it, except that its modules are imported. What has no such name (lambdas,
closures, classes made in functions, where no variable of a module holds them) is described for a person instead. Does
not do: pickling, of anything.
"""

from __future__ import annotations

import importlib
import sys
import types
import weakref
from pathlib import PurePath
from typing import Any

from rl_ckpt.errors import InvalidInputError

_STDLIB_ALLOWED = frozenset(("collections", "math"))
"""Of Python's own library a config has use for little, and `os:system` in a checkpoint would be somebody's trick."""
_IMPORT_ERRORS = (ImportError, SyntaxError, AttributeError, NameError, LookupError, TypeError, ValueError, OSError)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def class_ref(obj: object) -> str:
    """The name of a class or function.

    Args:
        obj: A class, a function, a static or class method.

    Returns:
        "package.module:Qualname", for `resolve`.

    Raises:
        InvalidInputError: It can't be found by a name; the message says what it is and why.
    """
    module, name = _names(obj)
    if "<" in name:
        return _variable(module, obj)
    _check_allowed(module, name, obj)
    loaded = sys.modules.get(module)
    if loaded is not None:  # else it came by value from another process, which is asked when it is resolved
        try:
            found = _walk(loaded, name)
        except AttributeError as error:
            if module != "__main__":  # the driver's script: in Ray's processes `__main__` is another
                raise InvalidInputError(f"{describe(obj)}, which its module does not have") from error
        else:
            if not _same(found, obj):
                raise InvalidInputError(f"{describe(obj)}, whose name stands for something else in its module")
    return f"{module}:{name}"


def resolve(ref: str) -> Any:
    """The class or function that `class_ref` named.

    Raises:
        InvalidInputError: It is not found here; the message names it.
    """
    module, colon, name = ref.partition(":")
    if not (module and colon and name):
        raise InvalidInputError(f"{ref!r} is no name of a class or function")
    _check_importable(module, name)
    try:
        found = _walk(importlib.import_module(module), name)
    except _IMPORT_ERRORS as error:
        raise InvalidInputError(f"{ref!r} is not found here ({_why(module, error)})") from error
    if not isinstance(found, (type, types.MethodType, *_FUNCTIONS)):
        raise InvalidInputError(f"{ref!r} is a {type(found).__name__} here, and no class or function")
    if "<" in getattr(found, "__qualname__", "") and "." not in name:
        _check_allowed(module, name, found)
    elif class_ref(found) != ref:  # `torch:os.system` leads to code that the name does not tell of
        raise InvalidInputError(f"{ref!r} leads to {class_ref(found)!r} here, which is something else")
    return found


def describe(obj: object) -> str:
    """What an object is, in a few words for a person: "a lambda (train.py, line 12)"."""
    if isinstance(obj, types.FunctionType):
        code = obj.__code__
        where = f"({PurePath(code.co_filename).name}, line {code.co_firstlineno})"
        if obj.__name__ == "<lambda>":
            return f"a lambda {where}"
        if "<locals>" in obj.__qualname__:
            free = ", ".join(code.co_freevars)
            return f"the function {_readable(obj)} {where}" + (f" with values of its own ({free})" if free else "")
        return f"the function {_readable(obj)} {where}"
    if isinstance(obj, types.MethodType):
        return f"the method {obj.__name__} of {describe(obj.__self__)}"
    if isinstance(obj, type):
        return f"the class {_readable(obj)}"
    return f"an object of class {_readable(type(obj))}"


def _readable(obj: Any) -> str:
    name = str(obj.__qualname__)
    inside, _, last = name.rpartition(".<locals>.")
    return f"{obj.__module__}:{name}" if not inside else f"{last}, made inside {obj.__module__}:{inside}"


def _names(obj: Any) -> tuple[str, str]:
    if isinstance(obj, types.MethodType):
        owner = obj.__self__
        if not isinstance(owner, type):
            raise InvalidInputError(f"{describe(obj)}, and that object is not stored")
        return owner.__module__, f"{owner.__qualname__}.{obj.__name__}"
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if isinstance(obj, (type, *_FUNCTIONS)) and isinstance(module, str) and isinstance(name, str):
        return module, name
    raise InvalidInputError(f"{describe(obj)}, which is neither data nor found by a name")


_nameless: weakref.WeakSet[Any] = weakref.WeakSet()
"""What no variable held when it was looked for, which takes 20 ms; every save asks for the same lambdas."""


def _variable(module: str, obj: Any) -> str:
    """The name of the module's variable that holds a lambda, or what a function made: `MyEnv = make_env(...)`."""
    if obj not in _nameless:
        loaded = {key: found for key, found in list(sys.modules.items()) if isinstance(found, types.ModuleType)}
        # Where it was made first; then in one order, so that the same config is the same checkpoint.
        for key in [module, *sorted(loaded)]:
            if key in loaded and key.partition(".")[0] not in sys.stdlib_module_names:
                for name, value in list(vars(loaded[key]).items()):
                    if value is obj:
                        return f"{key}:{name}"
        _nameless.add(obj)
    raise InvalidInputError(f"{describe(obj)}, which has no name to find it by")


def _check_importable(module: str, name: str) -> None:
    """Before it is imported, as that alone does something: `antigravity` opens a browser, `idlelib.idle` a window."""
    root, _, last = module.partition(".")
    if root in sys.stdlib_module_names and root not in _STDLIB_ALLOWED and root != "builtins":
        raise InvalidInputError(f"{module}:{name} of Python's own library, which a checkpoint may not name")
    if last.rpartition(".")[2] == "__main__":
        raise InvalidInputError(f"{module}:{name} of a program, which a checkpoint may not name")


def _check_allowed(module: str, name: str, obj: object) -> None:
    if module.partition(".")[0] == "builtins" and not isinstance(obj, type):
        raise InvalidInputError(f"{module}:{name} of Python's own library, which a checkpoint may not name")
    _check_importable(module, name)


def _walk(module: types.ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _same(found: object, obj: object) -> bool:
    if isinstance(found, types.FunctionType) and isinstance(obj, types.FunctionType):
        return found.__code__ == obj.__code__  # a function of `__main__` that went through Ray is a copy
    return found is obj or (isinstance(obj, types.MethodType) and found == obj)


def _why(module: str, error: Exception) -> str:
    if module == "__main__":
        return "it was defined in the script that saved; define it in this one, or in a module that both import"
    return f"{type(error).__name__}: {error}"
