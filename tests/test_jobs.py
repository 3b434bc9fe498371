"""The queue: real trainings of a tiny base as processes of their own, seen by whoever looks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from studio import jobs, library
from studio.errors import RequestError
from studio.run import Event, Run
from studio.trace import Trace, trace_of

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 180


@pytest.fixture
def order(tiny_base_folder, pictures, home, monkeypatch):
    """Makes the arguments of a training: (arguments, run folder)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(name, steps=3):
        run = library.runs_dir() / name
        arguments = ["train", "--preset", "subject", "--base", tiny_base_folder, "--data", pictures, "--run", run]
        arguments += ["--steps", steps, "--name", name, "--set", "sample_every=0", "--set", "data.prior.pictures=0"]
        arguments += ["--set", "batch_size=1", "--set", "export=[]", "--set", "checkpoint_every=100000"]
        return [str(a) for a in arguments], run

    yield make
    for job in jobs.jobs():
        if job.process and jobs.is_alive(job.process):
            os.killpg(job.process["pid"], signal.SIGKILL)


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)
    return found


def states():
    return {job.name: job.state() for job in jobs.jobs()}


def test_jobs_run_one_after_the_other_on_a_device_and_in_the_order_asked_for(order):
    for name in ("one", "two", "three"):
        jobs.submit(*order(name))
    jobs.move(jobs.jobs()[2].id, -1)
    jobs.cancel(jobs.jobs()[2].id)
    assert [job.name for job in jobs.jobs()] == ["one", "three", "two"]
    assert [job.name for job in jobs.advance()] == ["one"]
    assert jobs.advance() == []
    assert states() == {"one": "starting", "three": "queued", "two": "cancelled"}
    started = until(jobs.advance, "the first is over")
    assert [job.name for job in started] == ["three"]
    assert (states()["one"], jobs.find(jobs.jobs()[0].id).exit_code) == ("finished", 0)
    assert (library.library_dir() / "one.safetensors").exists()
    with pytest.raises(RequestError, match="not waiting"):
        jobs.move(jobs.jobs()[0].id, 1)


def test_a_job_outlives_the_server_that_began_it_stops_with_a_checkpoint_and_resumes(order):
    arguments, run = order("long", steps=1_000_000)
    jobs.submit(arguments, run)
    server = subprocess.Popen(
        [sys.executable, "-c", "from studio import jobs; import time; jobs.advance(); time.sleep(600)"],
        cwd=ROOT,
    )
    until(lambda: trace_of(run).step > 2, "the training has begun")
    server.kill()
    server.wait()
    seen = trace_of(run).step
    until(lambda: trace_of(run).step > seen, "it goes on without its server")
    assert jobs.advance() == []  # this process knows it as running, though it is no child of its own
    assert states() == {"long": "training"}

    with jobs.paused() as held:
        assert held == ["long"]
        assert states() == {"long": "paused"}
        pid = jobs.jobs()[0].process["pid"]
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it holds still")
    until(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED, "it goes on")

    jobs.cancel(jobs.jobs()[0].id)
    jobs.cancel(jobs.jobs()[0].id)  # impatience does no harm
    until(lambda: states() == {"long": "stopped"}, "it has stopped")
    reached = trace_of(run).step
    assert Run(run).newest_checkpoint().name == f"step-{reached}"
    jobs.advance()
    jobs.resume(run)
    with pytest.raises(RequestError, match="already"):
        jobs.resume(run)
    jobs.advance()
    until(lambda: trace_of(run).step > reached, "it goes on from its checkpoint")
    jobs.stop_run(run)
    until(lambda: jobs.job_of_run(run).state() == "stopped", "it has stopped again")


def test_a_paused_job_wakes_when_its_pauser_was_killed(order):
    jobs.submit(*order("long", steps=1_000_000))
    (job,) = jobs.advance()
    pauser = "from studio import jobs; import time\nwith jobs.paused(): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", pauser], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    jobs.advance()
    assert states() == {"long": "paused"}
    process.kill()
    process.wait()
    jobs.advance()
    assert states() == {"long": "starting"}
    assert psutil.Process(job.process["pid"]).status() != psutil.STATUS_STOPPED


def test_a_job_that_fails_says_why_and_one_that_was_killed_says_that_it_broke_off(order):
    arguments, run = order("wrong")
    jobs.submit([*arguments, "--set", "method.rnak=3"], run)
    jobs.advance()
    until(lambda: jobs.advance() or states()["wrong"] == "failed", "it has failed")
    assert "rnak" in jobs.jobs()[0].fault()
    assert "did you mean 'rank'" in jobs.jobs()[0].fault()
    jobs.submit(*order("killed", steps=1_000_000))
    (job,) = jobs.advance()
    os.killpg(job.process["pid"], signal.SIGKILL)
    until(lambda: jobs.advance() or states()["killed"] == "broken off", "it is known as killed")


def test_a_training_begun_in_a_terminal_is_seen_and_has_the_device(order, tmp_path):
    arguments, _ = order("mine", steps=1_000_000)
    run = tmp_path / "elsewhere"
    arguments[arguments.index("--run") + 1] = str(run)
    terminal = subprocess.Popen([sys.executable, "-m", "studio", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        until(lambda: trace_of(run).step > 1, "the training has begun")
        assert library.run_folders() == [run.resolve()]
        assert trace_of(run).state() == "training"
        jobs.submit(*order("next"))
        assert jobs.advance() == []
        jobs.stop_run(run)
        until(lambda: trace_of(run).state() == "stopped", "it has stopped")
        terminal.wait(60)
        assert [job.name for job in jobs.advance()] == ["next"]
    finally:
        terminal.kill()


def test_a_process_of_the_same_number_that_began_at_another_time_is_another():
    own = jobs.identity()
    assert jobs.is_alive(own)
    assert not jobs.is_alive({**own, "began": own["began"] - 60})
    assert not jobs.is_alive({"pid": own["pid"]})
    assert not jobs.is_alive(None)


def test_a_trace_reads_each_line_once_and_counts_like_history(tmp_path):
    run = Run(tmp_path / "run")
    run.prepare()
    trace = Trace(run.folder)
    run.append(Event("started", 0, {"steps": 6}))
    for step in range(1, 5):
        run.append(Event("step", step, {"loss": 1.0 / step}))
    run.append(Event("validation", 4, {"loss": 0.3}))
    assert (trace.refresh().step, trace.total, trace.state()) == (4, 6, "training")
    with run.events_path.open("a") as file:
        file.write('{"kind": "step", "step": 5')  # torn
    before = trace.version
    assert trace.refresh().version == before
    run.append(Event("resumed", 2, {"from_step": 2}))
    run.append(Event("step", 3, {"loss": 9.0}))
    assert [(e["step"], e["loss"]) for e in trace.refresh().steps] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert trace.validations == []
    assert [e["step"] for e in run.history() if e["kind"] == "step"] == [1, 2, 3]
    run.append(Event("failed", 3, {"error": "no memory"}))
    assert trace.refresh().state() == "failed"
    (run.control / "owner").write_text(json.dumps({"pid": 1, "began": 1.0}))
    run.append(Event("resumed", 2, {"from_step": 2}))
    assert trace.refresh().state() == "broken off"
