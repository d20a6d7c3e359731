"""The `stillhouse` command; a room is loaded only when its subcommand is called."""
