"""Exactly once through cut connections, killed servers and crowds of writers. `-s` shows the figures."""

from __future__ import annotations

import logging

import pytest

from tests.torture import campaigns

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Each fault is logged; thousands of them are no news here."""
    for name in ("statbuffer", "sqlalchemy.pool"):
        caplog.set_level(logging.CRITICAL + 1, logger=name)


def test_connections_cut_at_any_point_lose_and_double_nothing(server):
    campaigns.cut_campaign(server, "cut_some", cuts=150, at_commit=40, increments=10_000)


def test_a_server_killed_under_load_loses_and_doubles_nothing(server):
    campaigns.kill_campaign(server, "kill_some", rounds=4)


def test_writers_in_different_orders_do_not_disturb_each_other(server):
    campaigns.writers_campaign(server, "write_some", writers=4, seconds=3)


@pytest.mark.torture
def test_two_thousand_cuts(server):
    campaigns.cut_campaign(server, "cut_many", cuts=2_000, at_commit=300, increments=200_000)


@pytest.mark.torture
def test_twenty_restarts(server):
    campaigns.kill_campaign(server, "kill_many", rounds=20)


@pytest.mark.torture
def test_sixteen_writers_for_five_minutes(server):
    campaigns.writers_campaign(server, "write_many", writers=16, seconds=300)
