"""The files around the code agree with the code: changelog, citation, hooks, workflow."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from decm_lightning import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY.md"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_changelog_has_every_command():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in cli.COMMANDS if f"`{name}`" not in text] == []


def test_the_citation_is_of_this_version_and_the_paper():
    citation = read("CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_workflow_runs_targets_that_exist():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    named = {word for command in commands for word in re.findall(r"^make ([a-z-]+)", command)}
    named |= set(jobs["tests"]["strategy"]["matrix"]["target"])
    assert {"lint", "types", "contracts", "test", "test-lowest"} <= named <= TARGETS


def test_the_hooks_run_tools_of_the_environment():
    (hooks,) = (source["hooks"] for source in read(".pre-commit-config.yaml")["repos"])
    tools = {"ruff": "ruff", "mypy": "mypy", "lint-imports": "import-linter"}
    called = {tools[hook["entry"].split()[0]] for hook in hooks}
    assert called == set(tools.values()) <= set(PROJECT["optional-dependencies"]["dev"])
    assert {hook["language"] for hook in hooks} == {"system"}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_targets_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    assert [link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text) if not (ROOT / link).exists()] == []
    assert set(re.findall(r"(?:`| {4})make ([a-z-]+)", text)) <= TARGETS


@pytest.mark.parametrize("form", sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")))
def test_an_issue_form_asks_for_something(form):
    content = read(f".github/ISSUE_TEMPLATE/{form}")
    assert content["name"]
    assert content["description"]
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids)) > 0
