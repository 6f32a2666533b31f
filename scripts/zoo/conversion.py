"""One network through the whole conversion: apply, run, pickle, copy, fold, train, run, fold, run."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wnconvert
from wnconvert.names import spell
from wnconvert.report.model import Report
from wnconvert.sites import SCHEMES
from zoo import outputs, weights
from zoo.outputs import Inputs
from zoo.trial import LACKS_MEMORY, Answer, Outcome, lacks_memory, one_line

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference between a trained network and its folded form, relative to the largest output."""

AMPLIFIED = 4
"""Networks that amplify rounding may differ by so many times what moving every folded weight by one ulp does to them.
"""

PICKLED_WHOLE = 50_000_000
"""Networks with more parameters are pickled into nowhere instead of into memory."""

COPIED = 3 << 30
"""Networks of more bytes are folded in place, because two of them do not fit in memory."""


class Broken(Exception):
    """The conversion cannot go on; the reason is in the outcome."""


class Conversion:
    """Fills in the outcome of one network."""

    def __init__(self, outcome: Outcome, model: nn.Module, inputs: Inputs) -> None:
        self.outcome, self.model, self.inputs = outcome, model, inputs
        self.plain = weights.digest(model)
        self.report: Report

    def run(self, before: list[Tensor]) -> None:
        """Convert there and back. `before` are the outputs of the plain network."""
        try:
            self._step("apply", self._apply)
            self._read_report()
            after = self._compare_outputs(before)
            self._pickle()
            self._fold_untouched()
            if self.outcome.sites:
                self._train(after)
        except Broken:
            return

    def _step(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever comes up in a converted network is a finding
            if lacks_memory(error):
                self.outcome.built, self.outcome.reason = False, LACKS_MEMORY
            else:
                self.outcome.wrong.append(f"{what}: {one_line(error)}")
            raise Broken from error

    def _apply(self) -> None:
        args, kwargs = self.inputs.fresh()
        self.report = wnconvert.apply(self.model, example_inputs=kwargs or args).report

    def _fold(self, model: nn.Module) -> None:
        """Fold what was split; some libraries normalize weights of their own, which stay as they are."""
        ours = [row.site.name for row in self.report.rows if row.action == "split"]
        theirs = any(row.site.state == "split" for row in self.report.rows)
        if ours:
            wnconvert.fold(model, include=ours if theirs else ())

    def _read_report(self) -> None:
        outcome, rows = self.outcome, self.report.rows
        outcome.walker, outcome.walker_note = self.report.walker, self.report.walker_note
        split = [row for row in rows if row.action == "split"]
        outcome.sites = len(split)
        outcome.kinds = dict(Counter(row.site.kind for row in split))
        skipped = [row for row in rows if row.action == "skipped"]
        outcome.skipped = dict(Counter(f"{row.site.kind}: {row.reason}" for row in skipped))
        outcome.unknown = [row.site.name for row in skipped if row.site.kind == "Unknown"]
        named = {name for row in rows for name in (row.site.name, *row.site.tied)}
        named |= {key for name in list(named) for scheme in SCHEMES for key in spell(name, scheme)}
        matrices = [name for name, value in self.model.named_parameters() if value.dim() >= 2]
        outcome.missed = [name for name in matrices if name not in named]

    def _compare_outputs(self, before: list[Tensor]) -> list[Tensor]:
        after: list[Tensor] = self._step("run after apply", lambda: outputs.run(self.model, self.inputs))
        self.outcome.equal = outputs.same_bits(before, after)
        if not self.outcome.equal:
            self.outcome.wrong.append(f"outputs changed after apply, by {outputs.distance(before, after):.1e}")
        return after

    def _pickle(self) -> None:
        whole = self.outcome.parameters <= PICKLED_WHOLE
        stream = io.BytesIO() if whole else _Nowhere()
        try:
            torch.save(self.model, stream)
        except Exception as error:  # noqa: BLE001 whatever a network holds may refuse
            self.outcome.pickled = self._unless_plain("pickle", error, lambda model: torch.save(model, _Nowhere()))
            return
        self.outcome.pickled = True
        if whole:
            stream.seek(0)
            loaded = self._step("load the pickle", lambda: torch.load(stream, weights_only=False))
            found = weights.differences(weights.digest(self.model), weights.digest(loaded))
            self.outcome.pickled = not found
            self.outcome.wrong += [f"pickle: {line}" for line in found[:3]]

    def _unless_plain(self, what: str, error: Exception, action: Callable[[nn.Module], Any]) -> Answer:
        """Something failed with the split network. If it fails with the plain one too, that is not ours."""
        self._fold(self.model)
        try:
            action(self.model)
        except Exception:  # noqa: BLE001
            return "plain too"
        else:
            self.outcome.wrong.append(f"{what}: {one_line(error)}")
            return False
        finally:
            self._apply()

    def _fold_untouched(self) -> None:
        """Fold a copy, or the network itself where two do not fit in memory."""
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        if size > COPIED:
            self._step("fold", lambda: self._fold(self.model))
            self._compare_plain(self.model)
            self._apply()
            return
        try:
            twin = copy.deepcopy(self.model)
        except Exception as error:  # noqa: BLE001
            self.outcome.copied = self._unless_plain("deep copy", error, copy.deepcopy)
            return
        split = weights.stamp(self.model)
        self._step("fold", lambda: self._fold(twin))
        self._compare_plain(twin)
        self.outcome.copied = weights.stamp(self.model) == split
        if not self.outcome.copied:
            self.outcome.wrong.append("folding a deep copy touched the original")

    def _compare_plain(self, folded: nn.Module) -> None:
        found = weights.differences(self.plain, weights.digest(folded))
        self.outcome.identical = not found
        self.outcome.wrong += [f"apply and fold: {line}" for line in found[:3]]

    def _train(self, after: list[Tensor]) -> None:
        outcome = self.outcome
        trained, folded = self._train_and_fold(self.inputs)
        outcome.moved = not outputs.same_bits(after, trained)
        dtype = next((tensor.dtype for tensor in folded if tensor.is_floating_point()), torch.float32)
        outcome.distance = outputs.distance(trained, folded)
        tolerance = TOLERANCE[dtype]
        if outcome.distance > tolerance:
            inputs, finer = self.inputs, self._measure_in_float64()
            if finer is not None:
                dtype, tolerance, (inputs, folded) = torch.float64, TOLERANCE[torch.float64], finer
            if outcome.distance > tolerance:
                outcome.sensitivity = self._sensitivity(inputs, folded)
                tolerance = max(tolerance, AMPLIFIED * outcome.sensitivity)
        outcome.parity, outcome.parity_dtype = outcome.distance <= tolerance, str(dtype).removeprefix("torch.")
        if not outcome.parity:
            outcome.wrong.append(f"trained and folded differ by {outcome.distance:.1e} ({outcome.parity_dtype})")

    def _sensitivity(self, inputs: Inputs, folded: list[Tensor]) -> float:
        """How far the outputs move when every folded weight moves by one ulp, up or down."""
        names = {row.site.name for row in self.report.rows if row.action == "split"}
        changed = {name: value for name, value in self.model.named_parameters() if name in names}
        before = {name: value.detach().clone() for name, value in changed.items()}
        weights.jitter(changed)
        moved = self._step("run the jittered network", lambda: outputs.run(self.model, inputs))
        for name, value in before.items():
            changed[name].data.copy_(value)
        return outputs.distance(folded, moved)

    def _train_and_fold(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        names = {f"{row.site.name}_{half}" for row in self.report.rows if row.action == "split" for half in "gv"}
        weights.train({name: value for name, value in self.model.named_parameters() if name in names})
        trained = self._step("run the trained network", lambda: outputs.run(self.model, inputs))
        self._step("fold the trained network", lambda: self._fold(self.model))
        return trained, self._step("run the folded network", lambda: outputs.run(self.model, inputs))

    def _measure_in_float64(self) -> tuple[Inputs, list[Tensor]] | None:
        """Networks that choose (experts, codes, boxes) jump on a difference in the last bit: use finer ones.

        Returns:
            The inputs, and the outputs of the folded network. None if it does not run in float64.
        """
        tensors = (*self.model.parameters(), *self.model.buffers())
        dtypes = [tensor.dtype for tensor in tensors]
        double = self.inputs.double()
        try:
            self.model.double()
            outputs.run(self.model, double)
        except Exception:  # noqa: BLE001 many networks cast to float32 on the way
            for tensor, dtype in zip(tensors, dtypes, strict=True):
                tensor.data = tensor.data.to(dtype)
            return None
        self._apply()
        trained, folded = self._train_and_fold(double)
        self.outcome.distance = outputs.distance(trained, folded)
        return double, folded


class _Nowhere(io.RawIOBase):
    """A file that forgets."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes
