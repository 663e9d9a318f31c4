"""Several ranks train one student: exactly resumable, without a way in from outside."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import generate_farm
import pytest
import torch
from run_state import rows
from safetensors.torch import load_file
from small_jobs import CONFIG, ROOT, SHORT, build_distiller

from dmkd_fast import LabelStream
from dmkd_fast.config.jobs import DistillConfig
from dmkd_fast.config.loading import load_config
from dmkd_fast.jobs import memory, run_dir
from dmkd_fast.jobs.resolve import resolve
from dmkd_fast.runtime import distributed
from dmkd_fast.runtime.errors import UserError

Serve = Callable[..., dict[str, Any]]
Record = Callable[[str, object], None]
POINTS = [1, 10, 17, 26, 33, 39]
# Nothing of this listens outside loopback: docs/guides/several-processes.md.
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-conf=store_type=file",
]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Runs of several ranks; see `rank_server.py`."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "rank_server.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRONMENT) as server:
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def ask(run: Path, **request: Any) -> dict[str, Any]:
            print(json.dumps({"run": str(run), **request}), file=stdin, flush=True)
            answer: dict[str, Any] = json.loads(stdout.readline())
            return answer

        yield ask
        stdin.close()


def whole_run(serve: Serve, folder: Path, **request: Any) -> dict[str, Any]:
    """One that nothing disturbs."""
    done = serve(folder, **request)
    assert done["codes"] == [0, 0], done["outputs"]
    return done


def assert_same_end(done: dict[str, Any], whole: dict[str, Any]) -> None:
    assert done["codes"] == [0, 0], done["outputs"]
    for rank in ("0", "1"):
        mine, expected = done["ends"][rank], whole["ends"][rank]
        parts = [k for k, v in expected["state"].items() if mine["state"].get(k) != v]
        assert parts == [], (rank, parts)
        assert mine["weights"] == expected["weights"] == whole["ends"]["0"]["weights"]
        assert mine["rows"] == expected["rows"]


@pytest.mark.parametrize(
    ("seeds", "points"), [([0], [1, 17]), pytest.param([0, 1, 2], POINTS, marks=pytest.mark.slow)]
)
def test_resumed_ranks_end_bit_equal(
    serve: Serve, tmp_path: Path, seeds: list[int], points: list[int], record_property: Record
) -> None:
    record_property("claim", "two ranks, one stopped at a step: both resume, whole state equal")
    record_property("cases", len(seeds) * len(points))
    for seed in seeds:
        whole = whole_run(serve, tmp_path / f"whole{seed}", seed=seed)
        for point in points:
            run = tmp_path / f"run{seed}-{point}"
            stopped = serve(run, seed=seed, stop_at=[point, point % 2])
            # What one rank was told at a step, all know at the next.
            at = min(point + 1, 40)
            assert stopped["codes"] == [130, 130], stopped["outputs"]
            assert [end["step"] for end in stopped["ends"].values()] == [at, at]
            done = serve(run, seed=seed)
            assert [end["restored"] for end in done["ends"].values()] == [[at, []]] * 2
            assert_same_end(done, whole)


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_ranks_killed_at_random_end_like_undisturbed_ones(
    serve: Serve, tmp_path: Path, count: int, record_property: Record
) -> None:
    record_property("claim", "kill -9 of one of two ranks: all start again and end bit-equal")
    record_property("cases", count)
    chance, hits, number = random.Random(count), 0, 0
    begun = time.monotonic()
    whole = whole_run(serve, tmp_path / "whole", every_s=1e-6)
    length = time.monotonic() - begun
    while hits < count:
        number += 1
        run = tmp_path / f"run{number}"
        kill = [[chance.randrange(2), chance.uniform(0, length)] for _ in range(count - hits)]
        done = serve(run, every_s=1e-6, kill=kill, restarts=count)
        assert done["restarts"] == done["hits"]
        assert_same_end(done, whole)
        hits += done["hits"]


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_sigterm_stops_all_ranks_after_the_same_step(
    serve: Serve, tmp_path: Path, count: int, record_property: Record
) -> None:
    record_property("claim", "SIGTERM to two ranks: exit within 5 s, both saved at one step")
    record_property("cases", count)
    chance, hits = random.Random(count), 0
    while hits < count:
        run = tmp_path / f"run{hits}"
        done = serve(run, every_s=1e-6, term=chance.uniform(0, 0.5))
        if done["codes"] == [0, 0]:  # It had ended.
            shutil.rmtree(run)
            continue
        assert done["codes"] == [130, 130] and done["took"] < 5, done
        steps = {end["step"] for end in done["ends"].values()}
        newest = {max(p.glob("step-*")).name[5:14] for p in checkpoints(run)}
        assert len(steps) == 1 and newest == {f"{steps.pop():09d}"}
        hits += 1


def test_ranks_make_the_images_of_one_process_between_them(serve: Serve, tmp_path: Path) -> None:
    both = whole_run(serve, tmp_path / "both")["ends"]
    alone = serve(tmp_path / "alone", world_size=1)["ends"]["0"]
    first, second = both["0"]["images"], both["1"]["images"]
    assert len(first) == len(second) and not first.keys() & second.keys()
    assert first | second == alone["images"]
    assert sorted(map(int, alone["images"])) == list(range(len(alone["images"])))
    for name in ("generated_images", "views", "reuse"):
        assert both["0"]["totals"][name] == alone["totals"][name]
    # One writer: the rows of one process, and its files once.
    told = [row["views"] for row in both["0"]["rows"]]
    assert told == [row["views"] for row in alone["rows"]]
    assert len(list((tmp_path / "both").glob("events.*"))) == 1


def test_an_evaluation_counts_each_image_once(serve: Serve, tmp_path: Path) -> None:
    ends = whole_run(serve, tmp_path / "run", tests=True)["ends"]
    scored = [row["top1"] for row in ends["0"]["rows"] if "top1" in row]
    assert scored[-1] == ends["0"]["scores"]["top1"] and 0 < scored[-1] < 1
    assert round(101 * scored[-1], 9) == round(101 * scored[-1])


def test_a_checkpoint_damaged_on_one_rank_is_used_by_none(serve: Serve, tmp_path: Path) -> None:
    whole = whole_run(serve, tmp_path / "whole")
    run = tmp_path / "run"
    serve(run, every_s=1e-6, stop_at=[20, 0])
    first, second = (sorted(p.glob("step-*")) for p in checkpoints(run))
    assert [p.name for p in first] == [p.name for p in second] and len(first) == 2
    path = second[-1] / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = serve(run)
    older = int(first[0].name[5:14])
    for rank, words in (("0", "damaged (on rank 1: "), ("1", "damaged (state.safetensors")):
        step, notes = done["ends"][rank]["restored"]
        assert step == older and len(notes) == 1 and words in notes[0], notes
    assert_same_end(done, whole)


def test_a_full_disk_on_one_rank_leaves_a_checkpoint_that_all_have(
    serve: Serve, tmp_path: Path
) -> None:
    whole = whole_run(serve, tmp_path / "whole")
    run = tmp_path / "run"
    assert serve(run, every_s=1e-6, full_disk=1, kill_at=[16, 0])["codes"][0] == -signal.SIGKILL
    newest = max(p.name for p in checkpoints(run)[1].glob("step-*"))
    assert newest <= "step-000000006"
    done = serve(run)
    assert {f"step-{end['restored'][0]:09d}" for end in done["ends"].values()} == {newest}
    assert_same_end(done, whole)


def test_parts_of_a_batch_are_summed_over_ranks_once_a_step(serve: Serve, tmp_path: Path) -> None:
    whole = whole_run(serve, tmp_path / "whole", accumulate=2)
    assert [whole["ends"][rank]["reductions"] for rank in "01"] == [40 + 1] * 2  # the warm-up
    run = tmp_path / "run"
    assert serve(run, accumulate=2, stop_at=[17, 1])["codes"] == [130, 130]
    assert_same_end(serve(run, accumulate=2), whole)


def test_a_generator_that_breaks_on_one_rank_stops_all(serve: Serve, tmp_path: Path) -> None:
    done = serve(tmp_path, broken=1)
    assert done["codes"] == [3, 3], done["outputs"]
    for end in done["ends"].values():
        assert end["error"].startswith("16 of 32 images have values that are not finite")


def test_a_test_image_that_one_rank_cannot_read_stops_all_with_a_checkpoint(
    serve: Serve, tmp_path: Path
) -> None:
    whole = whole_run(serve, tmp_path / "whole", tests=True)
    run = tmp_path / "run"
    done = serve(run, tests=True, unreadable=1)
    assert done["codes"] == [3, 3], done["outputs"]
    for end in done["ends"].values():
        assert end["error"] == "rank 1: a.png: got no image, expected one; replace it"
    done = serve(run, tests=True)
    assert [end["restored"][0] for end in done["ends"].values()] == [5, 5]
    assert_same_end(done, whole)


def test_a_run_of_other_ranks_is_refused(serve: Serve, tmp_path: Path) -> None:
    run = tmp_path / "run"
    serve(run, stop_at=[5, 0])
    with pytest.raises(ValueError, match=r"of 2 ranks, expected 1.*--nproc-per-node 2"):
        build_distiller(run).restore()
    alone = tmp_path / "alone"
    serve(alone, world_size=1, stop_at=[5, 0])
    done = serve(alone)
    assert done["codes"] == [2, 2]
    assert all("of 1 rank, expected 2" in end["error"] for end in done["ends"].values())


def checkpoints(run: Path) -> list[Path]:
    return [run / "checkpoints", run / "checkpoints" / "rank-1"]


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_recovers_and_nothing_listens_outside(
    serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    record_property("claim", "torchrun, kill -9 of one rank: recovers by itself, student bit-equal")
    record_property("cases", 1)
    often = ["train.checkpoint_every_s=0.000001"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["distill", CONFIG, *settings()]
    done = serve(tmp_path / "server", command=[*command, f"run_dir={whole}"])
    assert done["codes"] == [0, 0], done["outputs"]
    parts = [*TORCHRUN, "--max-restarts=2", "-m", "dmkd_fast", *command, *often]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*parts, f"run_dir={cut}"], env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True
    ) as agent:
        try:
            while not all(any(p.glob("step-*[1-9]")) for p in checkpoints(cut)):
                assert agent.poll() is None, agent.communicate()
                time.sleep(0.01)
            workers = children(agent.pid)
            found = [line for pid in (agent.pid, *workers) for line in listeners(pid)]
            os.kill(workers[1], signal.SIGKILL)
            output, errors = agent.communicate(timeout=300)
        finally:
            agent.kill()
    assert agent.returncode == 0 and errors.count("warming up") == 2, errors
    assert found and all(address == "127.0.0.1" for address in found), found
    summary = json.loads(output.splitlines()[-1])
    expected = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    for name in ("top1", "top5", "generated_images", "views"):
        assert summary[name] == expected[name]
    students = [load_file(run / "student" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_resumes(serve: Serve, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["distill", CONFIG, *settings(), "train.num_views=3200"]
    done = serve(tmp_path / "server", command=[*command, f"run_dir={whole}"])
    assert done["codes"] == [0, 0], done["outputs"]
    # As most people call it; this one listens outside, and the ranks use its store.
    parts = [*TORCHRUN[:4], "--standalone", "-m", "dmkd_fast"]
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("TORCH_")}
    with subprocess.Popen([*parts, *command, f"run_dir={cut}"], env=environment) as agent:
        while not (cut / "stats.jsonl").exists() or len(rows(cut)) < 2:
            assert agent.poll() is None
            time.sleep(0.01)
        asked = time.monotonic()
        agent.terminate()
        agent.wait(timeout=60)
    assert time.monotonic() - asked < 8  # The agent takes its time, too.
    newest = {max(p.glob("step-*")).name for p in checkpoints(cut)}
    assert len(newest) == 1 and newest < {f"step-{step:09d}" for step in range(1, 100)}
    resume = [*parts, "distill", str(cut / "config.yaml"), "--resume"]
    assert subprocess.run(resume, env=environment, check=False).returncode == 0
    students = [load_file(run / "student" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert rows(whole) == rows(cut)


@pytest.mark.slow
def test_two_ranks_reach_the_accuracy_of_one(tmp_path: Path) -> None:
    scores, config = [], str(ROOT / "configs" / "fashion_mnist.yaml")
    for parts in ([sys.executable], TORCHRUN):
        run = tmp_path / str(len(scores))
        command = [*parts, "-m", "dmkd_fast", "distill", config, f"run_dir={run}"]
        subprocess.run(command, env=ENVIRONMENT, check=True)
        scores.append(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    for name in ("generated_images", "views"):
        assert scores[0][name] == scores[1][name]
    # Three seeds of one process spread over 0.005.
    assert abs(scores[0]["top1"] - scores[1]["top1"]) < 0.01


@pytest.mark.slow
def test_generate_shares_out_the_shards(serve: Serve, tmp_path: Path) -> None:
    def make(out: Path, world_size: int) -> list[dict[str, Any]]:
        command = [
            "generate",
            CONFIG,
            *generate_farm.SETTINGS,
            "--out",
            str(out),
            "--num-images",
            "160",
            "--images-per-shard",
            "32",
        ]
        done = serve(tmp_path / f"server{world_size}", command=command, world_size=world_size)
        assert done["codes"] == [0] * world_size, done["outputs"]
        return [json.loads(output.splitlines()[-1]) for output in done["outputs"]]

    told = make(tmp_path / "both", 2)
    assert [(part["job_slice"], part["made_images"]) for part in told] == [("0/2", 96), ("1/2", 64)]
    assert any(part["is_complete"] for part in told)
    make(tmp_path / "alone", 1)
    names = [f"shard-{number:06d}.tar" for number in range(5)]
    for name in names:
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def settings() -> list[str]:
    """SHORT, with a ring that two ranks can share."""
    return [*SHORT, "ring.capacity_images=256", "ring.min_fill_images=128"]


def children(pid: int) -> list[int]:
    """Processes that a process has started, oldest first."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return sorted(map(int, text.split()))


