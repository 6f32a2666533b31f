"""Conversion of stored tensors a block at a time: memory stays bounded whatever the file and its largest tensor.

`plan` says what goes where, `engine` does it on several threads, `pieces` cuts tensors into blocks, `work` has one
function per kind of task. The arithmetic is in `weightnorm`.
"""
