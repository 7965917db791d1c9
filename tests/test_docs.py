"""Every Python block of README and docs runs, in order, in one namespace for each file."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name == "migrating.md" else ()) for page in PAGES],
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
            pattern = re.escape(promised).replace(r"\.\.\.", r"(\d*|\.\.\.)")  # digits left out, or code that has dots
            assert re.search(pattern, printed), f"not printed: {promised}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_lists_every_operation_and_public_name():
    import distributed_metrics as dm
    from distributed_metrics.accumulators import BY_NAME

    readme = (ROOT / "README.md").read_text()
    for name, accumulator in BY_NAME.items():
        assert f'`"{name}"`, `{accumulator.__name__}`' in readme
    for name in dm.__all__:
        assert getattr(dm, name).__doc__, name
