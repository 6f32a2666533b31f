"""A TorchScript module in memory as a carrier, by way of the archive that torch.jit.save makes of it."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from wnconvert.carriers.torchscript.archive import Archive, first_line
from wnconvert.carriers.torchscript.carrier import TorchScriptCarrier
from wnconvert.errors import UsageError, VerificationError
from wnconvert.sites import Scheme, Site


class ScriptedCarrier(TorchScriptCarrier):
    """Fulfils `Carrier` for a scripted or traced module, which is left alone."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self._module = module
        saved = io.BytesIO()
        torch.jit.save(module, saved)
        super().__init__(Archive(saved.getvalue(), f"TorchScript module {module.original_name}"))

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:  # noqa: ARG002
        """No.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a TorchScript module cannot carry g and v: wnconvert.apply(dict(module.state_dict())) splits its state "
            "dict, ready for wnconvert.load_into"
        )

    def rebuild(self) -> Any:
        """A new module with the weights folded so far; the module itself if there are none.

        Raises:
            VerificationError: torch does not take it.
        """
        if not self.is_folded:
            return self._module
        saved = io.BytesIO()
        self.write(saved)
        saved.seek(0)
        try:
            return torch.jit.load(saved)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise VerificationError(f"torch cannot load the folded module: {first_line(error)}") from error
