"""``python -m pipelines`` is ``moeify``."""

from pipelines.cli import main

if __name__ == "__main__":
    main(prog_name="moeify")
