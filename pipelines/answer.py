"""``python -m pipelines.answer MARK ARGUMENTS``: a command of ``moeify`` as a Ray job, for ``ray_jobs.Jobs.ask``.

A job's log holds both of its streams, after Ray's own lines. The mark tells where the answer begins; what goes to
stderr is told where the command fails, and dropped where it does not.
"""

import io
import sys
from contextlib import redirect_stderr


def answer(mark: str, arguments: list[str]) -> int:
    """Print the mark and what the command says; return its exit code."""
    from pipelines.cli import main

    sys.stdout.write(f"{mark}\n")
    aside = io.StringIO()
    code = 1
    try:
        with redirect_stderr(aside):
            main(arguments, prog_name="moeify", standalone_mode=True)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if code:
            sys.stdout.write(aside.getvalue())
    return code


if __name__ == "__main__":
    raise SystemExit(answer(sys.argv[1], sys.argv[2:]))
