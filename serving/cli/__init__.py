"""The `serving` command, with one file per subcommand."""
