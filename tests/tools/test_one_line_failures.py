"""The tools end as `videoadapt` does after an error."""

from __future__ import annotations

import signal

import pytest

from one_line_failures import one_line_failures
from videoadapt.errors import RunError, UserError
from videoadapt.runtime.signals import Stopped


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a: no such run"), 2, "error: a: no such run\n"),
        (RunError("lost"), 1, "error: lost\n"),
        (OSError("disk full"), 1, "error: disk full\n"),
        (Stopped(signal.SIGTERM), 143, ""),
    ],
)
def test_an_error_is_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_failures():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == line


def test_a_programming_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes"), one_line_failures():
        raise RuntimeError("shapes differ")
