from __future__ import annotations

import itertools
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.billing.prices import Price
from serving.billing.records import Outcome, TokenCounts
from serving.router.accounting.answer_usage import StreamAnnotator, UsageNotes, annotate_answer

PRICE = Price(input_picodollars=30_000, output_picodollars=100_000)
USAGE = {"prompt_tokens": 1000, "total_tokens": 1500, "completion_tokens": 500}
COST = 0.00008


def annotator_for(*, shows_usage: bool = True) -> StreamAnnotator:
    return StreamAnnotator(UsageNotes(PRICE), shows_usage=shows_usage)


def frame(event: Any) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "c-1", "choices": [{"index": 0, "delta": {"content": text}}], **more}


# A frame as the engine sends it, and as the client gets it.
Frame = tuple[bytes, bytes]

TEXTS = st.text() | st.sampled_from(
    ['"usage":{', '"usage":{}', '\\"usage\\":{"a":1}', 'data: {"usage":{', "\n\n", "\r\n"]
)
COUNTS = st.integers(0, 10**7)


@st.composite
def final_frames(draw: st.DrawFn) -> Frame:
    usage = {"prompt_tokens": draw(COUNTS), "total_tokens": 1, "completion_tokens": draw(COUNTS)}
    event = {"id": draw(TEXTS), "choices": [], "usage": usage}
    nano = (usage["prompt_tokens"] * 30_000 + usage["completion_tokens"] * 100_000 + 500) // 1000
    return frame(event), frame({**event, "usage": {**usage, "estimated_cost": nano / 10**9}})


UNCHANGED = st.one_of(
    TEXTS.map(lambda text: frame(chunk(text))),
    TEXTS.map(lambda text: frame(chunk(text, usage=None))),
    TEXTS.map(lambda text: frame(chunk(text, usage=USAGE))),  # continuous usage: not the last chunk yet
    st.just(b"data: [DONE]\n\n"),
    st.just(b": ping\n\n"),
    st.just(b'event: usage\ndata: {"choices":[]}\n\n'),
).map(lambda same: (same, same))
STREAMS = st.lists(UNCHANGED | final_frames(), max_size=8)


@st.composite
def splits(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(data)])]


@given(st.data(), STREAMS, st.sampled_from([b"", b"data: {", b'data: {"choices":[],"usage":{"prompt_tokens":1}}']))
def test_however_a_stream_is_split_only_its_final_usage_changes(
    data: st.DataObject, frames: list[Frame], unfinished: bytes
) -> None:
    stream = b"".join(sent for sent, _ in frames) + unfinished
    ends = list(itertools.accumulate(len(sent) for sent, _ in frames))
    begin = next((number for number, (sent, shown) in enumerate(frames) if sent != shown), len(frames))
    annotator = annotator_for()
    fed, got = 0, b""
    for piece in data.draw(splits(stream)):
        got += annotator.feed(piece)
        fed += len(piece)
        # Whole frames are out at once, unfinished ones and what comes from the usage on are not.
        num_whole = min(begin, sum(end <= fed for end in ends))
        assert got == b"".join(expected for _, expected in frames[:num_whole])
    assert annotator.flush() == b"".join(expected for _, expected in frames[begin:]) + unfinished
    assert annotator.flush() == b""


@given(st.data(), st.lists(st.sampled_from([b"\n", b"\r\n", b"data: ", b"{", b'"usage":', b"[DONE]", b"\xff"])))
def test_bytes_without_usage_pass_as_they_are(data: st.DataObject, parts: list[bytes]) -> None:
    stream = b"".join(parts).replace(b'"usage":{', b"")
    annotator = annotator_for()
    assert b"".join(annotator.feed(piece) for piece in data.draw(splits(stream))) + annotator.flush() == stream


def test_a_frame_is_not_held_back_for_the_next_one() -> None:
    annotator = annotator_for()
    first, second = frame(chunk("a")), frame(chunk("b"))
    assert annotator.feed(first + second[:10]) == first
    assert annotator.feed(second[10:]) == second


