"""Whether anybody is looking on while Python runs."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_plain() -> bool:
    """No compiler, tracer, dispatch mode, transform of torch.func or forward-mode derivative looks on."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )
