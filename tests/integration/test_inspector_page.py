"""The inspector's page in a real browser, against a worker on a real Kafka that has films to work on."""

import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Inspector, Tab, chromium, why_no_browser
from confluent_kafka import Producer
from kafka_broker import KafkaBroker
from kv_entries import eventually
from npm_packages import why_no_node
from pipeline import Pipeline, delete_topics, event_json, expected
from playwright.sync_api import Browser, Page
from scraping import ANY_PORT, Scraped

from stream.embedding import user_embed_mix
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace

EVENTS = 20_000
#: Ids that are valid, and want to be something else.
HOSTILE = [
    '<img src=x onerror="window.pwned=1">',
    "[/x][red]boo[/red]",
    "\u202edetsrever\u202c",
    "a" * 256,
    "<script>window.pwned=1</script>",
    "zero\u200bwidth\u2066isolate",
    "'); window.pwned=1; ('",
    "💯" * 60,
    "../../etc/passwd?x=1#y%00",
]
HOSTILE_TITLES = {"50": '<img src=x onerror="window.pwned=1"> \u202e\x1b[31m', "181": "t" * 150}
BAD = [b"{", b'{"user_id": "' + b"x" * 9000, b"\xff\xfe\x00<b>", b'"<img src=x onerror=window.pwned=1>"']


