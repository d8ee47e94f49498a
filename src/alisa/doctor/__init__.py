"""What this installation can do here: facts gathered from the machine, and what follows from them for a user."""
