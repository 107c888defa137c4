"""`serving ocr` against a service on a socket."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ocr_service_double import OcrDouble, run_double
from support.papers import write_image, write_pdf
from typer.testing import CliRunner, Result

from serving.cli.main import app
from serving.ocr_client.client import ReadOptions
from serving.ocr_client.file_search import Found, find_files, plan_tasks

SERVING = [sys.executable, "-m", "serving.cli.main"]


@pytest.fixture
def service() -> Iterator[OcrDouble]:
    with run_double() as double:
        yield double


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(service: OcrDouble, out: Path, *arguments: str | Path, wait: float = 10) -> Result:
    words = ["ocr", "--out", str(out), "--url", service.url, "--wait", str(wait), *map(str, arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


def place(out: Path, file: Path, suffix: str = ".md") -> Path:
    """The result of a file that was given by its absolute path."""
    return out.joinpath(*file.parts[1:-1], file.name + suffix)


def submissions(service: OcrDouble) -> int:
    return service.requests.count(("POST", "/v1/ocr/jobs"))


def test_files_folders_and_patterns_are_read(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    one = write_pdf(tmp_path / "one.pdf", 2)
    scans = tmp_path / "scans"
    (scans / "deep").mkdir(parents=True)
    write_image(scans / "deep/two.png", "PNG")
    write_pdf(scans / "three.pdf", 1)
    (scans / "notes.txt").write_text("not a document")
    (scans / ".hidden.pdf").write_text("not meant")
    pattern = tmp_path / "pattern"
    pattern.mkdir()
    write_pdf(pattern / "four.pdf", 1)
    result = run(service, out, one, scans, f"{pattern}/f*.pdf", "--mode", "auto")
    assert result.exit_code == 0, result.output
    assert place(out, one).read_text() == "<!-- page 1 -->\n\n# Page 1\n\n<!-- page 2 -->\n\n# Page 2\n"
    assert place(out, scans / "deep/two.png").read_text() == "# Page 1\n"
    found = {file for file in out.rglob("*") if file.is_file() and file.name[0] != "."}
    given = [one, scans / "deep/two.png", scans / "three.pdf", pattern / "four.pdf"]
    assert found == {*(place(out, file) for file in given), out / "report.csv"}
    assert "left out: hidden: 1, .txt: 1" in result.output
    assert "4 files read, 0 failed, 2 left out; 5 pages" in result.output
    assert "tokens/s, $0.000050" in result.output
    assert not service.jobs  # nothing of the documents stays with the service


def test_text_and_json_are_written(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 2)
    assert run(service, out, paper, "--format", "text").exit_code == 0
    assert place(out, paper, ".txt").read_text() == "# Page 1\n\f# Page 2\n"
    assert run(service, out, paper, "--format", "json", "--pages", "2").exit_code == 0
    (page,) = json.loads(place(out, paper, ".json").read_text())["pages"]
    assert page["number"] == 2
    assert page["blocks"][0] == {"label": "title", "text": "# Page 2", "boxes": [[51, 26, 461, 51]]}


def test_a_result_has_the_path_of_its_file_whatever_else_is_read(
    service: OcrDouble, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("box1", "box2", "deep/box3"):
        Path(folder).mkdir(parents=True)
        write_pdf(Path(folder, "scan001.pdf"), 1)
    write_image(Path("box1/scan001.png"), "PNG")
    long = "n" * 250 + ".pdf"
    write_pdf(Path("box2", long), 1)
    assert run(service, out, "box1", "./box2", "deep/**/*.pdf", "box1/scan001.pdf").exit_code == 0
    names = {file.relative_to(out).as_posix() for file in out.rglob("*.md") if file.name[0] != "."}
    (shortened,) = (name for name in names if "nnn" in name)
    assert len(Path(shortened).name.encode()) < 250
    assert names - {shortened} == {
        "box1/scan001.pdf.md",
        "box1/scan001.png.md",
        "box2/scan001.pdf.md",
        "deep/box3/scan001.pdf.md",
    }


def test_names_that_differ_in_case_only_stay_apart_where_the_file_system_does_not_tell() -> None:
    found = Found(files={"/a/X.pdf": "a/X.pdf", "/a/x.pdf": "a/x.pdf", "/A/x.pdf": "A/x.pdf"})
    tasks = plan_tasks(found, Path("out"), ".md", ignores_case=True)
    assert len({str(task.target).lower() for task in tasks}) == 3
    assert tasks[1].target == Path("out/a/x.pdf.md")
    assert plan_tasks(found, Path("out"), ".md")[0].target == Path("out/a/X.pdf.md")


def test_nothing_but_a_file_is_read_and_what_is_left_out_is_told(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    write_pdf(scans / "one.pdf", 1)
    for number in range(3):
        (scans / f"{number}.docx").touch()
    (scans / "broken.pdf").symlink_to(scans / "gone.pdf")
    (scans / "again.pdf").symlink_to(scans / "one.pdf")
    os.mkfifo(scans / "pipe.pdf")
    (scans / "README").touch()
    result = run(service, out, scans, scans / "pipe.pdf")
    assert result.exit_code == 1, result.output
    kinds = ".docx: 3, broken links: 1, neither file nor folder: 1, without a suffix: 1"
    assert sorted(result.output.split("left out: ")[1].splitlines()[0].split(", ")) == sorted(kinds.split(", "))
    assert "pipe.pdf: it cannot be read (it is not a regular file)" in result.output
    assert "1 files read, 1 failed, 6 left out" in result.output


def test_a_result_that_cannot_be_written_costs_its_file_only(
    service: OcrDouble, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("box1", "box2"):
        Path(folder).mkdir()
        write_pdf(Path(folder, "x.pdf"), 1)
    out.mkdir()
    (out / "box1").write_text("in the way")
    result = run(service, out, "box1", "box2")
    assert result.exit_code == 1
    assert "box1/x.pdf: its result cannot be written" in result.output
    assert (out / "box2/x.pdf.md").exists()


def test_a_full_disk_ends_the_run_before_a_page_is_paid(
    service: OcrDouble, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 1)
    monkeypatch.setattr("serving.ocr_client.bulk._LEAST_FREE_BYTES", 2**63)
    result = run(service, out, paper)
    assert (result.exit_code, submissions(service)) == (3, 0)
    assert "the disk is full" in result.output


def test_all_files_are_in_the_report(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    papers = [write_pdf(tmp_path / "a.pdf", 2), tmp_path / "bad.pdf"]
    papers[1].write_text("no document")
    service.bad_pages = {2}
    assert run(service, out, *papers).exit_code == 1
    with (out / "report.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["path"] == str(papers[0])
    assert (first["status"], first["pages"], first["failed_pages"], first["model"]) == ("failed", "1", "1", "nano")
    assert (first["mode"], first["tokens"], first["cost_dollars"]) == ("tiny", "113", "0.000010000")
    assert first["sha256"] == hashlib.sha256(papers[0].read_bytes()).hexdigest()
    assert first["error"] == "page 2: The page is damaged."
    assert (second["status"], second["pages"]) == ("failed", "0")
    assert "no document" in second["error"]


def test_a_json_result_says_where_it_came_from(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 3)
    assert run(service, out, paper, "--format", "json", "--pages", "2-3").exit_code == 0
    found = json.loads(place(out, paper, ".json").read_text())
    del found["pages"], found["estimated_cost"]
    assert found == {
        "path": str(paper),
        "num_pages": 2,  # the double counts what it was asked for
        "model": "nano",
        "mode": "tiny",
        "checkpoint_revision": None,
        "sha256": hashlib.sha256(paper.read_bytes()).hexdigest(),
        "versions": {"serving": importlib.metadata.version("serving")},
    }


def test_a_password_is_sent_and_stored_nowhere(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 1)
    result = run(service, out, paper, "--password", "geheim")
    assert result.exit_code == 0, result.output
    assert "geheim" not in result.output
    assert not any(b"geheim" in file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert "geheim" not in repr(ReadOptions("nano", password="geheim"))


def test_jobs_that_a_stopped_run_left_are_ended_by_the_next_one(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    service.page_s = 60
    paper, other = write_pdf(tmp_path / "one.pdf", 2), write_pdf(tmp_path / "two.pdf", 1)
    command: list[str | Path] = [*SERVING, "ocr", paper, "--out", out, "--url", service.url]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: submissions(service) == 1)
    wait_for(lambda: ("GET", "/v1/ocr/jobs/job-1/pages") in service.requests)
    first.kill()
    first.wait()
    service.page_s = 0
    assert run(service, out, other).exit_code == 0
    assert not service.jobs


def test_names_that_are_not_utf8_are_read_and_written_under_names_of_their_own(
    service: OcrDouble, out: Path, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    names = [
        b"caf\xe9.png",
        b"caf\xe8.png",
        "café.png".encode(),
        b"caf%e9.png",
        b"caf\\xe9.png",
        b"\x8a" * 200 + b".png",
    ]
    for folder in (b"\xfc", b"plain"):
        for name in names:
            file = Path(os.fsdecode(os.path.join(os.fsencode(scans), folder, name)))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_image(file, "PNG")
    result = run(service, out, scans)
    assert result.exit_code == 0, result.output
    written = [file for file in out.rglob("*.md") if file.name[0] != "."]
    assert len(written) == len({file.read_text() and file for file in written}) == 2 * len(names)
    for file in written:
        assert str(file.relative_to(out)).encode().decode().isprintable()
    assert place(out, scans / "plain/café.png").exists()
    assert place(out, scans / "plain/caf%e9.png").exists()
    assert len(list(out.rglob("plain/caf%e9.png-????????.md"))) == 1
    assert "caf\\xe9.png -> " in result.output
    again = run(service, out, scans)
    assert (again.exit_code, submissions(service)) == (0, 2 * len(names))
    assert f"{2 * len(names)} of them finished before" in again.output


def test_a_name_that_is_not_utf8_is_taken_in_every_other_way_too(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    odd = write_image(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")), "PNG")
    assert run(service, out, odd, "--format", "json").exit_code == 0
    (file,) = out.rglob("*.json")
    assert json.loads(file.read_text())["path"].endswith("caf\\xe9.png")
    assert run(service, Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xe9t")), tmp_path / "caf*").exit_code == 0
    (tmp_path / "other").mkdir()
    twin = write_image(Path(os.fsdecode(os.fsencode(tmp_path) + b"/other/caf\xe9.png")), "PNG")
    assert run(service, tmp_path / "third", odd, twin).exit_code == 0
    assert len(list((tmp_path / "third").rglob("*.md"))) == 2
    none = run(service, out, os.fsdecode(b"none\xe9.png"))
    assert (none.exit_code, "none\\xe9.png: no such file" in none.output) == (2, True)


@pytest.mark.parametrize("argument", ["scans", "scans/**/*.png", "scans/*/*.png", "scans/locked/one.png"])
def test_folders_that_cannot_be_looked_into_are_told_and_are_status_one(
    service: OcrDouble, out: Path, tmp_path: Path, argument: str
) -> None:
    for folder in ("scans/open", "scans/locked"):
        (tmp_path / folder).mkdir(parents=True)
        write_image(tmp_path / folder / "one.png", "PNG")
    (tmp_path / "scans/locked").chmod(0)
    # To root no folder is locked, unless it gives that up.
    humble = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    command: list[str | Path] = [*humble, *SERVING, "ocr", tmp_path / argument, "--out", out, "--url", service.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (tmp_path / "scans/locked").chmod(0o700)
    assert done.returncode == 1, done.stderr
    assert "locked: the folder cannot be searched (Permission denied)" in done.stderr
    assert [file.name for file in out.rglob("*.md")] == ([] if "locked" in argument else ["one.png.md"])


def test_many_names_are_planned_in_linear_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a look at the disk for each file."""
    for number in range(300):
        (tmp_path / f"{number}.pdf").touch()
    num_asked = 0
    resolve = os.path.realpath

    def count(path: str, **more: Any) -> str:
        nonlocal num_asked
        num_asked += 1
        return resolve(path, **more)

    monkeypatch.setattr(os.path, "realpath", count)
    found = find_files([str(tmp_path)], tmp_path / "out")
    assert len(plan_tasks(found, Path("out"), ".txt")) == 300
    assert num_asked < 10


