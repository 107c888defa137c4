"""Routes that generate nothing: models, quotes, usage, state, the API's description."""
