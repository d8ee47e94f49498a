"""The `alisa` command: one file per subcommand, and the parts that several of them share."""
