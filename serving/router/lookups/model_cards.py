"""Model cards: OpenAI's fields, and those that aggregators and user interfaces read. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from serving.billing.prices import Price
from serving.cluster.directory import ReplicaRecord
from serving.plugin.modes.selection import MODES
from serving.settings.stack import ModelSettings

_PICO = Decimal(10) ** -12


def build_cards(
    name: str, model: ModelSettings, price: Price, ready: Sequence[ReplicaRecord], created_s: int
) -> list[dict[str, Any]]:
    """A card for every name of a model.

    Args:
        name: its canonical name.
        model: its settings.
        price: what its tokens cost the tenant who asks.
        ready: its replicas that serve; without one the context's length is unknown.
        created_s: Unix time.
    """
    longest = min((record.max_model_len for record in ready), default=None)
    inputs = ["text", "image"] if _reads_images(ready) else ["text"]
    facts = {
        "object": "model",
        "created": created_s,
        "owned_by": "serving",
        "root": name,
        "revision": model.engine_args.get("revision"),
        "max_model_len": longest,
        "context_length": longest,
        "max_completion_tokens": longest,
        "pricing": _build_pricing(price),
        "input_modalities": inputs,
        "output_modalities": ["text"],
        "architecture": {
            "modality": "+".join(inputs) + "->text",
            "input_modalities": inputs,
            "output_modalities": ["text"],
        },
        "top_provider": {"context_length": longest, "max_completion_tokens": longest},
        "modes": _list_modes(ready),
        "ready_replicas": len(ready),
    }
    return [{"id": alias, **facts} for alias in (name, *model.aliases)]


def _build_pricing(price: Price) -> dict[str, str]:
    """Dollars per token as texts, as OpenRouter has them."""
    found = {"prompt": _to_text(price.input_picodollars), "completion": _to_text(price.output_picodollars)}
    if price.cached_picodollars is not None:
        found["input_cache_read"] = _to_text(price.cached_picodollars)
    if price.image_picodollars is not None:
        found["image_token"] = _to_text(price.image_picodollars)
    return {**found, "request": "0", "image": "0"}


def _to_text(picodollars: int) -> str:
    return format((picodollars * _PICO).normalize(), "f")


def _reads_images(ready: Sequence[ReplicaRecord]) -> bool:
    """Whether the model reads images; without a replica that says so, all models of this stack do."""
    return not ready or any(record.image_config is not None for record in ready)


def _list_modes(ready: Sequence[ReplicaRecord]) -> list[str]:
    """The resolution modes that the model was trained for; all of them if its checkpoint does not say."""
    if not _reads_images(ready):
        return []
    trained = (dict(record.image_config or ()).get("modes") for record in ready)
    return list(next((modes for modes in trained if modes), MODES))
