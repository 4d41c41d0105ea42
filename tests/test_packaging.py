"""One dependency list, one lock, one test command."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # the one address the set-up may name
REPOSITORY = PROJECT["urls"]["Repository"]  # of the course, for Colab


def lines(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def test_environment_yml_holds_no_second_list():
    entries = [line.strip() for line in lines("environment.yml")]
    assert entries[:2] == ["name: rlhf_edu", "dependencies:"]
    assert re.fullmatch(r"- python([=<>].*)?", entries[2])
    assert entries[3:] == ["- pip", "- pip:", "- -e .[dev]"]


def test_lock_is_plain_pins():
    for line in lines("constraints.txt"):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), f"{line!r} is not name==version"


def test_lock_satisfies_every_dependency():
    pins = dict(line.split("==") for line in lines("constraints.txt"))
    for text in REQUIREMENTS:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt, whose header says how to refresh it"
        assert requirement.specifier.contains(pins[name]), f"{text} does not admit {name}=={pins[name]}"


def test_set_up_names_no_other_address():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", "start.py", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        addresses = set(re.findall(r"[a-z+]+://[^\s\"')]*", text)) - {CPU_INDEX}
        addresses -= {REPOSITORY} if name == "pyproject.toml" else set()
        assert not addresses, f"{name} names {addresses}"
    assert not [text for text in REQUIREMENTS if "@" in text]


def test_ci_calls_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = ("make test", "python3 start.py test")
    assert all(command in ci for command in commands)
    assert any(command in readme for command in commands), "README.md does not give the command that CI runs"


def test_every_extra_that_is_named_is_there():
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("rlhf_edu/*.py"),
        *ROOT.glob("notebooks/*.ipynb"),
        *ROOT.glob("tests/*.py"),
    ]
    named = {
        name
        for path in texts
        for name in re.findall(r"-e [\\'\"]*\.\[(\w+)\]", path.read_text(encoding="utf-8"))
    }
    assert {"dev", "gpu", "judge"} <= named <= set(PROJECT["optional-dependencies"]), named
