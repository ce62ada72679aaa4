"""What the inspector's page says when a worker dies, brokers stand still, the store is away, or the inspector ends."""

from collections.abc import Callable, Iterator

import pytest
from browser import Inspector, Tab, chromium, why_no_browser
from kafka_broker import KafkaBroker
from pipeline import Pipeline
from playwright.sync_api import Browser
from redis_server import RedisServer
from scraping import ANY_PORT, Scraped

from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder

FINE = "document.querySelector('#troubles').hidden && document.querySelector('#link').textContent === 'live'"


@pytest.fixture(scope="module")
def kafka(own_kafka: KafkaBroker) -> KafkaBroker:
    """One that may be paused."""
    return own_kafka


@pytest.fixture
def browser() -> Iterator[Browser]:
    if reason := why_no_browser():
        pytest.skip(reason)
    with chromium() as made:
        yield made


def troubles_say(text: str) -> str:
    return f"document.querySelector('#troubles').innerText.includes({text!r})"


@pytest.mark.slow
def test_the_truth_is_on_the_screen(
    kafka: KafkaBroker,
    redis: RedisServer,
    browser: Browser,
    films: Dataset,
    make_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = make_pipeline(kv_url=redis.url, http=ANY_PORT, delivery_timeout_s=600)
    pipeline.start()
    pipeline.until_ready()
    with Feeder(kafka.bootstrap, pipeline.topics) as feeder:
        feeder.send(films.events[:2_000])
    pipeline.until_committed()
    address = Scraped(pipeline).address
    with Inspector(pipeline, [address]) as inspector:
        tab = Tab(browser, inspector.url)
        page = tab.open()
        tab.until(FINE, "all is well")

        pipeline.kill()
        tab.until(troubles_say(f"worker {address} does not answer (Connection refused)"), "the worker is gone")
        tab.until(troubles_say("4 of 4 partitions are stale"), "nobody keeps the vectors fresh")
        assert page.locator(".tile.stale").count() >= 4
        assert page.locator(".tile dd").first.inner_text() == "\u2013"  # no rate is made up
        page.goto(f"{inspector.url}#user/{films.events[0].user_id}")  # what is stored can be looked at all the same
        tab.until("document.querySelector('section[aria-label=History] tbody tr')", "a history")
        page.goto(f"{inspector.url}#now")
        pipeline.start(UEMB_HTTP=address)
        pipeline.until_ready()
        tab.until(FINE, "all is well again")

        other = Inspector(pipeline, [address])
        other.ask("/api/about")
        kafka.pause()
        other.close()  # in order, though brokers are waited for
        tab.until(troubles_say("control topics can't be read: the brokers do not answer"), "the brokers are silent")
        tab.until(troubles_say("partitions are stale"), "a worker that hears nothing vouches for nothing")
        kafka.resume()
        tab.until(FINE, "all is well again")

        redis.kill()
        tab.until(troubles_say("the store does not answer"), "the store is gone")
        page.goto(f"{inspector.url}#user/{films.events[1].user_id}")
        tab.until_shown("The store can't be read; what follows is made from the history")
        redis.start()  # empty: its owner fills it again
        tab.until(FINE, "all is well again")
        page.goto(f"{inspector.url}#now")

        inspector.process.kill()
        tab.until("document.querySelector('#link').textContent === 'the inspector does not answer'", "it has ended")
        tab.until(troubles_say("what is shown is old"), "what is shown is old")
        inspector.process.wait(60)
        tab.close()
