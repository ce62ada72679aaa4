"""What may be committed: marks never go backward, and those of a topic that is misproduced as a whole are held back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import TopicMismatch
from stream.kafka.delivery import PROBATION_RECORDS, DurableMarks

TOPICS = ("views", "likes")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), st.sampled_from(TOPICS), st.integers(0, 2), st.integers(1, 50)),
        st.tuples(st.just("saw"), st.sampled_from(TOPICS), st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("forget"), st.sampled_from(TOPICS), st.integers(0, 2), st.just(0)),
    )
)


@given(STEPS)
def test_what_is_due_is_the_highest_mark_of_each_topic_that_is_not_in_doubt(steps):
    marks, highest, right, wrong = DurableMarks(), {}, set(), set()
    for what, topic, a, b in steps:
        if what == "mark":
            marks.mark(topic, a, b)
            highest[topic, a] = max(b, highest.get((topic, a), 0))
        elif what == "saw":
            marks.saw(topic, a, b)
            right |= {topic} if a else set()
            wrong |= {topic} if b else set()
        else:
            marks.forget([(topic, a)])
            highest.pop((topic, a), None)
        in_doubt = wrong - right
        assert marks.due() == {place: at for place, at in highest.items() if place[0] not in in_doubt}


def test_a_topic_whose_first_records_are_all_misplaced_is_refused() -> None:
    marks = DurableMarks()
    marks.mark("views", 0, 7)
    marks.saw("views", 0, PROBATION_RECORDS - 1)
    assert marks.due() == {}
    with pytest.raises(TopicMismatch, match="murmur2"):
        marks.saw("views", 0, 1)


def test_one_record_in_its_place_ends_the_doubt_for_good() -> None:
    marks = DurableMarks()
    marks.mark("views", 0, 7)
    marks.saw("views", 0, 3)
    marks.saw("views", 1, 0)
    assert marks.due() == {("views", 0): 7}
    marks.saw("views", 0, 2 * PROBATION_RECORDS)
    assert marks.due() == {("views", 0): 7}
