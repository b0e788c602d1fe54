"""``python -m pipelines.answer MARK ARGUMENTS``: a command of ``moeify`` as a Ray job, for ``pipelines.jobs.Jobs.ask``.

A job's log begins with Ray's own lines; the mark tells where the answer begins.
"""

import sys

if __name__ == "__main__":
    from pipelines.cli import main

    sys.stdout.write(f"{sys.argv[1]}\n")
    sys.stdout.flush()
    main(sys.argv[2:], prog_name="moeify")
