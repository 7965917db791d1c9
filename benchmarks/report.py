"""Runs all benchmarks and writes docs/benchmarks.md and its plot: make bench.

Each runs in a process of its own, on a machine that should be idle. Its docstring is its title and its introduction,
and what it prints is Markdown.
"""

import ast
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

from common import machine

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
PLOT = PAGE.with_suffix(".svg")
HEAD = """# Benchmarks

Written by `make bench` (`benchmarks/report.py`): do not edit. What the figures mean, and what was tried, is in
[performance.md](performance.md).
"""
RUNS: dict[str, list[list[str]]] = {
    "update.py": [["--devices", "8"], ["--devices", "1"]],
    "train_step.py": [[]],
    "flush.py": [["--devices", "8"], ["--devices", "1"]],
    "reducers.py": [[]],
    "start.py": [[]],
    "kinds.py": [[]],
    "service.py": [[]],
    "scaling.py": [[]],
}


def main() -> None:
    """All of them; or those that are named: ``report.py update.py``, which leaves the other sections as they are."""
    sections = read_sections()
    for script in sys.argv[1:] or RUNS:
        title, introduction = docstring_of(script)
        lines = [f"## {title}", f"`benchmarks/{script}`, {datetime.date.today()}, {machine()}.\n{introduction}"]
        times = {}
        for options in RUNS[script]:
            print(script, *options, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / "times.json"
                more = ["--json", str(file)] if script == "update.py" else []
                command = [sys.executable, HERE / script, *options, *more]
                lines.append(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
                if more:
                    times[options[1]] = json.loads(file.read_text())
        if times:
            plot(times)
            lines.insert(2, f"![one update of K means, by rivals]({PLOT.name})")
        sections[title] = "\n\n".join(lines) + "\n"
        titles = [docstring_of(one)[0] for one in RUNS]
        PAGE.write_text("\n".join([HEAD, *(sections[title] for title in titles if title in sections)]))


def docstring_of(script: str) -> tuple[str, str]:
    """Its title and its introduction."""
    title, _, introduction = (ast.get_docstring(ast.parse((HERE / script).read_text())) or "").partition("\n\n")
    return title, introduction


def read_sections() -> dict[str, str]:
    """The sections of the page, by title."""
    parts = PAGE.read_text().split("\n## ")[1:] if PAGE.exists() else []
    return {part.partition("\n")[0]: f"## {part}" for part in parts}


def plot(times: dict[str, dict[str, dict[str, float]]]) -> None:
    """Microseconds over K, a panel for each number of devices."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(times), figsize=(11, 4.5), sharey=True)
    for axis, (devices, by_count) in zip(axes, times.items(), strict=True):
        for name in next(iter(by_count.values())):
            style = "-" if name.startswith("ours") else ":" if name.startswith("hand") else "--"
            counts = [int(count) for count in by_count]
            axis.plot(
                counts,
                [of_count[name] for of_count in by_count.values()],
                style,
                marker=".",
                label=name.replace("`", ""),
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="metrics",
            title=f"{devices} virtual device{'s' if devices != '1' else ''}",
        )
        axis.set_xticks(counts, counts)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs for one update")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(PLOT, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
