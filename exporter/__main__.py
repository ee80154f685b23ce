"""`python -m exporter` is the `cierzo` command."""

from exporter.cli import cli

if __name__ == "__main__":
    cli(prog_name="cierzo")
