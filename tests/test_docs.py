"""The site builds without a warning, and its commands, options, names and snippets exist in the code."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from importlib import import_module
from itertools import chain
from pathlib import Path
from pydoc import locate

import lightning as L
import pytest
import yaml

import decm_lightning
from decm_lightning import Distiller, TeacherTraining, cli, data
from decm_lightning.cli.completion import options

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "docs").rglob("*.md"))
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in SOURCES}
EXAMPLES = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in (ROOT / "examples").glob("*.py")}
TEXTS = PAGES | EXAMPLES | {"README.md": (ROOT / "README.md").read_text()}
ROOMS = "losses metrics teachers networks samplers data evaluation callbacks flows demo derivatives triangle time_laws"
OTHERS = re.compile(r"pip |tensorboard|python -m benchmarks|make |evaluate_images|ssh |#SBATCH|--signal|no-deps")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run([*sphinx, "-d", folder / "trees", ROOT / "docs", folder / "html"], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    return folder / "html"


def test_the_site_has_every_page_and_needs_no_network(site):
    assert {name.replace(".md", ".html") for name in PAGES} <= {
        path.relative_to(site).as_posix() for path in site.rglob("*.html")
    }
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"(https?:[^\"]+)", page.read_text())
        assert not loaded, page


def test_every_page_is_in_the_navigation(site):
    listed = set(re.findall(r'class="reference internal" href="([^"#]+)"', (site / "index.html").read_text()))
    assert {name.replace(".md", ".html") for name in PAGES} - {"index.html"} <= listed


def test_equations_are_rendered_and_stand_next_to_the_code(site):
    page = (site / "method.html").read_text()
    assert page.count("<math") >= 20
    assert not re.search(r"\\(?:frac|gamma|text)\b", page)
    code = re.sub(r"<[^>]+>", "", page)
    for line in ("return Tangent(x, torch.full_like(t, start_weight)", "warmup * expand(s - t, u) * jvp", "NoiseEdge("):
        assert line in code


def test_the_reference_has_every_public_name(site):
    pages = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    described = {name.rpartition(".")[2] for name in re.findall(r'id="(decm_lightning\.[\w.]+)"', pages)}
    assert set(dir(decm_lightning)) - {"__version__"} <= described


def commands(text: str) -> list[list[str]]:
    """Return the words of every complete decm command in fences, indented lines and code spans."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^[ ]*(?:srun |torchrun .*)?(?:decm|-m decm_lightning)\s+(.*)$", text, re.MULTILINE)
    lines += re.findall(r"^torchrun .*-m decm_lightning\s+(.*)$", text, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`(decm [^`]+)`", text)]
    found = [shlex.split(line, comments=True) for line in [*lines, *(span.removeprefix("decm ") for span in spans)]]
    return [words for words in found if words and re.fullmatch(r"[a-z-]+", words[0])]


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_their_options_exist(name):
    for command, *words in commands(TEXTS[name]):
        if command in ("writes", "finds"):  # a sentence
            continue
        assert command in cli.COMMANDS, command
        known = set(options(command))
        nested = ("trainer.", "model.", "data.") if cli.COMMANDS[command].group == cli.TRAINING else tuple(known)
        for word in (word.removeprefix("--").rstrip(",") for word in words if word.startswith("--")):
            assert word.partition("=")[0] in known | {"print_config", "help", "data"} or word.startswith(nested), word


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - {"benchmarks.md"}))
def test_options_anywhere_in_a_page_exist(name):
    known = set(chain.from_iterable(options(command) for command in cli.COMMANDS))
    known |= {"help", "version", "print_config", "data", "constraint", "dry-run"}
    modules = {**inspect.signature(Distiller).parameters, **inspect.signature(TeacherTraining).parameters}
    sources = [getattr(data, each) for each in data.__all__]
    rows = set(chain.from_iterable(inspect.signature(source).parameters for source in sources))
    lines = [line for line in TEXTS[name].splitlines() if not OTHERS.search(line)]
    for flag in re.findall(r"(?<=[\s`(])--([a-z][\w.-]*)", "\n".join(line.split("torchrun")[0] for line in lines)):
        part = flag.rstrip(".").split(".")
        if part[0] == "trainer" and len(part) > 1:
            assert part[1] in inspect.signature(L.Trainer).parameters, flag
        elif part[:2] == ["model", "init_args"]:
            assert part[2] in {*modules, "path"}, flag
        elif part[:2] == ["data", "init_args"]:
            assert part[2] in rows, flag
        else:
            assert part[0] in known | {"trainer"}, flag


@pytest.mark.parametrize("name", TEXTS)
def test_names_in_code_spans_exist(name):
    pattern = rf"`(?:decm_lightning\.)?((?:{'|'.join(ROOMS.split())})\.[A-Za-z][\w.]*)[`(]"
    for path in set(re.findall(pattern, TEXTS[name])):
        if not path.endswith((".py", ".md", ".json", ".png")):
            assert locate(f"decm_lightning.{path}") is not None, path


def blocks(language: str) -> list:
    found = ((name, re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)) for name, text in PAGES.items())
    return [pytest.param(block, id=f"{name}:{k}") for name, several in found for k, block in enumerate(several)]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_on_a_page_names_what_exists(block):
    """Imports work, and calls of imported functions have arguments that the functions accept."""
    tree, names = ast.parse(block), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module)
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name: import_module(alias.name) for alias in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, *rest = ast.unparse(call.func).split(".")
        if first in names and all(part.isidentifier() for part in rest):
            function = names[first]
            for part in rest:
                function = getattr(function, part)
            if function.__module__.startswith("decm_lightning"):
                arguments = {keyword.arg: None for keyword in call.keywords}
                inspect.signature(function).bind_partial(*call.args, **arguments)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_on_a_page_names_classes_with_these_arguments(block):
    def check(value):
        if isinstance(value, dict) and "class_path" in value:
            target = locate(value["class_path"])
            inspect.signature(target).bind_partial(**value.get("init_args", {}))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part)

    check(yaml.safe_load(block))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words)[:80])
        for name in ("imagenet.md", "scaling.md", "mean-flow.md", "own-teacher.md")
        for words in commands(PAGES[name])
        if words[0] in ("fit", "predict") and "--config" in words and "--ckpt_path" not in words
    ],
)
def test_the_parser_accepts_a_documented_fit(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["configs/digits/decm.yaml" if word.startswith(("EXPERIMENT", "CONFIG")) else word for word in words]
    monkeypatch.setattr(sys, "argv", ["decm", *words, "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert "class_path" in capsys.readouterr().out


def test_the_table_of_configs_has_every_config_and_only_values_of_its_header():
    rows = {row[0]: row for row in re.findall(r"^\| `([\w/-]+\.yaml)` (\|.*)$", PAGES["configs.md"], re.MULTILINE)}
    configs = ROOT / "configs"
    assert sorted(rows) == sorted(path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml"))
    for name, (_, text) in rows.items():
        if name.startswith("trainer/"):
            continue
        header = "".join(line for line in (configs / name).read_text().splitlines() if line.startswith("#"))
        numbers = re.findall(r"\d+(?:[.,]\d+)*", text.partition("computed: ")[2] if "computed: " in text else text)
        assert [number for number in numbers if number not in header] == [], name
