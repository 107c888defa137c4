"""benchmarks/README.md from templates and results: prose is written by people, every figure in it comes from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2

from benchmarks.documents import Document, read_documents
from benchmarks.registry import BENCHMARKS
from benchmarks.report import plots
from benchmarks.report.figures import Figures, number

PAGE = Path(__file__).parents[1] / "README.md"
PLOTS = Path(__file__).parents[1] / "plots"
_TEMPLATES = Path(__file__).parent


def render(documents: Mapping[str, Document], drawn: list[str]) -> str:
    """The page's text. `drawn` are the names of the plots that there are."""
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown of ours, from files of ours
    )
    figures = Figures(documents)
    environment.globals.update(f=figures, documents=documents, benchmarks=BENCHMARKS, number=number, drawn=drawn)
    # The parts first: the page's head lists what they found not to be reached.
    parts = {
        file.name.split(".")[0]: environment.get_template(file.name).render()
        for file in sorted(_TEMPLATES.glob("*.part.md.j2"))
    }
    return environment.get_template("page.md.j2").render(parts=parts, misses=figures.misses)


def write_report() -> Path:
    """Draw the plots, write the page, give its place."""
    documents = read_documents()
    drawn = plots.draw_all(documents, PLOTS)
    PAGE.write_text(render(documents, drawn))
    return PAGE
