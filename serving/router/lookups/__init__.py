"""Routes that do not generate: models, quotes, usage, state, the API's description."""