def test_what_is_done_is_not_done_again(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    papers = [write_pdf(tmp_path / f"{n}.pdf", 2) for n in range(3)]
    assert run(service, out, *papers).exit_code == 0
    place(out, papers[0]).unlink()
    again = run(service, out, *papers)
    assert (again.exit_code, submissions(service)) == (0, 3)
    assert "3 files read, 3 of them finished before" in again.output
    assert place(out, papers[0]).exists()
    write_pdf(papers[1], 3)  # it has changed
    assert run(service, out, *papers).exit_code == 0
    assert submissions(service) == 4
    assert "# Page 3" in place(out, papers[1]).read_text()
    assert run(service, out, papers[2], "--mode", "large").exit_code == 0
    assert submissions(service) == 5


def test_pages_that_failed_are_told_and_tried_again(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 5)
    service.bad_pages = {2, 4}
    result = run(service, out, paper)
    assert result.exit_code == 1
    assert "one.pdf, page 2: The page is damaged." in result.output
    assert "<!-- page 2 could not be read: The page is damaged. -->" in place(out, paper).read_text()
    service.bad_pages = {4}
    assert run(service, out, paper).exit_code == 1
    assert service.reads == {
        ("one.pdf", 1): 1,
        ("one.pdf", 2): 2,
        ("one.pdf", 3): 1,
        ("one.pdf", 4): 2,
        ("one.pdf", 5): 1,
    }
    assert "# Page 2" in place(out, paper).read_text()
    service.bad_pages = set()
    assert run(service, out, paper).exit_code == 0
    assert "could not be read" not in place(out, paper).read_text()


def test_a_document_that_is_refused_leaves_the_others_alone(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    good = write_pdf(tmp_path / "good.pdf", 1)
    (tmp_path / "bad.pdf").write_text("no document")
    result = run(service, out, tmp_path / "bad.pdf", good)
    assert result.exit_code == 1
    assert "bad.pdf: This is no document that can be read." in result.output
    assert place(out, good).exists()


def test_a_job_that_the_service_has_lost_costs_only_the_missing_pages(
    service: OcrDouble, out: Path, tmp_path: Path
) -> None:
    service.forgets_jobs = True
    paper = write_pdf(tmp_path / "one.pdf", 6)
    result = run(service, out, paper)
    assert result.exit_code == 0, result.output
    assert submissions(service) == 2
    assert all(f"# Page {number}\n" in place(out, paper).read_text() for number in range(1, 7))
    assert service.reads["one.pdf", 1] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.pdf"], "no such file"),
        (["one.pdf", "--mode", "huge"], "must be one of tiny"),
        (["."], "no documents in this folder"),
        (["one.pdf", "--pages", "5-2"], "ranges must be ascending"),
        (["one.pdf", "--pages", "x"], "must be numbers and ranges"),
        (["one.pdf", "--url", "localhost:8000"], "must begin with http://"),
        (["one.pdf", "--key", "sk-1\nsk-2"], "without line breaks"),
    ],
)
def test_a_wrong_command_is_told_before_anything_is_asked(
    service: OcrDouble, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if arguments == ["."] else tmp_path)
    if arguments != ["."]:
        (tmp_path / "other").mkdir()
        write_pdf(tmp_path / "one.pdf", 1)
        write_pdf(tmp_path / "other/one.pdf", 2)
    result = run(service, out, *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not service.requests


def test_a_service_that_cannot_be_used_is_status_three(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 1)
    service.key = "sk-1"
    result = run(service, out, paper, "--model", "nano")
    assert result.exit_code == 3
    assert "SERVING_API_KEY" in result.output
    good = CliRunner().invoke(
        app, ["ocr", str(paper), "--out", str(out)], env={"SERVING_API_KEY": "sk-1", "SERVING_URL": service.url}
    )
    assert good.exit_code == 0, good.output
    service.stop()
    gone = run(service, tmp_path / "other", paper, wait=0.5)
    assert gone.exit_code == 3
    assert f"waiting for {service.url} (refused), up to 0.5 s" in gone.output
    assert "could not be reached" in gone.output


def test_a_model_that_the_service_has_not_is_a_wrong_command(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    paper = write_pdf(tmp_path / "one.pdf", 1)
    result = run(service, out, paper, "--model", "nanö")
    assert (result.exit_code, submissions(service)) == (2, 0)
    assert "no such model, only nano" in result.output
    assert run(service, out, paper, "--url", f"{service.url}/v1/").exit_code == 0


def test_without_a_terminal_lines_tell_how_far_it_is(
    service: OcrDouble, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.cli.ocr._LINE_S", 0.01)
    service.page_s = 0.1
    result = run(service, out, write_pdf(tmp_path / "one.pdf", 3))
    assert "0/1 files, 0 pages: 0.0 pages/s" in result.output


def test_two_runs_do_not_share_a_folder(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    service.page_s = 2
    paper = write_pdf(tmp_path / "one.pdf", 2)
    first = subprocess.Popen([*SERVING, "ocr", paper, "--out", out, "--url", service.url], stderr=subprocess.DEVNULL)
    wait_for(lambda: submissions(service) == 1)
    assert run(service, out, paper).exit_code == 2
    first.kill()
    first.wait()


def wait_for(is_so: object, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_file_is_never_given_the_pages_of_another(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    """The first job is over and gone while the second still runs and the third is submitted."""
    service.page_s = 0.05
    papers = [write_pdf(tmp_path / f"{n}.pdf", num_pages) for n, num_pages in enumerate((1, 20, 9))]
    assert run(service, out, *papers, "--jobs", "2").exit_code == 0
    assert set(service.reads.values()) == {1}
    assert len(service.reads) == 30


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_where_it_was(
    service: OcrDouble, out: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    service.page_s = 0.15
    papers = [write_pdf(tmp_path / f"{n}.pdf", 8) for n in range(3)]
    command: list[str | Path] = [*SERVING, "ocr", *papers, "--out", out, "--url", service.url, "--jobs", "2"]
    # A shell's background jobs, and all below them, are started deaf to Ctrl-C.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(service.reads) >= 6)
    process.send_signal(ending)
    _, told = process.communicate(timeout=30)
    assert process.returncode == (130 if ending == signal.SIGINT else -signal.SIGKILL), told
    assert run(service, out, *papers).exit_code == 0
    assert submissions(service) <= 5  # one that was under way may be sent again, with its old key
    assert len(service.reads) == 24
    assert set(service.reads.values()) == {1}


def test_a_service_that_is_away_for_a_while_is_waited_for(service: OcrDouble, out: Path, tmp_path: Path) -> None:
    service.page_s = 0.1
    paper = write_pdf(tmp_path / "one.pdf", 10)

    def restart() -> None:
        wait_for(lambda: len(service.reads) >= 4)
        service.stop()
        time.sleep(0.5)
        service.start()

    away = threading.Thread(target=restart)
    away.start()
    result = run(service, out, paper, wait=30)
    away.join()
    assert result.exit_code == 0, result.output
    assert len(service.reads) == 10
    assert set(service.reads.values()) == {1}
