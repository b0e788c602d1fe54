"""What is known of GPUs by name, to foresee how long a run takes on them. From data sheets, without sparsity."""

import re
from dataclasses import dataclass

UTILIZATION = 0.4
"""Share of the peak that training of a large transformer is commonly seen to reach."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    memory: float
    """Bytes."""
    half: float
    """Peak operations a second of bfloat16 matrix products."""
    single: float
    """The same of float32, without TF32."""


GPUS = {
    "A10": Gpu(24e9, 125e12, 31.2e12),
    "A100-40GB": Gpu(40e9, 312e12, 19.5e12),
    "A100": Gpu(80e9, 312e12, 19.5e12),
    "L4": Gpu(24e9, 121e12, 30.3e12),
    "L40S": Gpu(48e9, 362e12, 91.6e12),
    "H100": Gpu(80e9, 989e12, 67e12),
    "H200": Gpu(141e9, 989e12, 67e12),
}


def asked(text: str) -> tuple[int, str, Gpu]:
    """Return how many of which GPU: ``8xH100``, or ``H100`` for one; ValueError, one line, for anything else."""
    found = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*([\w-]+)", text.strip(), flags=re.ASCII)
    names = {name.lower(): name for name in GPUS}
    if not found or found[2].lower() not in names or found[1] == "0":
        raise ValueError(f"--gpus: got {text!r}, wanted a number and a GPU such as 8xH100; known: {', '.join(GPUS)}")
    name = names[found[2].lower()]
    return int(found[1] or 1), name, GPUS[name]
