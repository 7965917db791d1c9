"""The examples, run as a user runs them: each does what it says, and says so."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed_metrics.writers import MemoryWriter

ROOT = Path(__file__).parents[1]


def run_script(name, *options):
    """The finished process of an example, on a CPU, without a terminal, any warning an error."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    plain = {"COLUMNS": "100", "FORCE_COLOR": "", "TTY_COMPATIBLE": "0"}
    environment = {**os.environ, **plain, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def run_example(output, *options):
    """The finished process of ``examples/train_digits.py``."""
    return run_script("train_digits.py", "--output", str(output), *options)


def table_row(text, name):
    """The cells of one row of the table at the end."""
    [row] = [line for line in text.splitlines() if name in line]
    return [cell.strip() for cell in row.strip("│").split("│")][1:]


def test_the_digits_are_learnt_and_the_metrics_send_nothing(tmp_path):
    done = run_example(tmp_path, "--epochs", "12")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""

    accuracy = float(table_row(done.stdout, "held-out accuracy")[1].rstrip("%"))
    assert 95 < accuracy <= 100
    without, with_metrics = table_row(done.stdout, "collectives in the training step")
    assert without == with_metrics
    assert re.fullmatch(r"\d+ all-reduce", without), "eight devices that train together must talk"
    times = [float(time.removesuffix(" ms")) for time in table_row(done.stdout, "time per training step")]
    assert min(times) > 0

    epochs = re.findall(r"^epoch +(\d+): .*held out: loss [\d.]+, accuracy +([\d.]+)%$", done.stdout, re.MULTILINE)
    assert [int(number) for number, _ in epochs] == list(range(1, 13))
    assert float(epochs[-1][1]) == accuracy
    windows = [int(step) for step in re.findall(r"^step (\d+): loss [\d.]+, .*", done.stdout, re.MULTILINE)]
    assert windows == [*range(10, 12 * 23 + 1, 10), 12 * 23]
    assert len(re.findall(r" samples/s$", done.stdout, re.MULTILINE)) == len(windows) - 1, "the first one compiles"

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == [step - 1 for step in windows]
    assert [line["epoch/samples"] for line in lines if "epoch/samples" in line] == [1437.0] * 12
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(losses)
    assert events.Scalars("heldout/accuracy")[-1].value == pytest.approx(accuracy / 100, abs=1e-3)

    image = imread(tmp_path / "curves.png")
    assert f"curves: {tmp_path / 'curves.png'}\n" in done.stdout
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.05, "the plot is blank"


@pytest.fixture
def demo(monkeypatch):
    """``examples/train_digits.py``, imported: what it says of options and of results is said without training."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # which it changes
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_model_that_did_not_learn_fails(demo, tmp_path, monkeypatch):
    def train(options, mesh, progress):
        memory = MemoryWriter()
        memory.write_scalars(1, {"train/loss": 0.3, "heldout/accuracy": 0.95})
        return memory

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"The held-out accuracy is 95.0%, and should be above 95%\.$"):
        demo.main()


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided_is_refused(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--batch-size", "60"])
    with pytest.raises(SystemExit) as error:
        demo.main()
    assert error.value.code == 2
    assert "--batch-size 60 cannot be divided among 8 devices" in capsys.readouterr().err


WINDOWS = r"(  step +\d+: loss [\d.]+, accuracy +[\d.]+%\n){4}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("eval_masked.py", ["397 digits in 7 batches of 64 on 8 devices", "examples: 397 here, 397 by NumPy"]),
        ("scan_loop.py", [rf"as an output, at the end:\n{WINDOWS}by a callback, while it runs:\n{WINDOWS}Both give"]),
        ("gradient_norms.py", ["12 parameters, 25 metrics, 2 Variables", r"grad_norm/layers/5/kernel +[\d.]+ +[\d.]+"]),
        ("custom_accumulator.py", [r"PowerMean\(power=-1.0\) keeps the laws", r"speed/harmonic( +\d\.\d+){3}"]),
    ],
)
def test_an_example_does_what_it_says(name, lines):
    done = run_script(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for line in lines:
        assert re.search(f"^{line}", done.stdout, re.MULTILINE), done.stdout


PORTS = sorted(path.stem for path in (ROOT / "examples" / "ports").glob("*.py") if path.stem != "comparison")


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTS)
def test_a_port_gives_the_numbers_of_numpy_and_what_it_replaces_does_not(name):
    """That ours are those of NumPy, and send nothing more, the port checks itself."""
    done = run_script(f"ports/{name}.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    without, with_metrics = re.findall(r"^a step sends with\w* metrics: +(.*)$", done.stdout, re.MULTILINE)
    assert without == with_metrics
    rows = re.findall(r"^.{32} *(\S+) +(\S+) +(\S+)$", done.stdout.split("NumPy\n")[1], re.MULTILINE)
    assert len(rows) >= 4
    wrong = [by_hand for by_hand, ours, _ in rows if float(by_hand) != pytest.approx(float(ours), rel=1e-3)]
    assert len(wrong) >= len(rows) / 2, "what is by hand should be seen to be wrong"


@pytest.mark.parametrize("name", PORTS)
def test_the_diff_that_is_shown_of_a_port_is_that_of_its_code_and_gets_shorter(name):
    page, code = (ROOT / "docs" / "migrating.md").read_text(), (ROOT / "examples" / "ports" / f"{name}.py").read_text()
    lines = {line.strip() for line in code.splitlines()}
    assert 60 <= len(code.splitlines()) <= 120
    section = page.split(f"[{name}.py]")[1].split("\n### ")[0]
    [diff] = re.findall(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    removed, added = ([line[1:].strip() for line in diff.splitlines() if line[0] == sign] for sign in "-+")
    assert len(added) < len(removed)
    assert [line for line in removed + added if line not in lines] == []


def test_several_processes_are_started_by_one_command_and_agree():
    done = run_script("multi_process.py", "--processes", "2", "--devices", "2", "--steps", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    results = re.findall(r"^  accuracy 0\.\d+ of 640 examples, largest loss [\d.]+$", done.stdout, re.MULTILINE)
    assert len(results) == 2
    assert results[0] == results[1]
    assert re.findall(r"^  step (\d+)  loss/mean", done.stdout, re.MULTILINE) == ["9", "19"], "the first process writes"
