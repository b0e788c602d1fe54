from pathlib import Path

import torch

import moeify
from moeify.store import verify_folder

FORMAT_1 = Path(__file__).parent / "data" / "split_format_1"
"""As the first version wrote it: sites of unequal width, and category b without an expert of its own."""


def test_folders_of_format_1_stay_readable() -> None:
    verify_folder(FORMAT_1)
    split = moeify.load_split(FORMAT_1)
    assert split.categories == ("a", "b", "c")
    assert split.partition.widths == {"encoder.hidden": (2, 1, 1, 0, 1), "decoder.hidden": (1, 0, 2, 0, 2)}
    images = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        outputs = split(images, torch.tensor([2, 0, 1]))
    wanted = [[3.3515625, 2.734375, 3.3359375], [-14.1953125, 10.78125, 1.02734375], [2.4453125, -2.28125, 4.03125]]
    torch.testing.assert_close(outputs, torch.tensor(wanted))
