"""The energy meter on counters laid out as Linux's."""

from pathlib import Path

import pytest

from fkd_ssl.energy import Meter


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    for name, count in (("intel-rapl:0", 900), ("intel-rapl:1", 100), ("intel-rapl:0:0", 500)):
        zone = tmp_path / name
        zone.mkdir()
        (zone / "energy_uj").write_text(f"{count}\n")
        (zone / "max_energy_range_uj").write_text("1000\n")
    return tmp_path


def test_packages_are_added_and_their_parts_are_not_counted_twice(powercap: Path) -> None:
    meter = Meter(powercap)
    assert meter.read() == 0
    (powercap / "intel-rapl:0/energy_uj").write_text("950")
    (powercap / "intel-rapl:1/energy_uj").write_text("120")
    (powercap / "intel-rapl:0:0/energy_uj").write_text("900")
    assert meter.read() == pytest.approx(70e-6)


def test_a_counter_that_starts_again(powercap: Path) -> None:
    meter = Meter(powercap)
    (powercap / "intel-rapl:0/energy_uj").write_text("50")
    assert meter.read() == pytest.approx(150e-6)
    (powercap / "intel-rapl:0/energy_uj").write_text("60")
    assert meter.read() == pytest.approx(160e-6)


def test_where_nothing_tells(tmp_path: Path) -> None:
    assert Meter(tmp_path).read() is None
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("what?")
    assert Meter(tmp_path).read() is None
