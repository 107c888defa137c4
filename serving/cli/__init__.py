"""The `serving` command, one file a verb; the only place where the parts are put together."""
