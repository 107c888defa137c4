from __future__ import annotations

from benchmarks.planning.commands import app

if __name__ == "__main__":
    app()
