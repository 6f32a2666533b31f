"""A `torch.export.ExportedProgram` as a carrier. The program stays as it is; `rebuild` makes a new one."""

from wnconvert.carriers.program.carrier import ProgramCarrier

__all__ = ["ProgramCarrier"]
