"""No signal is lost while the library is imported, whatever an import does with exceptions."""

from __future__ import annotations

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from wnconvert import cli
from wnconvert.cli.importing import importing


@contextlib.contextmanager
def handled(number: int, handler: object):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def careless_import(number: int) -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(number)


def test_an_interrupt_comes_after_the_import() -> None:
    # What is started in the background of a script ignores the signal from the start.
    with handled(signal.SIGINT, signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt), importing():
            careless_import(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_is_called_once_and_put_back() -> None:
    calls = []

    def handler(number: int, _: object) -> None:
        calls.append(number)

    with handled(signal.SIGTERM, handler):
        with importing():
            careless_import(signal.SIGTERM)
            assert not calls
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler


def test_what_is_ignored_stays_ignored() -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN), importing():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_other_threads_can_import() -> None:
    def run() -> bool:
        with importing():
            return threading.current_thread() is not threading.main_thread()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()


def test_click_does_not_judge_whether_a_file_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It would be a wrong usage then, with four lines. root can read everything, so that only the question can be faked.
    path = tmp_path / "in.pt"
    torch.save({"fc.weight": torch.rand(3, 4), "fc.bias": torch.rand(3)}, path)
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    assert cli.main(["apply", str(path), "-o", str(tmp_path / "out.pt")]) == 0, capsys.readouterr().err
