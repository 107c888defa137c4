"""Settings of the image pipeline from the environment, since a bare vLLM server has no settings file of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "SERVING_IMAGE_"


@dataclass(frozen=True, slots=True)
class ImagePipelineSettings:
    """The pipeline's settings; each is read from the variable `SERVING_IMAGE_` plus its name in capitals.

    workers: processes that decode and tile; 0 uses threads of the API process.
    queue: pages that may queue for a worker; further pages wait for room for at most `queue_timeout_s`.
    queue_timeout_s: a request that finds no room in the queue for so long is refused with 503.
    work_timeout_s: a worker that spends longer on one page is killed, and the page fails.
    """

    workers: int = 0
    queue: int = 64
    queue_timeout_s: float = 30.0
    work_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"{PREFIX}WORKERS must not be negative, not {self.workers}")
        if self.queue < 1:
            raise ValueError(f"{PREFIX}QUEUE must be 1 or more, not {self.queue}")
        for name in ("queue_timeout_s", "work_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{PREFIX}{name.upper()} must be positive, not {getattr(self, name)}")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> ImagePipelineSettings:
        """Read the settings.

        Raises:
            ValueError: a variable is not a number, not a boolean, or out of range; the message names it.
        """
        default = cls()
        return cls(
            workers=int(_number(environ, "WORKERS", default.workers)),
            queue=int(_number(environ, "QUEUE", default.queue)),
            queue_timeout_s=_number(environ, "QUEUE_TIMEOUT_S", default.queue_timeout_s),
            work_timeout_s=_number(environ, "WORK_TIMEOUT_S", default.work_timeout_s),
        )


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(PREFIX + name, "")
    if not text:
        return default
    try:
        value = float(text) if isinstance(default, float) else int(text)
    except ValueError:
        raise ValueError(f"{PREFIX}{name} must be a number, not {text!r}") from None
    return value
