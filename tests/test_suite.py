"""The tests themselves, divided among processes."""

import pytest


@pytest.mark.ray
def test_what_starts_a_ray_keeps_to_one_process(request: pytest.FixtureRequest) -> None:
    check(request, "ray")


def test_a_file_keeps_to_one_process(request: pytest.FixtureRequest) -> None:
    check(request, "tests/test_suite.py")


def check(request: pytest.FixtureRequest, group: str) -> None:
    """See that pytest-xdist has read the group: where it has not, fixtures are made twice and Rays run side by side."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("tests are not divided by --dist loadgroup")
    assert request.node.nodeid.endswith(f"@{group}")
