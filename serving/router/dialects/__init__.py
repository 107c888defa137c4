"""Other shapes of a chat: each is translated to a chat completion, and the answer back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from serving.router.dialects.anthropic import Messages
from serving.router.dialects.dialect import Dialect
from serving.router.dialects.responses import Responses

DIALECTS: Mapping[str, Callable[[str], Dialect]] = {"/v1/responses": Responses, "/v1/messages": Messages}
"""By path; each is made for one request, with its id."""
