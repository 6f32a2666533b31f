"""TorchScript as a carrier, in a file or in memory."""

from wnconvert.carriers.torchscript.carrier import TorchScriptCarrier
from wnconvert.carriers.torchscript.scripted import ScriptedCarrier

__all__ = ["ScriptedCarrier", "TorchScriptCarrier"]
