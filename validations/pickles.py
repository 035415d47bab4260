"""What a pickle would import and call, read off its opcodes: nothing is unpickled and nothing imported.

Own code beside the scanners, because unpicklers run what comes before an error: here a pickle that is broken,
headless or in the middle of other bytes counts by what it would have done up to there.
"""

import pickletools
import re
from collections.abc import Iterator

_ATTACKERS = (
    rb"(?:os|posix|nt|ntpath|posixpath|subprocess|sys|builtins|__builtin__|importlib|runpy|pip|webbrowser|socket|shutil|"
    rb"ctypes|pty|code|codeop|commands|platform|pickle|_pickle|cPickle|cloudpickle|dill|joblib|marshal|types|operator|"
    rb"_operator|functools|_functools|torch|numpy|pandas|asyncio|timeit|profile|cProfile|pdb|bdb|trace|multiprocessing|"
    rb"threading|_thread|signal|tempfile|io|_io|pathlib|urllib|http|requests|httpx|aiohttp|ssl|smtplib|ftplib|"
    rb"telnetlib|idlelib|lib2to3|ensurepip|venv|zipimport|pkgutil|pydoc|doctest|unittest|test|distutils|setuptools|"
    rb"tensorflow|keras|transformers|mlflow|site|sysconfig|linecache|logging|inspect|gc|atexit|uuid|imaplib|_winreg)"
    rb"(?:\.\w+)*"
)
"""Modules that pickles of attackers import, for where nothing but the name tells a pickle from other bytes."""
_HEADER = re.compile(rb"\x80[\x02-\x05][\x95(\]})\x8fcNKMJGXUTVC\x8c-\x8e\x8a\x8b\x88\x89\x82-\x84\x80SILFPB]")
"""The protocol byte and what may follow it: a frame, a mark, an empty container, a global or a value."""
# One expression each: the search for a first byte is fast, and that for one of several is not.
_HIDDEN_HEADER = re.compile(rb"\x80[\x02-\x05][\x95(\]})\x8fcNKMJGXUTVC\x8c\x8d\x8a\x88\x89\x82-\x84\x80]")
_GLOBAL = re.compile(rb"c" + _ATTACKERS + rb"\n\w")
_INST = re.compile(rb"i" + _ATTACKERS + rb"\n\w")
_SHORT = re.compile(rb"\x8c[\x02-\x40]" + _ATTACKERS)
_OLD = re.compile(rb"U[\x02-\x40]" + _ATTACKERS)
_LONG = re.compile(rb"X[\x02-\x40]\x00\x00\x00" + _ATTACKERS)
_OLD_LONG = re.compile(rb"T[\x02-\x40]\x00\x00\x00" + _ATTACKERS)
_REACH = 65_536
"""How far a hidden pickle is read on, in bytes."""
_MOST_OPCODES = 100_000
"""A call that comes later than that is no hidden payload's: those are short, and a scan must end."""

Name = str


def begins(head: bytes) -> list[Name] | None:
    """What the pickle that `head` begins with imports ("module.name"; may be empty), None where it is no pickle.

    A pickle of protocol 0 or 1 has no magic, and text may look like one: a list of requirements that starts
    with "cloudpickle" imports "loudpickle". Those are pickles when they import and then call something, or
    import something and are well formed to the end.
    """
    names, calls, complete, _ = _read(head)
    if _HEADER.match(head) or (names and (calls or complete)):
        return names
    return None


class TooMany(ValueError):
    """So many beginnings of pickles that reading them would take for ever: no honest data has them."""


class Search:
    """The search of one file, of `size` bytes, for pickles behind other bytes; it ends on any input.

    Random bytes begin a pickle every 100 kB and break it off within a few opcodes: they use up a hundredth of
    what is allowed.
    """

    def __init__(self, size: int) -> None:
        self.left = 500_000 + size // 100

    def __call__(self, data: bytes, end: int) -> list[Name] | None:
        """What the first pickle within `data` that would call something imports, None where there is none.

        Only those that begin before `end` are looked for; what follows is there to be read on in. Raises
        `TooMany`.
        """
        for start in _candidates(data, end):
            names, calls, _, done = _read(data[start : start + _REACH])
            self.left -= done + 20
            if names and calls:
                return names
            if self.left < 0:
                raise TooMany
        return None


def _candidates(data: bytes, end: int) -> Iterator[int]:
    """Where a pickle may begin: at a header, or headless at the import of a module that attackers use."""
    limit = min(len(data), end + 100)
    for pattern in (_HIDDEN_HEADER, _GLOBAL, _SHORT, _LONG, _OLD, _OLD_LONG):
        for found in pattern.finditer(data, 0, limit):
            if found.start() < end:
                yield found.start()
    for found in _INST.finditer(data, 0, limit):
        # Its arguments stand before it, after a mark: text that merely reads so has no mark in reach.
        mark = found.start()
        for _ in range(8):
            mark = data.rfind(b"(", max(found.start() - 300, 0), mark)
            if mark < 0:
                break
            yield mark


_MARK = object()
_CALLS = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}


def _read(data: bytes) -> tuple[list[Name], bool, bool, int]:
    """What is imported; whether something is called after an import; whether the pickle is well formed; and
    the number of opcodes read.
    """
    names: list[Name] = []
    calls = complete = False
    done = 0
    stack: list[object] = []
    memo: dict[object, object] = {}
    try:
        for done, (name, argument) in enumerate(_opcodes(data), 1):
            if done > _MOST_OPCODES:
                break
            if name in _IMPORTS:
                names.append(_imported(name, argument, stack))
            if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "MARK":
                stack.append(_MARK)
            else:
                _apply(name, argument, stack)
            calls = calls or (bool(names) and name in _CALLS)
            complete = name == "STOP"
    except (ValueError, LookupError, OverflowError, TypeError):
        pass  # what came before is what an unpickler would have run
    return list(dict.fromkeys(names)), calls, complete, done


def _opcodes(data: bytes) -> Iterator[tuple[str, object]]:
    for opcode, argument, _ in pickletools.genops(data):
        yield opcode.name, argument


_EFFECTS = {opcode.name: opcode for opcode in pickletools.opcodes}


def _apply(name: str, argument: object, stack: list[object]) -> None:
    """Do to the stack what the opcode does; raises LookupError where there is too little on it."""
    effect = _EFFECTS[name]
    if pickletools.markobject in effect.stack_before:
        while stack.pop() is not _MARK:
            pass
        below = effect.stack_before.index(pickletools.markobject)
    else:
        below = len(effect.stack_before)
    for _ in range(below):
        stack.pop()
    value = argument if isinstance(argument, str) and name not in _IMPORTS else None
    stack.extend(value for _ in effect.stack_after)


def _imported(name: str, argument: object, stack: list[object]) -> Name:
    if name == "STACK_GLOBAL":
        module, attribute = stack[-2], stack[-1]
        words = [word if isinstance(word, str) else "?" for word in (module, attribute)]
        return ".".join(words)
    if name.startswith("EXT"):
        return f"extension {argument}"
    return str(argument).replace(" ", ".", 1)
