"""Runs commands of bash scripts in forks of one process that has imported torch and the package: 0.1 s instead of 3 s.

`CommandServer` puts small programs named `videoadapt`, `python` and `torchrun` into a folder for the PATH. Such a
program sends its words, folder, environment and open files to the server, which forks and calls the same code as the
real program. Quotes, globs, loops, pipes and continued lines stay bash's.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import multiprocessing.process
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType

PROGRAMS = ("videoadapt", "python", "torchrun")
SMALL = "DOCS_SMALL"  # an environment variable: overrides for every command that takes a config, one a line

# Imports only what it needs and sees no site-packages, so that it starts in 20 ms.
_CLIENT = """#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(order).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(order)
answer = server.recv(4)
sys.exit(int.from_bytes(answer, "big") if answer else "the command's process died")
"""


class CommandServer:
    """The server's process, and the folder with the programs that call it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        address = str(folder / "socket")
        for program in PROGRAMS:
            path = self.bin / program
            path.write_text(_CLIENT.format(python=sys.executable, address=address, program=program))
            path.chmod(0o755)
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, __file__, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(address: str) -> None:
    import decord  # noqa: F401
    import einops._torch_specific  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import videoadapt.commands.cli
    import videoadapt.commands.demo  # imports every stage
    import videoadapt.commands.stage
    import videoadapt.commands.tables
    import videoadapt.evaluation.predict  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, the memory of all that was imported
    os.write(1, b"ready\n")
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
        _reap()
    listener.close()
    program, words, folder, environment, files = _receive(connection)
    child = os.fork()
    if child:  # waits, and answers with the exit code
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        connection.sendall((128 - code if code < 0 else code).to_bytes(4, "big"))
        os._exit(0)
    connection.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined] # the folder of new processes
    os.environ.clear()
    os.environ |= environment
    _end(_code_of(program, words))


def _code_of(program: str, words: list[str]) -> int:
    try:
        _call(program, words)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """Ends a fork as the interpreter would, but leaves its memory to the kernel."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reap() -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _receive(connection: socket.socket) -> tuple[str, list[str], str, dict[str, str], list[int]]:
    files = array.array("i")
    head, control, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * files.itemsize))
    for level, kind, data in control:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        files.frombytes(data)
    size = int.from_bytes(head, "big")
    order = b""
    while len(order) < size:
        order += connection.recv(size - len(order))
    program, words, folder, environment = json.loads(order)
    return program, words, folder, environment, list(files)


def _call(program: str, words: list[str]) -> None:
    if program == "torchrun":
        ranks = int(words[0].removeprefix("--nproc-per-node="))
        assert words[1:3] == ["-m", "videoadapt"], words
        _run_ranks(ranks, words[3:])
    elif program == "python" and words[:2] == ["-m", "videoadapt"]:
        _videoadapt(words[2:])
    elif program == "python" and words[0].endswith(".py"):
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        script = ModuleType("__main__")
        script.__file__ = words[0]
        # Not `runpy`: the objects that the script's processes send back belong to the second name.
        sys.modules["__main__"] = sys.modules["__mp_main__"] = script
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(script))  # noqa: S102 - our own script
    elif program == "python":
        os.execv(sys.executable, [sys.executable, *words])
    else:
        _videoadapt(words)


def _videoadapt(words: Sequence[str]) -> None:
    from videoadapt.commands.cli import main

    main([*words, *_small(words)])


def _small(words: Sequence[str]) -> list[str]:
    """The overrides, for a verb with a config: `--check` and `--compare` take the place of one."""
    import typer

    from videoadapt.commands.cli import app

    command: object = typer.main.get_command(app)
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
    names = {parameter.name for parameter in command.params}  # type: ignore[attr-defined]
    given = {word for word in rest if not word.startswith("-")} and not {"--check", "--compare"} & set(rest)
    takes = "config" in names and given
    return os.environ.get(SMALL, "").splitlines() if takes else []


def _run_ranks(ranks: int, words: Sequence[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _end(_code_of("videoadapt", list(words)))
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    _serve(sys.argv[1])
