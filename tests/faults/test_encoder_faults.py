"""Every kind of encoder on one stream, under kills, lost disks and a rebuild: each vector is that of its formula."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_models import linear
from oracle import Oracle, check_record
from pipeline import Pipeline, erase, feeding, seed

from stream.core.encoders import MadeFor, TimeMixEncoder, VersionedEncoder
from stream.core.records import decode
from stream.encoders.folder import load_encoder, save_encoder
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace
from stream.learning.build import build_space

pytestmark = [pytest.mark.kafka, pytest.mark.faults]
MIX = "mix-edd8f311"
HALF_LIVES = (1.0, 0.05)
BY_TIME = VersionedEncoder(TimeMixEncoder(0.5, *HALF_LIVES), 100).version
EVENTS = 12_000


@pytest.mark.slow
def test_encoders_and_both_kinds_of_items_under_kills_and_a_rebuild(
    films: Dataset, space: ItemSpace, make_workers: Callable[..., list[Pipeline]], tmp_path: Path
) -> None:
    """Two-sided items and one-table ones; mixture, average, weights by time, and one learned for each version."""
    rng, rows = random.Random(seed()), films.events[:EVENTS]
    one_table = tmp_path / "one-table"
    spaces = [space, build_space(films.events, one_table, "films_v2", "ppmi", dim=32)]
    learned = []
    for items in spaces:
        folder = tmp_path / f"learned-{items.version}"
        weights = np.random.default_rng(items.dim).normal(size=(3 * items.dim, items.dim))
        save_encoder(folder, linear(weights), MadeFor(items.version, items.sha256, items.dim))
        learned.append(folder)
    one, two = make_workers(2)
    one.start()
    one.until_ready()
    before = one.epochs()
    two.start()
    one.until_epochs_rise(before)
    one.uemb("items", "publish", str(one_table), "--wait")
    time_params = ("--params", f"alpha_short=0.5,half_life_long_h={HALF_LIVES[0]},half_life_short_h={HALF_LIVES[1]}")
    one.uemb("encoder", "publish", "mix_time", *time_params)
    one.uemb("encoder", "publish", "avg", "--as", "plain")
    with feeding(one, rows, 2_000) as feed:
        one.until(lambda: one.length(one.output) > 4_000, "events flow")
        two.kill()  # at whatever it has covered
        for folder in learned:
            one.uemb("encoder", "publish", str(folder))
        shutil.rmtree(two.state)
        two.start()
        for victim in (one, two):
            seen = one.length(one.changelog)
            one.until(
                lambda seen=seen: one.length(one.changelog) > seen + rng.randrange(200) or feed.dry.is_set(),
                "some more are processed",
            )
            victim.kill()
            victim.start()
    one.until_committed(120)
    gone = rows[-3:]
    erase(one, gone)
    one.until_committed(120)
    names = [VersionedEncoder(load_encoder(folder), 100).version for folder in learned]
    for name in (BY_TIME, "plain", *names):
        one.uemb("encoder", "status", name, "--wait")
    one.uemb("items", "status", "films_v2", "--wait")
    assert "4 partitions rebuilt" in one.uemb("kv", "rebuild")
    users, versions = {row.user_id for row in rows}, [items.version for items in spaces]
    one.check(len(users))
    assert set(one.verified) == {
        *(f"{name}:{version}" for name in (MIX, BY_TIME, "plain") for version in versions),
        *(f"{name}:{version}" for name, version in zip(names, versions, strict=True)),
    }
    # `verify` shares the product's formulas; an oracle that shares nothing, for what is new and on both kinds of items
    oracle = Oracle(100, spaces, alpha_short=0.5, half_lives_h=HALF_LIVES)
    for row in rows:
        oracle.event(row.user_id, row.item_id, row.type, row.ts_ms)
    output, compared = one.last_output(), 0
    for user in sorted(users - {row.user_id for row in gone}):
        for version in versions:
            value = output[f"uemb:{BY_TIME}:{version}:{user}"]
            assert value is not None
            check_record(decode(value), oracle.expected(user, version), (user, version))
            compared += 1
    assert compared >= 2 * (len(users) - 3)
    for worker in (one, two):
        assert worker.stop() == 0
