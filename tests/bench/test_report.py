# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark prints, and how it times."""

import io
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bench import clock, report


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_table_aligns_numbers_right_and_words_left():
    rows = [
        {"op": "page_write", "us": "3.25", "x": "1.0x", "bound": "issue"},
        {"op": "copy", "us": 12.5, "x": "-", "bound": "bandwidth"},
    ]
    assert report.table(rows, indent=1) == (
        " op            us     x  bound\n"
        " ----------  ----  ----  ---------\n"
        " page_write  3.25  1.0x  issue\n"
        " copy        12.5     -  bandwidth"
    )
    assert report.table([]) == ""


def test_table_refuses_rows_that_differ():
    with pytest.raises(ValueError, match=r"row 1 has columns \['b'\]; row 0 has \['a'\]"):
        report.table([{"a": 1}, {"b": 1}])


def test_json_is_alone_on_stdout(capsys):
    report.write_json({"us": 1.5, "bound": None})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"us": 1.5, "bound": None} and err == ""
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json({"us": float("nan")})


def test_environment_can_be_written_as_json():
    facts = report.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["jax"] == jax.__version__
    assert facts["platform"] == jax.devices()[0].platform
    assert facts["libtpu"] and facts["date"].endswith("+00:00")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_says_dirty(tmp_path):
    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path), *args],
            check=True,
            capture_output=True,
        )

    root = tmp_path.resolve()
    assert report._commit(root) is None
    git("init", "-q")
    assert report._commit(root) is None  # no commit yet
    (root / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    clean = report._commit(root)
    assert clean is not None and len(clean) == 12
    (root / "untracked").write_text("x")
    assert report._commit(root) == clean
    (root / "file").write_text("two")
    assert report._commit(root) == clean + "-dirty"
    (root / "inside").mkdir()
    assert report._commit(root / "inside") is None


def test_progress_is_for_terminals_only():
    file = io.StringIO()
    with report.Progress(2, "compiling", file) as progress:
        progress.step("a")
    assert file.getvalue() == ""
    terminal = _Terminal()
    with report.Progress(2, "compiling", terminal) as progress:
        progress.step("page_write v5e")
    lines = terminal.getvalue().split("\r\x1b[K")
    assert lines == ["", "compiling 0/2 ", "compiling 1/2 page_write v5e", ""]


def test_progress_is_cleared_when_the_work_fails():
    terminal = _Terminal()
    with pytest.raises(OSError), report.Progress(2, "compiling", terminal):
        raise OSError
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_plot_writes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    lines = {"page": [(16, 1.0), (32, 2.0)], "token": [(16, 8.0), (32, 16.0)]}
    report.save_plot(
        path, {"v5e": lines, "v6e": lines}, xlabel="page size", ylabel="us", title="predicted"
    )
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'pallas-paged\[plot\]'"):
        report.save_plot(tmp_path / "p.png", {"a": {}}, xlabel="x", ylabel="y")
    assert not pathlib.Path(tmp_path / "p.png").exists()


# --- the clock --------------------------------------------------------------------------------


class _Clock:
    """A clock that goes on by the next of `seconds` between its first and second reading."""

    def __init__(self, seconds):
        self._seconds, self._now, self._running = iter(seconds), 0.0, False

    def perf_counter(self):
        if self._running:
            self._now += next(self._seconds)
        self._running = not self._running
        return self._now


def test_percentiles():
    timing = clock.summarise([float(x) for x in range(1, 12)], "wall clock")
    assert (timing.p20_us, timing.median_us, timing.p80_us, timing.repeats) == (3, 6, 9, 11)
    one = clock.summarise([2.0], "wall clock")
    assert (one.p20_us, one.median_us, one.p80_us) == (2, 2, 2)
    assert one.gb_per_s(4000) == 2.0
    with pytest.raises(ValueError, match="empty"):
        clock.summarise([], "wall clock")


def test_calls_are_timed_after_the_warmup(monkeypatch):
    # 3 warm-up calls, then 1, 2, 3 milliseconds.
    monkeypatch.setattr(clock, "time", _Clock([9, 9, 9, 1e-3, 2e-3, 3e-3]))
    timing = clock.time_calls(lambda s, x: s + x, [jnp.zeros(4)], [jnp.ones(4)], repeats=3)
    assert timing.median_us == pytest.approx(2000) and timing.method == "wall clock"


def test_states_are_donated_and_take_turns():
    states = [jnp.full((256,), float(i)) for i in range(2)]
    seen = []

    def step(state, delta):
        jax.debug.callback(lambda value: seen.append(float(value)), state[0])
        return state + delta

    clock.time_calls(step, states, [jnp.full((256,), 10.0)], repeats=4, warmup=2)
    jax.effects_barrier()
    assert seen == [0, 1, 10, 11, 20, 21]
    assert all(state.is_deleted() for state in states)


def test_steps_take_turns(monkeypatch):
    # A warm-up call of each step, then 1 and 10, 2 and 20, 3 and 30 milliseconds.
    monkeypatch.setattr(clock, "time", _Clock([9, 9, 1e-3, 1e-2, 2e-3, 2e-2, 3e-3, 3e-2]))
    seen = []

    def double(state, delta):
        jax.debug.callback(lambda value: seen.append(float(value)), state)
        return state * 2

    timings = clock.time_calls_in_turn(
        [lambda s, x: s + x, double], [jnp.float32(1)], [jnp.float32(1)], repeats=3, warmup=1
    )
    jax.effects_barrier()
    assert [t.median_us for t in timings] == pytest.approx([2000, 20000])
    assert seen == [2, 5, 11, 23]  # 1 + 1, doubled + 1, ...


def test_the_loop_divides_the_difference(monkeypatch):
    # Two compiling runs, then n and 2n rounds: 5 ms of dispatch and 8 rounds x 2 states x 100 us.
    short, long = 5e-3 + 1.6e-3, 5e-3 + 3.2e-3
    monkeypatch.setattr(clock, "time", _Clock([9, 9, *[short, long] * 3]))
    states = [jnp.zeros(4), jnp.ones(4)]
    timing = clock.time_loop(lambda s, x: s + x, states, [jnp.ones(4)], repeats=3, iterations=8)
    assert timing.median_us == pytest.approx(100) and timing.method == "in-jit loop"


def test_the_loop_runs_every_round_on_every_state():
    calls = []

    def step(state):
        jax.debug.callback(lambda value: calls.append(int(value)), state)
        return state + 1

    # The count of rounds is what is asked; whether noise hides the difference is not.
    try:
        clock.time_loop(step, [jnp.int32(0), jnp.int32(1000)], repeats=1, iterations=3)
    except ValueError as e:
        assert "raise iterations" in str(e)
    jax.effects_barrier()
    rounds = 2 * (3 + 6)
    assert sorted(calls) == [*range(rounds), *range(1000, 1000 + rounds)]


def test_a_loop_without_a_difference_is_refused(monkeypatch):
    monkeypatch.setattr(clock, "time", _Clock([1.0] * 8))
    with pytest.raises(ValueError, match="8 rounds took no longer than 4; raise iterations"):
        clock.time_loop(lambda s: s, [jnp.zeros(4)], repeats=3, iterations=4)


def test_a_cpu_is_timed_by_the_wall_clock():
    timing = clock.time_step(lambda s: s + 1, [jnp.zeros(4)], repeats=2)
    assert timing.method == "wall clock" and timing.median_us > 0


@pytest.mark.parametrize("name", ["repeats", "iterations", "states"])
def test_counts_are_checked(name):
    values = {"repeats": 1, "iterations": 1, "states": [jnp.zeros(4)]}
    values |= {name: [] if name == "states" else 0}
    states = values.pop("states")
    with pytest.raises(ValueError, match=f"{name} is 0; want 1 or more"):
        clock.time_loop(lambda s: s, states, **values)


def _events(*names_and_times):
    return [clock.Event(name, time) for name, time in names_and_times]


def _is_a_or_b(event):
    return event.name in "ab"


def test_kernels_are_added_up_by_step():
    """Each eviction, of one kernel or more, opens a step; what ran before the first is dropped."""
    events = _events(("warm", 9.0), ("a", 50.0), ("b", 1.0), ("write", 2.0), ("copy", 1.0))
    events += _events(("a", 50.0), ("b", 1.0), ("write", 5.0), ("a", 50.0), ("write", 4.0))
    timing = clock.summarise_kernels(events, _is_a_or_b, 3)
    assert (timing.median_us, timing.repeats) == (4.0, 3)
    assert timing.method == "kernel time, cold L2"


@pytest.mark.parametrize(
    ("events", "repeats"),
    [([("a", 50.0), ("write", 2.0)], 2), ([("a", 50.0), ("write", 2.0), ("a", 50.0)], 2), ([], 1)],
    ids=["a_step_too_few", "a_step_without_kernels", "nothing"],
)
def test_steps_that_were_not_recorded_are_an_error(events, repeats):
    with pytest.raises(RuntimeError, match=f"steps of {repeats}"):
        clock.summarise_kernels(_events(*events), _is_a_or_b, repeats)


# As a GPU's profile is: two kernels of one name, of two programs, out of order and 2 us apart.
_PROFILE = """
planes { name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "wrapped_reduce" } }
  event_metadata { key: 2 value { id: 2 name: "decode_64_3_0" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
  stat_metadata { key: 2 value { id: 2 name: "jit__evict_l2" } }
  stat_metadata { key: 3 value { id: 3 name: "jit_step" } }
  stat_metadata { key: 4 value { id: 4 name: "correlation_id" } }
  lines { id: 13 name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 95000000 duration_ps: 2500000
      stats { metadata_id: 4 uint64_value: 7 } stats { metadata_id: 1 ref_value: 3 } }
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 80000000
      stats { metadata_id: 4 uint64_value: 5 } stats { metadata_id: 1 ref_value: 2 } }
    events { metadata_id: 1 offset_ps: 93000000 duration_ps: 1500000
      stats { metadata_id: 1 ref_value: 3 } } }
  lines { id: 14 name: "Stream #14(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 99000000 duration_ps: 1000000 } }
  lines { id: 1 name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 1 duration_ps: 9000000 } } }
planes { name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "Stream" } }
  lines { name: "Stream #1" events { metadata_id: 1 duration_ps: 1000000 } } }
"""


def _profile_events():
    return clock.gpu_events(jax.profiler.ProfileData.from_text_proto(_PROFILE))


# jaxlib's own: its iterators have no __module__.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_profile_is_read_in_order_with_its_programs():
    assert _profile_events() == [
        clock.Event("wrapped_reduce", 80.0, "jit__evict_l2"),
        clock.Event("wrapped_reduce", 1.5, "jit_step", start_us=92.0),
        clock.Event("decode_64_3_0", 2.5, "jit_step", start_us=94.0),
        clock.Event("decode_64_3_0", 1.0, None, start_us=98.0),
    ]


@pytest.mark.parametrize("module", ["jit__evict_l2", None], ids=["told", "not_told"])
def test_steps_are_told_from_evictions(monkeypatch, module):
    """By the program where that is recorded, else by a recording a step; names are the same."""
    evictions, recordings = [], []

    def record_kernels(call):
        before = len(evictions)
        call()
        recordings.append(len(evictions) - before)
        step = clock.Event("reduce", 3.0, module and "jit_step")
        return [clock.Event("reduce", 80.0, module), step] * recordings[-1] or [step]

    monkeypatch.setattr(clock, "_eviction", lambda: lambda: evictions.append(1))
    monkeypatch.setattr(clock, "record_kernels", record_kernels)
    timing = clock.time_kernels(lambda s: s + 1, [jnp.zeros(4), jnp.ones(4)], repeats=5)
    assert timing == clock.Timing(3.0, 3.0, 3.0, 5, "kernel time, cold L2")
    assert recordings == ([5] if module else [5, *[0] * 5])
    assert len(evictions) == (5 if module else 10)


def test_without_a_gpu_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(RuntimeError, match="default device is a cpu; want a GPU"):
        clock.record_kernels(lambda: jax.block_until_ready(jnp.ones(8) + 1))
