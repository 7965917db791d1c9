"""The example, run as a user runs it: it learns, it shows how, and its metrics send nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

ROOT = Path(__file__).parents[1]


def run_example(output, *options):
    """The finished process of ``examples/train_digits.py``, on a CPU, without a terminal, any warning an error."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    plain = {"COLUMNS": "100", "FORCE_COLOR": "", "TTY_COMPATIBLE": "0"}
    environment = {**os.environ, **plain, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "train_digits.py"), "--output", str(output)]
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)


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
    windows = re.findall(r"^step (\d+): loss [\d.]+, .* samples/s$", done.stdout, re.MULTILINE)
    assert [int(step) for step in windows] == list(range(10, 12 * 23 + 1, 10))

    image = imread(tmp_path / "curves.png")
    assert f"curves: {tmp_path / 'curves.png'}\n" in done.stdout
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.05, "the plot is blank"


def test_a_model_that_did_not_learn_fails(tmp_path):
    done = run_example(tmp_path, "--epochs", "1")
    assert done.returncode == 1
    assert "should be above 95%" in done.stderr


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    done = run_example(tmp_path, "--batch-size", "60")
    assert done.returncode == 2
    assert "--batch-size 60 cannot be divided among 8 devices" in done.stderr
