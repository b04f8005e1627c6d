"""Ctrl-C at a chosen bytecode of our own code."""

from __future__ import annotations

import opcode
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# No signal is delivered between these; raising there leaves the interpreter's own exception stack unbalanced.
UNWINDING = {"PUSH_EXC_INFO", "POP_EXCEPT", "RERAISE", "COPY"}


class Interrupter:
    """Raises `KeyboardInterrupt` before the n-th bytecode of modelcache, the frames of finalizers apart.

    What a finalizer calls is included: the interpreter reports the interrupt and swallows it there.
    """

    def __init__(self, after: int) -> None:
        self.left, self.struck = after, False

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_name == "__del__" or not frame.f_globals["__name__"].startswith("modelcache"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.struck:
            if opcode.opname[frame.f_code.co_code[frame.f_lasti]] in UNWINDING:
                return self
            self.left -= 1
            if self.left < 0:
                self.struck = True
                raise KeyboardInterrupt
        return self


def interrupted(use: Callable[[], None], after: int) -> bool:
    """Whether `use` was interrupted: False when it has no more than `after` bytecodes of ours."""
    interrupter = Interrupter(after)
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
