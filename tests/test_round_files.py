import json
from pathlib import Path

import numpy as np
import pytest
from fake_runs import CATEGORIES, NODES, fake_run, leave_rounds
from safetensors.numpy import save_file

from pipelines.round_files import attribution_file, read_attribution, read_map, read_ownership
from pipelines.runs import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = fake_run(tmp_path)
    leave_rounds(folder, sites=2, units=100)
    return folder


def test_a_map_has_its_columns_as_the_leaves_stand(folder: RunFolder) -> None:
    found = read_map(folder, 1)
    tables, categories, score = read_attribution(folder, 1)
    assert (tuple(categories), score, found.score) == (CATEGORIES, "fisher", "fisher")
    assert found.leaves == tuple(NODES[0]["categories"])
    for site, table_UC in tables.items():
        for place, category in enumerate(found.leaves):
            assert np.array_equal(found.tables_UC[site][:, place], table_UC[:, categories.index(category)])
    assert found.ownership == read_ownership(folder, 1)


def test_owners_that_do_not_fit_the_units_are_refused(folder: RunFolder) -> None:
    path = folder.rounds / "1" / "partition.json"
    partition = json.loads(path.read_text())
    partition["owners"]["layers.1.ffn"].pop()
    path.write_text(json.dumps(partition))
    with pytest.raises(ValueError, match=r"site 'layers\.1\.ffn' has 100 units of attribution and owners for 99"):
        read_map(folder, 1)


def test_files_that_are_damaged_are_an_error_in_a_line(folder: RunFolder) -> None:
    path = attribution_file(folder, 1)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"attribution\.safetensors is damaged"):
        read_map(folder, 1)
    save_file({"a": np.zeros((1, 1))}, path, {"score": "fisher"})
    with pytest.raises(ValueError, match="wanted sites and 'categories'"):
        read_map(folder, 1)
