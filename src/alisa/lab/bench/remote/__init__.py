"""What also runs in the environments of other engines: `measured`, found by its folder. Standard library only."""
