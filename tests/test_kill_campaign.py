"""A small campaign of kills, signals, full disks and lost rights at random moments."""

import pytest

from kill_campaign import ALL_SERIES, Series, run_campaign


@pytest.mark.slow
@pytest.mark.parametrize("series", ALL_SERIES, ids=str)
def test_runs_disturbed_at_random_moments_end_bit_exactly(series: Series) -> None:
    report = run_campaign({"kill": 5, "term": 1, "full": 1, "closed": 1}, 0, [series])
    assert sum(report.happened.values()) - report.happened["late"] >= 7
    assert not report.faults, "\n".join(report.faults)
