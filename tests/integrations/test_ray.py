"""`examples/ray_generate.py`: workers die, and the files are those of a single job."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generate_farm import SETTINGS, make_set
from small_jobs import CONFIG, ROOT, SHORT

NUM_IMAGES, KILLS = 4096, 3
# A network with loopback alone, as Ray listens on all interfaces.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tasks() -> list[int]:
    """Processes in which a task of Ray runs now."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            command = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::make_slice"):
            found.append(int(place.name))
    return found


@pytest.mark.slow
def test_killed_workers_change_no_file_and_a_trainer_follows(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to make a network namespace")
    make_set(tmp_path / "single", num_images=NUM_IMAGES, images_per_shard=None)
    out, run = tmp_path / "farm", tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    size = [f"--num-images={NUM_IMAGES}", "--slices=4", f"--out={out}"]
    script = [sys.executable, str(ROOT / "examples" / "ray_generate.py"), CONFIG, *SETTINGS]
    train = [sys.executable, "-m", "dmkd_fast", "distill", CONFIG, *SHORT]
    source = [
        "denoiser=null",
        "sampler=null",
        f"source.path={out}",
        "source.follow=true",
        "source.block_images=64",
    ]
    with subprocess.Popen([*ALONE, *script, *size], env=environment) as farm:
        killed: set[int] = set()
        while len(killed) < KILLS:
            assert farm.poll() is None, "all slices were made before the last kill"
            if (fresh := set(tasks()) - killed) and any(out.glob("*.tar")):
                os.kill(victim := fresh.pop(), signal.SIGKILL)
                killed.add(victim)
            time.sleep(0.2)
        follower = subprocess.run([*train, *source, f"run_dir={run}"], env=environment, check=False)
        assert farm.wait() == 0
    assert follower.returncode == 0
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["views"] == 640
    assert digests(out) == digests(tmp_path / "single")