def listeners(pid: int) -> list[str]:
    """Addresses on which a process listens for TCP."""
    sockets = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(handle))
        except OSError:  # It was closed meanwhile.
            continue
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                digits = local.split(":")[0]
                parts = [str(b) for b in reversed(bytes.fromhex(digits))]
                found.append(".".join(parts) if len(parts) == 4 else digits)
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.batch_size=33"],
            r"train.batch_size: got 33 with 2 ranks, expected a multiple of 2",
        ),
        (["ring.capacity_images=320"], r"ring.capacity_images: got 320 .*blocks of 64"),
        (["train.accumulate=32"], r"train.accumulate: got 32, .*=16.*of each of 2 ranks"),
        (["ring.error_buffer=200"], r"ring.error_buffer: got 100, .*of each of 2 ranks"),
    ],
)
def test_settings_that_do_not_divide_are_refused(changes: list[str], message: str) -> None:
    config = load_config(DistillConfig, CONFIG, [*settings(), *changes])
    with pytest.raises(UserError, match=message) as problem:
        memory.ring_plan(config, ranks=distributed.Ranks(rank=0, world_size=2))
    assert "\n" not in str(problem.value)


def test_several_ranks_do_not_follow_a_directory_that_grows() -> None:
    rest = [setting for setting in settings() if not setting.startswith("sampler")]
    source = "source={path: x, kind: shards, follow: true, block_images: 64}"
    config = load_config(DistillConfig, CONFIG, [*rest, "denoiser=null", "sampler=null", source])
    with pytest.raises(UserError, match=r"source.follow: got true with 2 ranks, expected false"):
        resolve(config, distributed.Ranks(world_size=2, local_world_size=2))


