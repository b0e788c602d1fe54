"""``python -m pipelines`` is ``moeify``."""

from pipelines.cli import entry

if __name__ == "__main__":
    entry()
