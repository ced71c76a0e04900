"""The README and the pages in docs/: every block runs, every command parses, every link leads somewhere."""

import importlib
import importlib.metadata
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import jsonargparse
import pytest
import yaml

import lightning_hrnn
from lightning_hrnn.tasks import CORPORA, FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "bash", "yaml", "text"}
# Commands besides our own that a page may name; CI runs the checks, and these are not ours to test.
OTHER_COMMANDS = {".", "bash", "mkdocs", "mypy", "pre-commit", "pytest", "python", "ruff", "srun", "torchrun"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """First line and text of every block of a page in one language."""
    text = page.read_text(encoding="utf-8")
    found = ((text[: match.start()].count("\n") + 2, *match.groups()) for match in FENCE.finditer(text))
    return [(line, body) for line, tongue, body in found if tongue == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def with_blocks(language: str) -> list:
    return [pytest.param(page, id=name(page)) for page in PAGES if blocks(page, language)]


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


# Lightning's advice on workers: the examples load their data in the main process on purpose.
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with patch.dict(FAMILIES), patch.dict(CORPORA):  # a page may register families and corpora of its own
        for line, body in blocks(page, "python"):
            code = compile("\n" * (line - 1) + body, name(page), "exec")
            exec(code, namespace)


def commands(page: Path) -> list[list[str]]:
    """Every command of the shell blocks of a page, as words."""
    lines = (line for _, body in blocks(page, "bash") for line in body.replace("\\\n", " ").splitlines())
    simple = (command for line in lines for command in line.split("#")[0].split("&&"))
    return [shlex.split(command) for command in simple if command.strip()]


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_parse(page, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    extras = importlib.metadata.metadata("lightning-hrnn").get_all("Provides-Extra")
    for program, *words in commands(page):
        if program == "lightning-hrnn":
            parse(words)
        elif program == "pip":
            target = words[-1]
            assert words[:-1] in (["install"], ["install", "-e"])
            assert target.startswith(".[")
            assert target[2:-1] in extras
        else:
            assert program in OTHER_COMMANDS


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_yaml_blocks_name_what_exists(page):
    def check(node):
        if isinstance(node, dict):
            if "class_path" in node:
                module, _, cls = node["class_path"].rpartition(".")
                parser = jsonargparse.ArgumentParser(exit_on_error=False)
                parser.add_class_arguments(getattr(importlib.import_module(module), cls))
                parser.parse_object(node.get("init_args", {}))
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                check(child)

    for _, body in blocks(page, "yaml"):
        check(yaml.safe_load(body))


@every_page
def test_blocks_are_in_a_language_that_is_checked(page):
    text = page.read_text(encoding="utf-8")
    assert {match.group(1) for match in FENCE.finditer(text)} <= LANGUAGES
    assert text.count("```") == 2 * len(FENCE.findall(text))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        inside = page.parent == ROOT or file.is_relative_to(DOCS)  # the built site holds nothing but docs/
        if not file.is_file() or not inside or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@every_page
def test_recipes_named_exist(page):
    named = set(re.findall(r"\brecipes/[\w./-]+\.yaml\b", page.read_text(encoding="utf-8")))
    assert not [recipe for recipe in sorted(named) if not (ROOT / recipe).is_file()]


def test_every_page_is_in_the_navigation():
    def pages(node):
        if isinstance(node, str):
            return [node]
        return [page for child in (node.values() if isinstance(node, dict) else node) for page in pages(child)]

    nav = pages(yaml.safe_load((ROOT / ".mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_reference_has_every_name_at_the_top_of_the_package():
    listed = re.findall(r"[\w.]+", (DOCS / "api.md").read_text(encoding="utf-8"))
    said = {word.rpartition(".")[2] for word in listed}
    assert set(lightning_hrnn.__all__) - {"__version__"} <= said


def test_the_readme_has_the_two_commands_and_ci_runs_them():
    said = [" ".join(words) for words in commands(ROOT / "README.md")]
    assert said == ["pip install .[all]", "lightning-hrnn demo", "pip install .[dev]", "pytest"]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.search(r'^pip install .*"\.\[dev\]"$', script, re.MULTILINE)
    assert re.search(r"^pytest\b", script, re.MULTILINE)


def test_the_workflow_mirrors_the_script():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs == ["bash .ci/run"]