@pytest.mark.parametrize(
    "event", [{"usage": USAGE}, {"choices": [], "usage": USAGE}, {"choices": None, "usage": USAGE}]
)
def test_the_final_frame_carries_the_cost(event: dict[str, Any]) -> None:
    annotator = annotator_for()
    assert annotator.feed(frame(event)) == b"", "who has read it must have all of the answer"
    out = annotator.flush()
    assert json.loads(out.removeprefix(b"data: ")) == {**event, "usage": {**USAGE, "estimated_cost": COST}}
    assert out.endswith(b"}\n\n")


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(
            frame({"choices": [], "note": {"usage": {}}}),
            id="usage of something else",
        ),
        pytest.param(
            b'data: {"choices":[],"usage":{\n\n',
            id="not JSON",
        ),
        pytest.param(
            frame([{"usage": {}}]),
            id="not an object",
        ),
        pytest.param(
            frame(chunk("a", usage={})) + b"\n",
            id="an empty line too many",
        ),
    ],
)
def test_what_is_no_final_usage_passes_as_it_is(stream: bytes) -> None:
    annotator = annotator_for()
    assert annotator.feed(stream) + annotator.flush() == stream


def test_a_whole_answer_carries_the_cost_and_is_otherwise_the_same() -> None:
    answer: dict[str, Any] = {"id": "c-1", "model": "nano", "choices": [{"message": {"content": "tschüß \u2028"}}]}
    answer["usage"] = USAGE
    priced = json.loads(annotate_answer(orjson.dumps(answer), UsageNotes(PRICE)))
    assert priced == {**answer, "usage": {**USAGE, "estimated_cost": COST}}
    assert list(priced) == list(answer)


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps({"choices": [{"text": 'an essay on "usage":{'}]}),
        orjson.dumps({"choices": [], "usage": None}),
        b"",
        b"not JSON",
        pytest.param(
            orjson.dumps({"choices": [{"tool": {"usage": {}}}]}),
        ),
    ],
)
def test_an_answer_without_usage_is_returned_as_it_is(body: bytes) -> None:
    assert annotate_answer(body, UsageNotes(PRICE)) == body


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        ({"prompt_tokens": 1000, "completion_tokens": 0}, 0.00003),
        ({"prompt_tokens": 0, "completion_tokens": 1}, 1e-7),
        ({"prompt_tokens": 10}, 3e-7),
        ({"prompt_tokens": 10, "completion_tokens": None}, 3e-7),
        ({}, 0.0),
    ],
)
def test_tokens_that_are_not_told_cost_nothing(usage: dict[str, Any], cost: float) -> None:
    UsageNotes(PRICE).take(usage)
    assert usage["estimated_cost"] == cost


DETAILS = {"cached_tokens": 0, "multimodal_tokens": {"image": 111}}


@pytest.mark.parametrize(
    ("details", "image_modes", "expected"),
    [
        (DETAILS, ("tiny", "gundam"), {**DETAILS, "image_tokens": 111, "image_modes": ["tiny", "gundam"]}),
        (DETAILS, (), {**DETAILS, "image_tokens": 111, "image_modes": []}),
        ({"multimodal_tokens": {}}, (), {"multimodal_tokens": {}, "image_tokens": 0, "image_modes": []}),
        ({"cached_tokens": 3}, (), {"cached_tokens": 3}),
        ({"multimodal_tokens": None}, ("tiny",), {"multimodal_tokens": None}),
        (None, ("tiny",), None),
    ],
)
def test_what_images_took_is_told_where_the_engine_counts_them(
    details: dict[str, Any] | None, image_modes: tuple[str, ...], expected: dict[str, Any] | None
) -> None:
    usage = {**USAGE, "prompt_tokens_details": None if details is None else dict(details)}
    UsageNotes(PRICE, image_modes).take(usage)
    assert usage["prompt_tokens_details"] == expected
    assert usage["estimated_cost"] == COST


