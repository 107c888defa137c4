"""The README's commands for the published checkpoint run from a fresh clone in the order in which they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
SECTIONS = ("## The published checkpoint on GPUs", "### Without a GPU")


def commands_of(section: str) -> list[list[str]]:
    """The words of each command of a section's first block, environment in front of it included."""
    text = README.partition(f"\n{section}\n")[2]
    (block, *_) = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    joined = block.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("section", SECTIONS)
def test_each_program_is_there_when_its_turn_comes(section: str) -> None:
    is_set_up = False
    for words in commands_of(section):
        program = next(word for word in words if "=" not in word)
        if program == "make":
            verb = words[words.index("make") + 1]
            assert re.search(rf"^{verb}:.*\binstall\b|^install:", MAKEFILE, re.MULTILINE), verb
            is_set_up = True
        else:
            assert program.startswith(".venv/bin/"), f"{program} is not of this project"
            assert is_set_up, f"{program} comes before anything makes .venv"
            assert (ROOT / program).exists(), f"the set-up brings no {program}"
    assert is_set_up


@pytest.mark.parametrize("section", SECTIONS)
def test_what_a_command_names_is_there_or_made_before(section: str) -> None:
    made: set[str] = set()
    for words in commands_of(section):
        if "--file" in words:
            made.add(words[words.index("--file") + 1])
        for word in words:
            if word.startswith("CONFIG="):
                file = ROOT / word.partition("=")[2]
                keys_file = yaml.safe_load(file.read_text())["router"].get("keys_file")
                assert keys_file is None or keys_file in made


def test_what_is_downloaded_is_what_is_served() -> None:
    served = {
        (model["checkpoint"], model["engine_args"]["revision"])
        for file in sorted((ROOT / "configs").glob("*.yaml"))
        for model in yaml.safe_load(file.read_text())["models"].values()
        if model["checkpoint"] != "nano"
    }
    assert len(served) == 1, "one commit everywhere"
    downloads = [words for section in SECTIONS for words in commands_of(section) if Path(words[0]).name == "hf"]
    assert {(words[2], words[4]) for words in downloads} == served
    assert len(downloads) == len(SECTIONS)
