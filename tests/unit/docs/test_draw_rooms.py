"""The rules that the drawing of the folders keeps."""

from __future__ import annotations

import pytest

from docs.draw_rooms import RuleError, check_rules, draw, read_imports


def test_a_loop_between_folders_is_refused() -> None:
    loop = {"serving.http": {"serving.settings"}, "serving.settings": {"serving.errors"}}
    check_rules(loop)
    with pytest.raises(RuleError, match=r"serving\.settings.*serving\.http|serving\.http.*serving\.settings"):
        check_rules({**loop, "serving.settings": {"serving.http"}})


def test_a_folder_is_above_what_it_imports_even_inside_functions() -> None:
    imports = read_imports()
    assert "serving.engine" in imports["serving.stack"]  # imported by functions of its only
    assert "serving.plugin.interfaces" in imports["serving.plugin.repetition"]


def test_arrows_that_others_imply_are_left_out() -> None:
    page = draw(
        {"serving": set(), "serving.a": {"serving.b", "serving.c"}, "serving.b": {"serving.c"}, "serving.c": set()}
    )
    arrows = [line.strip() for line in page.splitlines() if "-->" in line]
    assert arrows == ["serving.a --> serving.b", "serving.b --> serving.c"]
