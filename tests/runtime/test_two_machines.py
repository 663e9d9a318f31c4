"""Two "machines" (network namespaces) train one student; one of them dies and is replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from run_state import rows
from safetensors.torch import load_file
from small_jobs import CONFIG, ROOT, SHORT

NAMES, ADDRESSES = ("dmkd-a", "dmkd-b"), ("10.213.77.1", "10.213.77.2")
# torchrun would share its store between rounds, and not give its address to a new machine.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def ip(*parts: str) -> str:
    return subprocess.run(["ip", *parts], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines() -> Iterator[None]:
    """Two namespaces that see each other and nothing else; skipped where not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    with contextlib.ExitStack() as undo:
        try:
            for name in NAMES:
                ip("netns", "add", name)
                undo.callback(ip, "netns", "del", name)
            ip(
                "link",
                "add",
                "veth-a",
                "netns",
                NAMES[0],
                "type",
                "veth",
                "peer",
                "name",
                "veth-b",
                "netns",
                NAMES[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces: {error.stderr}")
        for name, device, address in zip(NAMES, ("veth-a", "veth-b"), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for each in (device, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield


def torchrun(machine: int, run: Path) -> subprocess.Popen[str]:
    """Start one process of the job on a machine, as docs/guides/cluster.md says."""
    command = [
        *("ip", "netns", "exec", NAMES[machine], sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=job"),
        # Both have the host name of this machine, which torchrun would compare.
        f"--rdzv-conf=is_host={machine == 0}",
        *(f"--local-addr={ADDRESSES[machine]}", "-m", "dmkd_fast", "distill", CONFIG, *SHORT),
        *("ring.capacity_images=256", "ring.min_fill_images=128", "train.num_views=3200"),
        *("train.checkpoint_every_s=0.000001", f"run_dir={run}"),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=ENVIRONMENT, stderr=pipe, text=True, start_new_session=True
    )


def has_checkpoints(run: Path) -> bool:
    places = [run / "checkpoints", run / "checkpoints" / "rank-1"]
    return all(any(place.glob("step-*[1-9]")) for place in places)


def listeners() -> set[str]:
    """Sockets that listen in the network of this test, outside the namespaces."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return {line.split()[1] for line in lines if line.split()[3] == "0A"}


@pytest.mark.slow
@pytest.mark.usefixtures("machines")
def test_a_lost_machine_is_replaced_and_the_student_has_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    before = listeners()
    agents = [torchrun(machine, whole) for machine in (0, 1)]
    ends = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends

    agents = [torchrun(machine, cut) for machine in (0, 1)]
    try:
        while not has_checkpoints(cut):
            assert all(agent.poll() is None for agent in agents)
            time.sleep(0.01)
        assert listeners() <= before
        for pid in ip("netns", "pids", NAMES[1]).split():
            os.kill(int(pid), signal.SIGKILL)
        agents[1].communicate()
        agents[1] = torchrun(1, cut)
        ends = [agent.communicate(timeout=240)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert any("going on at step" in text for text in ends), ends
    students = [load_file(run / "student" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())
    assert rows(whole) == rows(cut)