class Stage:
    """A pipeline that has worked on the films, and an inspector that looks at it."""

    def __init__(self, pipeline: Pipeline, inspector: Inspector, films: Dataset, space: ItemSpace) -> None:
        self.pipeline = pipeline
        self.inspector = inspector
        self.events = films.events[:EVENTS]
        self.space = space
        rows = [(row.user_id, row.item_id, row.type, row.ts_ms) for row in self.events]
        self.expected = expected(rows, space)
        lengths = {user: len([1 for row in rows if row[0] == user]) for user in {row[0] for row in rows}}
        self.user = max(lengths, key=lambda user: lengths[user])

    def history(self, user: str) -> list[tuple[int, str, str]]:
        """What is retained of a user, oldest first."""
        rows = {(row.ts_ms, row.item_id.encode(), row.type) for row in self.events if row.user_id == user}
        return [(ts, item.decode(), kind) for ts, item, kind in sorted(rows)[-100:]]

    def vector(self, history: list[tuple[int, str, str]]) -> np.ndarray:
        """The public formula on a history."""
        rows = self.space.rows([item for _, item, _ in history])
        return user_embed_mix(rows[rows >= 0], self.space.history_vectors)

    def nearest(self, vector: np.ndarray) -> list[str]:
        rows = np.argsort(-(self.space.vectors @ vector), kind="stable")[:10]
        return [self.space.ids[row].decode() for row in rows.tolist()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if reason := why_no_browser():
        pytest.skip(reason)
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def stage(
    kafka: KafkaBroker, films: Dataset, item_folder: Path, space: ItemSpace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("inspected")
    pipeline = Pipeline(kafka.bootstrap, f"t{os.urandom(5).hex()}", folder, item_folder, http=ANY_PORT)
    try:
        pipeline.start()
        pipeline.until_ready()
        with Feeder(kafka.bootstrap, pipeline.topics) as feeder:
            feeder.send(films.events[:EVENTS])
        producer = Producer({"bootstrap.servers": kafka.bootstrap, "partitioner": "murmur2_random"})
        for user in HOSTILE:
            for n, item in enumerate(("50", "181", "1", user)):
                producer.produce(pipeline.topics["view"], event_json(user, item, "view", 10**12 + n), user.encode())
        for value in BAD:
            producer.produce(pipeline.topics["like"], value, b"7")
        assert producer.flush(60) == 0
        pipeline.until_committed()
        titles = folder / "titles.tsv"
        named = {**films.titles, **HOSTILE_TITLES}
        titles.write_text("item_id\ttitle\n" + "".join(f"{item}\t{title}\n" for item, title in named.items()))
        with Inspector(pipeline, [Scraped(pipeline).address], "--titles", str(titles)) as inspector:
            yield Stage(pipeline, inspector, films, space)
    finally:
        pipeline.close()
        delete_topics(kafka.bootstrap, pipeline.app_id)


@pytest.fixture
def tab(stage: Stage, browser: Browser) -> Iterator[Tab]:
    made = Tab(browser, stage.inspector.url, viewport={"width": 1280, "height": 900})
    yield made
    made.close()


def test_now_agrees_with_the_metrics(stage: Stage, tab: Tab) -> None:
    page = tab.open()
    tab.until("document.querySelectorAll('.uplot canvas').length === 4", "charts")
    tab.until_shown("127.0.0.1")
    tab.until("document.querySelector('#link').textContent === 'live'", "live")
    tab.until("document.querySelector('#troubles').hidden", "no troubles")
    owned, epochs = Scraped(stage.pipeline).samples("uemb_partition_owned", "uemb_partition_epoch")
    assert set(owned.values()) == {1}
    rows = page.locator("section[aria-label=Partitions] tbody tr")
    assert rows.count() == len(owned)
    told = sorted(tuple(rows.nth(n).locator("td").all_inner_texts()[i] for i in (0, 2)) for n in range(rows.count()))
    assert told == sorted((partition, f"{epoch:.0f}") for (partition,), epoch in epochs.items())
    tiles = page.locator(".tile").all_inner_texts()
    letters = next(text for text in tiles if text.startswith("Dead letters"))
    assert letters.split("\n")[-1] == str(len(BAD)) == f"{Scraped(stage.pipeline).value('uemb_dead_letters_total'):.0f}"
    assert stage.space.version in page.locator("#serving").inner_text()
    # what comes shows, and how soon it could be read
    with Feeder(stage.pipeline.bootstrap, stage.pipeline.topics) as feeder:
        feeder.send(stage.events[-500:])  # once more, which changes nothing
    tab.until("!/^[0\\u2013]$/.test(document.querySelector('.tile dd').textContent)", "events per second")
    tab.until("/ (ms|s)$/.test(document.querySelectorAll('.tile dd')[2].textContent)", "p99")
    stage.pipeline.until_committed()


def test_a_user_is_explained_by_the_public_formulas(stage: Stage, tab: Tab) -> None:
    page = tab.open()
    page.get_by_role("link", name="User", exact=True).click()
    page.get_by_label("user id").fill(stage.user)
    page.get_by_role("button", name="Look up").click()
    tab.until("document.querySelector('section[aria-label=History] tbody tr')", "a history")
    history = stage.history(stage.user)
    assert page.locator("section[aria-label=History] tbody tr").count() == len(history)
    assert "is what the history makes" in page.locator("main").inner_text()
    shown = page.locator('ol[data-nearest="now"] li').evaluate_all("all => all.map((one) => one.dataset.item)")
    assert shown == stage.nearest(stage.vector(history))
    before = page.locator('ol[data-nearest="before the last event"] li')
    assert before.evaluate_all("all => all.map((one) => one.dataset.item)") == stage.nearest(stage.vector(history[:-1]))
    answer = stage.inspector.ask("/api/user", user=stage.user)
    explained = answer["explained"]
    want = stage.expected[stage.user]
    np.testing.assert_allclose(explained["vector"], want["vector"], atol=1e-6)
    np.testing.assert_allclose(explained["vector"], stage.vector(history), atol=1e-6)
    assert answer["agrees"]
    assert answer["stored"]["history_len"] == want["history_len"]
    assert [(row["ts_ms"], row["item"], row["type"]) for row in explained["history"]] == history
    for part in range(2):
        assert abs(sum(row["shares"][part] for row in explained["history"]) - 1) < 1e-9
    assert abs(sum(row["pull"] for row in explained["history"]) - 1) < 1e-9
    for n in (0, len(history) // 2, len(history) - 1):
        row = explained["history"][n]
        if row["known"]:
            apart = stage.vector(history[:n] + history[n + 1 :]).astype("f8") @ stage.vector(history)
            assert abs(row["turn"] - np.degrees(np.arccos(min(1.0, apart)))) < 0.05


def test_what_if_is_what_the_formula_makes_of_it(stage: Stage, tab: Tab) -> None:
    length = stage.pipeline.length(stage.pipeline.changelog)
    history = stage.history(stage.user)
    page = tab.open(f"user/{stage.user}")
    page.locator("#if-item").fill("50")
    page.locator("#if-type").select_option("like")
    page.locator("#if-item").press("Enter")
    tab.until("document.querySelector('tr.new')", "the supposed event")
    page.locator("section[aria-label=History] tbody tr").nth(1).get_by_role("checkbox").uncheck()
    tab.until("document.querySelector('tr.out')", "the event that is taken away")
    supposed = [*history[:-1], (history[-1][0] + 1, "50", "like")]
    shown = page.locator('ol[data-nearest="supposed"] li')
    assert shown.evaluate_all("all => all.map((one) => one.dataset.item)") == stage.nearest(stage.vector(supposed))
    key = stage.inspector.ask("/api/user", user=stage.user)["explained"]["history"][-1]["key"]
    added = {"item": "50", "type": "like", "ts_ms": history[-1][0] + 1}
    answer = stage.inspector.ask("/api/user", user=stage.user, without=[key], add=[added])["supposed"]
    np.testing.assert_allclose(answer["vector"], stage.vector(supposed), atol=1e-6)
    cosine = float(stage.vector(supposed).astype("f8") @ stage.vector(history))
    assert abs(answer["cosine"] - cosine) < 1e-6
    page.get_by_role("button", name="As it is").click()
    tab.until("!document.querySelector('tr.new, tr.out')", "the history as it is")
    assert stage.pipeline.length(stage.pipeline.changelog) == length  # nothing was written


def test_users_who_are_not_there_are_told_in_words(stage: Stage, tab: Tab) -> None:
    page = tab.open("user/nobody-of-that-name")
    tab.until_shown("No event of this user was ever kept")
    page.get_by_label("user id").fill("x" * 257)
    page.get_by_role("button", name="Look up").click()
    tab.until_shown("256")  # the bound, in the error


def test_hostile_ids_and_titles_are_only_text(stage: Stage, tab: Tab) -> None:
    page = tab.open()
    for user in HOSTILE:
        page.get_by_role("link", name="User", exact=True).click()
        page.get_by_label("user id").fill(user)
        page.get_by_role("button", name="Look up").click()
        escaped = re.sub("[\u200b\u202c\u202e\u2066]", lambda c: f"\\u{ord(c[0]):04x}", user)
        tab.until(
            "document.querySelector('section h2 .foreign')?.textContent === " + json.dumps(escaped)
            + " && document.querySelectorAll('section[aria-label=History] tbody tr').length === 4",
            user,
        )  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), user
        assert "\u202e" not in page.locator("main").inner_text()
    for view in ("map", "letters", "versions", "now"):
        tab.open(view)
        tab.until("document.querySelector('main section')", view)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, main script").count() == 0


def test_dead_letters_are_counted_and_payload_is_shown_when_asked_for(stage: Stage, tab: Tab) -> None:
    page = tab.open("letters")
    tab.until("document.querySelector('.uplot canvas')", "a chart")
    lines = stage.pipeline.uemb("dlq", "list", "--json").splitlines()
    listed = [json.loads(line) for line in lines if line.startswith("{")]
    kinds = {(row["reason"], row["topic"]): row["count"] for row in listed}
    shown = page.locator("main section h2").all_inner_texts()
    for (reason, topic), count in kinds.items():
        assert f"{reason} · {topic} · {count}" in shown
    assert "onerror" not in page.locator("main").inner_text()
    for summary in page.locator("main summary").all():
        summary.click()
    while page.get_by_role("button", name="show the payload").count():
        left = page.get_by_role("button", name="show the payload").count()
        page.get_by_role("button", name="show the payload").first.click()
        eventually(lambda left=left: page.get_by_role("button", name="show the payload").count() < left)
    tab.until_shown("onerror=window.pwned=1")
    tab.until_shown("the first of 9,013 bytes")
    assert page.evaluate("window.pwned") is None
    command = page.locator("code", has_text="--reason").first.inner_text()
    said = stage.pipeline.uemb(*shlex.split(command)[1:], "--dry-run")
    assert "would be sent" in said


def test_the_map_is_of_the_vectors_in_the_store(stage: Stage, tab: Tab) -> None:
    page = tab.open("map")
    tab.until_shown("users who were active of late")
    crowd = stage.inspector.ask("/api/map")
    own = [point for point in crowd["points"] if point["user"] in stage.expected and point["status"] == "ok"]
    assert len(own) > 50
    vectors = np.stack([stage.expected[point["user"]]["vector"] for point in own]).astype("f8")
    places = np.array([point["at"] for point in own])
    # a projection keeps differences along its axes: those of the places are those of the vectors, seen from there
    axes = np.linalg.lstsq(vectors - vectors.mean(axis=0), places - places.mean(axis=0), rcond=None)[0]
    seen = (vectors - vectors.mean(axis=0)) @ axes
    assert len(own) > 2 * stage.space.dim  # of fewer, anything could be such a picture
    np.testing.assert_allclose(axes.T @ axes, np.eye(2), atol=0.05)
    np.testing.assert_allclose(seen, places - places.mean(axis=0), atol=1e-3)
    assert 0 < crowd["axes"][1]["explained"] <= crowd["axes"][0]["explained"] < 1
    cosines = vectors @ stage.space.fallback
    assert abs(crowd["collapse"]["median"] - np.median(cosines)) < 0.02
    assert sum(crowd["collapse"]["counts"]) == crowd["users"] - crowd["fallbacks"]
    tab.until("document.querySelectorAll('[data-collapsed=false]').length === 1", "what the map says of collapse")
    page.locator("section[aria-label=Users] tbody a").first.click()
    tab.until("document.querySelector('section[aria-label=History] tbody tr')", "the user who was clicked")


def screenshots(otherwise: Path) -> Path:
    """Where pictures go: to a folder that is named, to be looked at."""
    folder = Path(os.environ.get("UEMB_TEST_SCREENSHOTS") or otherwise)
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("view", "theme"),
    [
        ("now", "dark"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in itertools.product(("now", "user", "versions", "letters", "map"), ("light", "dark"))
            if one != ("now", "dark")
        ),
    ],
)
def test_nobody_is_shut_out(stage: Stage, browser: Browser, view: str, theme: str, tmp_path: Path) -> None:
    """By what axe-core finds, in either theme, on a screen and on a phone; pictures are kept where that is wanted."""
    if reason := why_no_node():
        pytest.skip(reason)
    tab = Tab(browser, stage.inspector.url, viewport={"width": 1280, "height": 900}, color_scheme=theme)
    page = tab.open(f"user/{stage.user}" if view == "user" else view)
    tab.until("document.querySelector('main section')", view)
    if view == "user":
        tab.until("document.querySelector('section[aria-label=History] tbody tr')", "a history")
    if view == "map":
        tab.until_shown("users who were active of late,")
    tab.until("document.querySelector('#link').textContent === 'live'", "live")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert tab.barriers() == []
    folder = screenshots(tmp_path)
    page.screenshot(path=folder / f"{view}-{theme}.png")
    page.set_viewport_size({"width": 360, "height": 740})
    tab.until("document.documentElement.scrollWidth <= 360", "it is as wide as a phone")
    page.screenshot(path=folder / f"{view}-{theme}-phone.png")
    assert tab.barriers() == []
    tab.close()


def test_what_is_drawn_again_keeps_its_place(stage: Stage, tab: Tab) -> None:
    page = tab.open()
    tab.until("document.querySelector('section[aria-label=Partitions] tbody tr')", "numbers")
    page.set_viewport_size({"width": 360, "height": 740})
    scroll = "document.querySelector('section[aria-label=Partitions] .scroll')"
    page.evaluate(f"window.table = {scroll}; table.scrollLeft = 60; table.focus()")
    page.evaluate("window.beats = 0; new MutationObserver(() => beats++).observe(document.querySelector('main'), "
                  "{subtree: true, childList: true, characterData: true})")  # fmt: skip
    with Feeder(stage.pipeline.bootstrap, stage.pipeline.topics) as feeder:
        feeder.send(stage.events[-200:])  # once more, for there to be news
    tab.until("beats > 2", "it is drawn again")
    assert page.evaluate(f"{scroll} === table && table.scrollLeft === 60 && document.activeElement === table")
    # the way past the links does not lead to another view
    page.goto(f"{stage.inspector.url}#user/{stage.user}")
    tab.until("document.querySelector('section[aria-label=History] tbody tr')", "a history")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id === 'main' && !!document.querySelector('#user-id')")
    # who takes interactions away one by one stays where they are
    box = page.locator("section[aria-label=History] tbody input").nth(3)
    box.focus()
    page.keyboard.press("Space")
    tab.until("document.querySelector('tr.out')", "the event that is taken away")
    assert page.evaluate("document.activeElement.matches('tr.out input')")
    # and what was supposed of one user is not supposed of another
    page.get_by_role("link", name="Versions").click()
    page.locator("#both-user").fill(HOSTILE[0])
    page.locator("#both-user").press("Enter")
    page.get_by_role("link", name="User", exact=True).click()
    tab.until("document.querySelectorAll('section[aria-label=History] tbody tr').length === 4", "the other user")
    assert page.locator("#user-id").input_value() == HOSTILE[0]
    assert page.locator("tr.out").count() == 0


@pytest.mark.slow
def test_the_keyboard_is_enough(stage: Stage, tab: Tab) -> None:
    page = tab.open()
    tab.until("document.querySelector('#link').textContent === 'live'", "live")

    def tab_to(what: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement?.matches({json.dumps(what)})"):
                return
        raise AssertionError(f"no way to {what}")

    tab_to('a[data-view="user"]')
    page.keyboard.press("Enter")
    tab.until("document.querySelector('#user-id')", "the view")
    tab_to("#user-id")
    page.keyboard.type(stage.user)
    page.keyboard.press("Enter")
    tab.until("document.querySelector('section[aria-label=History] tbody tr')", "a history")
    tab_to("#if-item")
    page.keyboard.type("50")
    page.keyboard.press("Enter")
    tab.until("document.querySelector('tr.new')", "the supposed event")
    tab_to("section[aria-label=History] tr:not(.new) input[type=checkbox]")
    page.keyboard.press("Space")
    tab.until("document.querySelector('tr.out')", "the event that is taken away")


@pytest.mark.slow
def test_many_tabs_share_one_stream(stage: Stage, tab: Tab) -> None:
    live = "document.querySelector('#link').textContent === 'live'"

    def until_live(page: Page) -> None:
        eventually(lambda: page.evaluate(live))

    tab.open()
    tab.until(live, "live")
    memory = stage.inspector.memory_mb()
    pages = [tab.context.new_page() for _ in range(99)]
    for page in pages:
        page.goto(stage.inspector.url, wait_until="commit")
    for page in pages[::20]:
        until_live(page)
    assert stage.inspector.sockets() <= 8  # of one stream, and what a browser keeps for questions
    assert stage.inspector.memory_mb() < memory + 50
    tab.page.close()  # who had the stream; another page takes it
    for page in pages[::20]:
        page.evaluate("document.querySelector('#link').textContent = ''")
        until_live(page)


def test_what_is_read_is_not_logged(stage: Stage) -> None:
    for user in HOSTILE:
        added = {"item": user, "type": "view", "ts_ms": 1}
        assert stage.inspector.ask("/api/user", user=user, add=[added])["supposed"]["outcomes"] == ["applied"]
    for kind in stage.inspector.ask("/api/letters")["kinds"]:
        for fact in kind["newest"]:
            assert stage.inspector.ask(f"/api/letter?place={fact['place']}")["value"] is not None
    said = stage.inspector.said()
    for text in (*HOSTILE, *HOSTILE_TITLES.values(), "onerror", "xxxx"):
        assert text not in said


def test_a_prepared_version_beside_the_served_one(stage: Stage, tab: Tab, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    kept = [row for row in range(len(stage.space)) if row % 7]
    rows = stage.space.history_vectors[kept]
    other = ItemSpace.save(
        tmp_path / "v2", "films_v2", [stage.space.ids[row].decode() for row in kept],
        rows + rng.normal(scale=0.2 * np.abs(rows).mean(), size=rows.shape),
    )  # fmt: skip
    stage.pipeline.uemb("items", "publish", str(tmp_path / "v2"), "--wait")
    page = tab.open("versions")
    tab.until("document.querySelector('#other-pair option')", "the other version")
    page.locator("#both-user").fill(stage.user)
    page.get_by_role("button", name="Compare").click()
    # what was true a moment before its last partition was covered is said anew
    tab.until(
        "document.querySelector('[data-overlap]') && document.querySelectorAll('.checks li').length > 5"
        " && !document.querySelector('.checks li[data-verdict=no]')",
        "both",
    )
    history = stage.history(stage.user)
    there = other.rows([item for _, item, _ in history])
    vector = user_embed_mix(there[there >= 0], other.history_vectors)
    nearest = [other.ids[row].decode() for row in np.argsort(-(other.vectors @ vector), kind="stable")[:10].tolist()]
    shared = set(nearest) & set(stage.nearest(stage.vector(history)))
    assert float(page.locator("[data-overlap]").get_attribute("data-overlap") or -1) == len(shared) / 10
    lists = page.locator("section[aria-label='One user in both'] ol")
    found = [lists.nth(n).locator("li").evaluate_all("all => all.map((one) => one.dataset.item)") for n in (0, 1)]
    assert found == [stage.nearest(stage.vector(history)), nearest]
    checks = page.locator(".checks li")
    verdicts = checks.evaluate_all("all => all.map((one) => [one.dataset.verdict, one.innerText])")
    assert "no" not in {verdict for verdict, _ in verdicts}, verdicts
    assert [verdict for verdict, text in verdicts if "unknown" in text] == ["look"]
    assert tab.barriers() == []
    page.screenshot(path=screenshots(tmp_path) / "versions-compared.png", full_page=True)
    command = page.locator("code", has_text="activate").inner_text()
    assert command == "uemb items activate films_v2"
    stage.pipeline.uemb(*shlex.split(command)[1:])
    tab.until("document.querySelector('#serving').innerText.includes('films_v2')", "the one that is served now")
    stage.pipeline.uemb("items", "rollback")
    tab.until("document.querySelector('#serving').innerText.includes('films_v1')", "the one that is served again")
