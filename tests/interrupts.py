"""Ctrl-C at a chosen bytecode of our own code."""

from __future__ import annotations

import opcode
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

#: After these the interpreter looks for signals, and nowhere else. What takes locks is interrupted here only: a signal never
#: comes between the body of a `with` block and its end.
LOOKS = ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD", "RESUME")
#: No signal is delivered before these; raising there leaves the interpreter's own exception stack unbalanced.
UNWINDING = {"PUSH_EXC_INFO", "POP_EXCEPT", "RERAISE", "COPY"}


class Interrupter:
    """Raises `KeyboardInterrupt` before the n-th bytecode of modelcache, the frames of finalizers apart.

    What a finalizer calls is included: the interpreter reports the interrupt and swallows it there.

    Args:
        after: How many bytecodes are let by.
        anywhere: Before any bytecode; else only where a signal could come.
    """

    def __init__(self, after: int, *, anywhere: bool) -> None:
        self.left, self.anywhere, self.struck = after, anywhere, False

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_name == "__del__" or not frame.f_globals["__name__"].startswith("modelcache"):
            return None
        frame.f_trace_opcodes = True
        return _Frame(self)

    def moment(self) -> None:
        """A bytecode that counts."""
        if not self.struck:
            self.left -= 1
            if self.left < 0:
                self.struck = True
                raise KeyboardInterrupt


class _Frame:
    """Traces one frame, whose last operation says whether a signal may come now."""

    def __init__(self, interrupter: Interrupter) -> None:
        self.interrupter, self.last = interrupter, ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            last, self.last = self.last, opcode.opname[frame.f_code.co_code[frame.f_lasti]]
            if (self.interrupter.anywhere or last in LOOKS) and self.last not in UNWINDING:
                self.interrupter.moment()
        return self


def interrupted(use: Callable[[], None], after: int, *, anywhere: bool = True) -> bool:
    """Whether `use` was interrupted: False when it has no more than `after` bytecodes that count; see `Interrupter`."""
    interrupter = Interrupter(after, anywhere=anywhere)
    # Python 3.12 turns opcode events on for a process only when a frame asked for them before tracing starts.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(interrupter)
    try:
        use()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return interrupter.struck