def test_a_restarted_job_finds_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(DistillConfig, CONFIG, SHORT)
    first, second, third = (f"runs/{config.name}-20260101-00000{number}" for number in range(3))
    other = f"runs/{config.name}-2-20260101-000000-000000"  # of a job with a longer name
    places = {first: "mine", second: "another", third: "", other: "a third"}
    for place, launch in places.items():
        run_dir.claim(config.model_copy(update={"run_dir": place}), launch=launch)
    found = run_dir.find_launched(config, "mine")
    assert found is not None and found.run_dir == first
    assert run_dir.find_launched(config, "a third") is None
    # What was refused at first is not resumed later.
    taken = config.model_copy(update={"run_dir": second})
    assert run_dir.find_launched(taken, "mine") is None
    assert run_dir.find_launched(taken, "another") is not None


def test_ranks_share_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(DistillConfig, CONFIG, [*settings(), "ring.error_buffer=600"])
    ring = memory.ring_plan(config, ranks=distributed.Ranks(rank=1, world_size=2))
    assert (ring.capacity_images, ring.min_fill_images, ring.error_buffer) == (128, 64, 300)
    # The embedded job's 19 blocks: 9 for each of two.
    odd = load_config(DistillConfig, ROOT / "configs" / "fashion_mnist.yaml", [])
    ring = memory.ring_plan(odd, ranks=distributed.Ranks(rank=0, world_size=2))
    assert (ring.capacity_images, ring.min_fill_images) == (5120, 4608)
    streams = [LabelStream(10, rank=rank, world_size=3) for rank in range(3)]
    drawn = []
    for _ in range(4):
        for stream in streams:
            drawn.append(stream.peek(5)[0])
            stream.advance(5)
    assert torch.cat(drawn).tolist() == list(range(60))
    assert distributed.read() == distributed.ALONE
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.read().rank == 1 and not distributed.read().is_first
