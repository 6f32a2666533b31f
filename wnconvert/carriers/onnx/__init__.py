"""ONNX models. Sites are planned on an index of the graphs, and the original ModelProto is patched in place.

Everything outside the sites keeps its bytes: names, order, metadata, typed data fields, sparse tensors, training_info.

- `graphs`: which name means which value, in nested graphs, and who reads it.
- `roots`: from the operand of a layer back to the tensor that holds its weight.
- `uses`: which nodes consume a weight, by the table of kinds.
- `pairs`: the nodes that stand for `g * v / ||v||`: written by `apply`, recognised by `fold`.
- `edit`: puts those nodes into a graph and takes them out.
- `tensors`, `external`: the numbers, in any encoding, inline or in data files.
"""

from wnconvert.carriers.onnx.carrier import OnnxCarrier

__all__ = ["OnnxCarrier"]
