"""What must hold in a process before it imports the model libraries."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

MEMORY = 8 << 30
"""Bytes that one worker may hold."""


def prepare(*, memory: int = MEMORY) -> None:
    """Make this process quiet, offline, single-threaded and bounded in memory, and torchvision importable."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "critical"}
    # Large pages: half of the time would go into handing out memory.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # Private memory alone: what a process maps from libraries is shared.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    _return_freed_memory()
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    let_torchvision_load()


def _return_freed_memory() -> None:
    """Let every tensor of some size be a mapping of its own, which goes back to the system when it is freed.

    The heap of a process that lives long would be full of holes that no larger network fits into.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold = -3
        mallopt(mmap_threshold, 1 << 20)


def let_torchvision_load() -> None:
    """Let the Python part of torchvision load where its compiled operators do not.

    Its wheel is built for CUDA. Its operators then do not exist, and descriptions of them cannot be registered.
    """
    import torch

    register: Callable[..., Any] = torch.library.register_fake

    def patched(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = patched
    try:
        import torchvision
    except ImportError:
        return
    if not torchvision.extension._has_ops():
        _replace_nms()


def _replace_nms() -> None:
    """Detection models suppress overlapping boxes with a compiled operator; its Python twin is a few lines."""
    import torch
    from torch import Tensor
    from torchvision.ops import boxes

    def nms(candidates: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        order, kept = scores.argsort(descending=True, stable=True), []
        overlap = boxes.box_iou(candidates, candidates)
        while len(order):
            kept.append(order[0])
            order = order[1:][overlap[order[0], order[1:]] <= iou_threshold]
        return torch.stack(kept) if kept else order

    _replace_everywhere(boxes.nms, nms)


def _replace_everywhere(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and getattr(module, "__name__", "").startswith("torchvision"):
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)
