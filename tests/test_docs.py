"""README and docs: every Python block runs, in order, in one namespace for each file; links lead somewhere; what is
public is documented; the site builds.
"""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import distributed_metrics as dm
from distributed_metrics import DistributedMetrics, merging, testing, writers
from distributed_metrics.accumulators import BY_NAME

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "src" / "distributed_metrics" / "accumulators" / "README.md"]
SLOW = ("migrating.md", "custom.md")
PUBLIC = {
    **{f"distributed_metrics.{name}": getattr(dm, name) for name in dm.__all__},
    **{f"distributed_metrics.writers.{name}": getattr(writers, name) for name in writers.__all__},
    "distributed_metrics.testing.check_accumulator": testing.check_accumulator,
    "distributed_metrics.merging.Merge": merging.Merge,
    "distributed_metrics.merging.Number": merging.Number,
}


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in SLOW else ()) for page in PAGES]
)
def test_every_python_block_runs(page, capsys):
    namespace: dict[str, object] = {}
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[1], str(page), "exec"), namespace)
    printed = capsys.readouterr().out
    for shown in re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for promised in shown.splitlines():
            pattern = re.escape(promised).replace(r"\.\.\.", r"[\d.]*")  # digits left out, or code that has dots
            assert re.search(pattern, printed), f"not printed: {promised}"


def anchors(page: pathlib.Path) -> set[str]:
    """Those of its headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    }


@pytest.mark.parametrize("page", LINKING, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", "docs/accumulators.md"])
def test_the_table_of_accumulators_has_all_of_them_with_their_bytes_and_empty_values(page):
    text = (ROOT / page).read_text()
    rows = re.findall(r'^\| `"(\w+)"`, `(\w+)` \|.*\| ([\d,]+) \| (\w+) \|$', text, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [(name, accumulator.__name__) for name, accumulator in BY_NAME.items()]
    of_bins, (of_quantile, *_) = re.findall(r"^\| `[HQ].*\| ([\d, a-z]+) \| (\w+) \|$", text, flags=re.MULTILINE)
    assert of_bins == ("8 a bin, and 32", "0")
    rows.append(("quantile", "", of_quantile, "NaN"))
    for name, _, stored, empty in rows:
        metrics = DistributedMetrics({"x": dm.Quantile(0.5) if name == "quantile" else name})
        assert sum(array.nbytes for array in jax.tree.leaves(nnx.state(metrics))) == int(stored.replace(",", "")), name
        assert np.isnan(metrics.compute()["x"]) if empty == "NaN" else metrics.compute()["x"] == float(empty), name
    for bins in (1, 4):
        metrics = DistributedMetrics({"x": dm.Histogram(range(bins + 1))})
        assert sum(array.nbytes for array in jax.tree.leaves(nnx.state(metrics))) == 8 * bins + 32
        assert not metrics.compute()["x"].any()


def public_methods(what: object) -> list[str]:
    """Methods and properties that a class defines; of one that it overrides the base class may say what it does."""
    return [name for name in vars(what) if name[0] != "_" and callable(getattr(what, name))] + [
        name for name, one in vars(what).items() if name[0] != "_" and isinstance(one, property)
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_a_docstring_and_its_place_in_the_api_page(name):
    what = PUBLIC[name]
    assert what.__doc__, name
    assert f"\n::: {name}\n" in (ROOT / "docs" / "api.md").read_text()
    for method in public_methods(what) if isinstance(what, type) else []:
        assert inspect.getdoc(getattr(what, method)), f"{name}.{method}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_shows_what_is_public(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    prose = re.sub(r"<(pre|code).*?</\1>", "", page, flags=re.DOTALL)
    assert not re.findall(r".*(?:``|&gt;&gt;&gt;).*", prose), "a docstring that Markdown takes for something else"
    for name, what in PUBLIC.items():
        assert f'id="{name}"' in page, name
        if isinstance(what, type) and not (issubclass(what, dm.Accumulator) and what is not dm.Accumulator):
            for method in public_methods(what):
                if not method.endswith("_static"):  # the functions, which have their places
                    assert f'id="{name}.{method}"' in page, f"{name}.{method}"
    for built in tmp_path.rglob("*.html"):
        loaded = re.findall(r'(?:src|href)="(https?:)?//[^"]*"[^>]*(?:rel="stylesheet"|></script>)', built.read_text())
        assert not loaded, f"{built.name} loads something from elsewhere"