def test_who_did_not_ask_for_usage_does_not_get_its_frame() -> None:
    notes = UsageNotes(PRICE)
    annotator = StreamAnnotator(notes, shows_usage=False)
    text, last, done = frame(chunk("a")), frame({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n"
    assert annotator.feed(text + last[:9]) == text
    assert annotator.feed(last[9:] + done) == b""
    assert annotator.is_done
    assert annotator.flush() == done
    assert notes.tokens == TokenCounts(num_prompt_tokens=1000, num_completion_tokens=500)
    assert notes.bill(TokenCounts(1000, 0, 0, 500), Outcome.COMPLETED) == (80_000, 0)


@pytest.mark.parametrize(
    ("pieces", "is_done"),
    [
        ([b"data: {}\n\n", b"data: [DONE]\n\n"], True),
        ([b"data: {}\n\ndata: [DO", b"NE]\n\n"], True),
        ([b"data: {}\n\n", b"data: [DONE]"], True),
        ([b"data: {}\n\n"], False),
        ([b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n'], False),
        ([], False),
    ],
)
def test_a_stream_is_done_when_its_engine_says_so(pieces: list[bytes], is_done: bool) -> None:
    annotator = annotator_for()
    for piece in pieces:
        annotator.feed(piece)
    annotator.flush()
    assert annotator.is_done is is_done


def test_frames_and_the_reason_of_the_end_are_noted() -> None:
    notes = UsageNotes(PRICE)
    annotator = StreamAnnotator(notes, shows_usage=True)
    text = chunk('"finish_reason":"no"')
    for event in (text, text, {"choices": [{"delta": {}, "finish_reason": "length", "stop_reason": "repetition"}]}):
        annotator.feed(frame(event))
    assert (notes.num_frames, notes.finish_reason) == (3, "length")


def test_a_whole_answer_tells_the_reason_of_its_end() -> None:
    notes = UsageNotes(PRICE)
    annotate_answer(orjson.dumps({"choices": [{"finish_reason": "stop"}], "usage": USAGE}), notes)
    assert notes.finish_reason == "stop"


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_an_error_event_of_the_engine_ends_the_stream_without_done(piece_bytes: int) -> None:
    failure = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}
    stream = frame(chunk("a")) + b"data: " + json.dumps({"error": failure}).encode() + b"\n\ndata: [DONE]\n\n"
    annotator = annotator_for()
    pieces = (stream[start : start + piece_bytes] for start in range(0, len(stream), piece_bytes))
    assert b"".join(map(annotator.feed, pieces)) + annotator.flush() == frame(chunk("a"))
    assert not annotator.is_done
    assert annotator.error is not None
    assert (annotator.error.http_status, annotator.error.is_retryable) == (502, True)


def test_text_that_reads_like_an_error_event_is_text() -> None:
    annotator = annotator_for()
    spoken = frame(chunk('\n\ndata: {"error": {}}\n\n'))
    assert annotator.feed(spoken) == spoken
    assert annotator.error is None


# Usage in the last chunk


def finish(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **choice}]}


FINAL = {"choices": [], "usage": USAGE}
PRICED = {**USAGE, "estimated_cost": COST}


def last_annotator() -> StreamAnnotator:
    return StreamAnnotator(UsageNotes(PRICE), shows_usage=False, usage_in_last=True)


@given(st.data(), st.lists(st.text(max_size=4), max_size=4), st.booleans())
def test_the_last_chunk_carries_the_usage_however_the_stream_is_cut(
    data: st.DataObject, texts: list[str], counts_as_it_goes: bool
) -> None:
    more = {"usage": {**USAGE, "completion_tokens": 1}} if counts_as_it_goes else {}
    chunks = b"".join(frame({**chunk(text), **more}) for text in texts)
    stream = chunks + frame({**finish(), **more}) + frame(FINAL) + b"data: [DONE]\n\n"
    annotator = last_annotator()
    at_once = b"".join(annotator.feed(piece) for piece in data.draw(splits(stream)))
    assert at_once == chunks, "what it cost is told when the answer is whole"
    assert annotator.flush() == frame({**finish(), "usage": PRICED}) + b"data: [DONE]\n\n"
    assert annotator.is_done


@given(st.data())
def test_of_several_choices_the_last_to_end_carries_it(data: st.DataObject) -> None:
    first, other, second = frame(finish(index=1)), frame(chunk("b")), finish(index=0, finish_reason="length")
    annotator = last_annotator()
    stream = first + other + frame(second) + frame(FINAL)
    assert b"".join(annotator.feed(piece) for piece in data.draw(splits(stream))) == first + other
    assert annotator.flush() == frame({**second, "usage": PRICED})


def test_a_choice_that_goes_on_is_not_held_back() -> None:
    annotator = last_annotator()
    first, other = frame(finish(index=1)), frame(chunk("b"))
    assert annotator.feed(first) == b""
    assert annotator.feed(other) == first + other


def test_a_stream_without_a_last_chunk_or_without_usage_loses_nothing() -> None:
    annotator = last_annotator()
    assert annotator.feed(frame(chunk("a")) + frame(FINAL)) == frame(chunk("a"))
    assert json.loads(annotator.flush()[6:])["usage"] == PRICED
    annotator = last_annotator()
    stream = frame(finish()) + b"data: [DONE]\n\n"
    assert annotator.feed(stream) + annotator.flush() == stream
