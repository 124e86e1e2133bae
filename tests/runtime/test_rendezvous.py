"""The rendezvous: one small file, missing ranks by number, and no mix-up with a killed start of the same name."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rank_jobs import Ranks
from videoadapt.runtime.rendezvous import gpu_conflict, interface_to, local_address_to, own_addresses

pytestmark = pytest.mark.usefixtures("rank_server")

JOINED = """
with ranks(config):
    assert all_gather(rank()) == list(range(world_size()))
    (folder / f"joined{rank()}").write_text(os.environ["GLOO_SOCKET_IFNAME"])
"""


@pytest.mark.parametrize(
    ("started", "message"),
    [
        ([0, 2], "2 of 3 ranks joined within 10 s (parallel.join_s); missing: rank 1. Check"),
        ([1], "rank 1 of 3 did not find rank 0 within 10 s (parallel.join_s): rank 0 has not written "),
    ],
)
def test_a_missing_rank_is_an_error_after_join_s(tmp_path: Path, started: list[int], message: str) -> None:
    ended = Ranks("with ranks(config): pass", tmp_path, 3, started=started, join_s=10.0).ended(timeout_s=60)
    assert all(code != 0 and message in errors for code, errors in ended.values()), ended


def test_nothing_stays_in_the_folder(tmp_path: Path) -> None:
    ended = Ranks(JOINED, tmp_path, 3).ended()
    assert [code for code, _ in ended.values()] == [0, 0, 0], ended
    assert not list((tmp_path / "ranks").iterdir())


@pytest.mark.parametrize("store_lives", [False, True])
def test_ranks_pass_over_the_address_of_a_dead_start(tmp_path: Path, store_lives: bool) -> None:
    """Ids of jobs are used again: by a new cluster, and by processes of one machine."""
    port = 1  # nothing listens there
    program = (
        "import time, torch.distributed as dist\n"
        "store = dist.TCPStore('localhost', 0, None, True, wait_for_workers=False)\n"
        "store.set('id', 'old'); store.add('joined/1', 1); print(store.port, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as old:
        try:
            if store_lives:
                assert old.stdout is not None
                port = int(old.stdout.readline())
            file = tmp_path / "ranks" / "slurm-7-0-0-0.json"
            file.parent.mkdir()
            file.write_text(json.dumps({"id": "old", "host": "gone", "addresses": ["127.0.0.1"], "port": port}))
            late = JOINED.replace(
                "with ranks", "time.sleep(3 * (sys.argv and rank_env(os.environ).rank == 0))\nwith ranks"
            )
            program = "from videoadapt.runtime.slurm import rank_env\n" + late
            ended = Ranks(program, tmp_path, 2).ended()
        finally:
            old.kill()
    assert [code for code, _ in ended.values()] == [0, 0], ended


def test_gloo_uses_the_interface_to_rank_0_unless_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    ended = Ranks(JOINED, tmp_path, 2).ended()
    assert [code for code, _ in ended.values()] == [0, 0], ended
    chosen = (tmp_path / "joined1").read_text()
    assert own_addresses()[0] in {each.address for each in psutil.net_if_addrs()[chosen]}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    ended = Ranks(JOINED, tmp_path, 2).ended()
    assert [code for code, _ in ended.values()] == [0, 0], ended
    assert (tmp_path / "joined1").read_text() == "lo"


def test_addresses_of_this_machine_alone_come_last() -> None:
    addresses = own_addresses()
    local = [each.startswith("127.") or each == "::1" for each in addresses]
    assert local == sorted(local)
    for address in addresses:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
            server.bind((address, 0))


def test_the_name_of_rank_0_may_stand_for_its_own_machine() -> None:
    """Where the host name is 127.0.1.1, rank 0 must not listen on the loopback while the others come by network."""
    assert local_address_to("127.0.1.1") == "127.0.0.1"
    loopback = interface_to("127.0.1.1", several_hosts=False)
    assert "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[loopback or ""]}
    outside = interface_to("127.0.1.1", several_hosts=True)
    assert own_addresses()[0] in {each.address for each in psutil.net_if_addrs()[outside or ""]}


@pytest.mark.parametrize(
    ("gpus", "fault"),
    [
        ([("a", "x"), ("a", "y"), ("b", "x")], ""),
        ([("a", None), ("b", None)], ""),
        ([("a", "x"), ("b", None)], "rank 1 found no GPU on b, but other ranks found one"),
        ([("a", "x"), ("b", "x"), ("a", "x")], "ranks 0 and 2 would share one GPU of a"),
    ],
)
def test_a_missing_or_shared_gpu_is_a_conflict(gpus: list[tuple[str, str | None]], fault: str) -> None:
    assert gpu_conflict(gpus).startswith(fault)
    assert bool(gpu_conflict(gpus)) == bool(fault)
