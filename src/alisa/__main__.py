"""`python -m alisa`, the same as the `alisa` command."""

from alisa.cli.main import run

if __name__ == "__main__":
    run()
