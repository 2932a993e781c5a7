"""The queue, on a network with random weights whose steps the tests release one by one."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.sampling.recorded import ModelFacts
from launch.serving import studio as studio_module
from launch.serving.jobs import Failed, Finished, Job, Progress, Waiting
from launch.serving.limits import Busy, Limits
from launch.serving.requests import DrawRequest
from launch.serving.studio import Studio
from tests.launch.serving.server import noise
from tim import Generator
from tim.sampling.generator import Drawn, Step
from tim.sampling.requests import ImageRequest


class Stepped(Generator):
    """A generator that waits before every step until it may go on, or fails."""

    def prepare(self) -> None:
        self.may_step = threading.Semaphore(0)
        self.error: Exception | None = None
        self.order: list[object] = []

    def draw(self, requests: Sequence[ImageRequest], *, callback: Callable[[Step], None] | None = None) -> Iterator[Drawn]:
        def stepped(step: Step) -> None:
            self.may_step.acquire()
            if self.error is not None:
                raise self.error
            assert callback is not None
            callback(step)

        self.order.append(requests[0].prompt)
        return super().draw(requests, callback=stepped)


@pytest.fixture
def generator(model: Path) -> Stepped:
    generator = Stepped.from_pretrained(model, device="cpu")
    assert isinstance(generator, Stepped)
    generator.prepare()
    return generator


@pytest.fixture
def studio(generator: Stepped) -> Iterator[Studio]:
    facts = ModelFacts("first", "0" * 64, (), "fp32", "cpu")
    studio = Studio(generator, facts, limits=Limits(max_queue=5, max_per_client=3, requests_per_minute=100))
    yield studio
    generator.may_step.release(1000)
    assert studio.close(seconds=60)


def request(prompt: str, **changes: Any) -> DrawRequest:
    return DrawRequest(**{"prompt": prompt, "width": 8, "height": 8, "steps": 1, **changes})


def begun(job: Job) -> None:
    """Wait until it is being drawn."""
    next(event for event in job.events() if not isinstance(event, Waiting))


def ended(job: Job) -> Finished | Failed:
    *_, last = job.events()
    assert isinstance(last, (Finished, Failed))
    return last


def test_clients_take_turns(studio: Studio, generator: Stepped) -> None:
    first = studio.submit(request("a1"), client="a")
    begun(first)
    jobs = [studio.submit(request(prompt), client=prompt[0]) for prompt in ("a2", "a3", "a4", "b1", "c1")]
    assert [job.position for job in jobs] == [1, 4, 5, 2, 3]
    generator.may_step.release(100)
    for job in (first, *jobs):
        assert isinstance(ended(job), Finished)
    assert generator.order == ["a1", "a2", "b1", "c1", "a3", "a4"]


def test_the_queue_and_the_share_of_a_client_have_limits(studio: Studio) -> None:
    begun(studio.submit(request("a"), client="a"))
    mine = [studio.submit(request("a"), client="a") for _ in range(3)]
    with pytest.raises(Busy, match="3 of your requests wait, the limit is 3"):
        studio.submit(request("a"), client="a")
    for client in "bc":
        studio.submit(request("a"), client=client)
    with pytest.raises(Busy, match="the queue is full: 5 requests wait"):
        studio.submit(request("a"), client="d")
    mine[0].cancel()
    studio.submit(request("a"), client="d")


def test_large_uploads_wait_in_limited_number(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio_module, "_WAITING_BYTES", 6000)
    image = base64.b64encode(noise(20, 20)).decode()
    edit = DrawRequest(prompt="a", image=image, steps=1)
    begun(studio.submit(request("a"), client="a"))
    studio.submit(edit, client="a")
    with pytest.raises(Busy, match="the queue holds too many large images"):
        studio.submit(edit, client="b")
    studio.submit(request("a"), client="b")


def test_progress_has_previews_and_finished_images(studio: Studio, generator: Stepped) -> None:
    job = studio.submit(request("a", steps=[1, 3], count=2), client="a")
    generator.may_step.release(100)
    events = list(job.events())
    progress = [event for event in events if isinstance(event, Progress)]
    assert all(event.images == 4 for event in progress)
    assert any(preview.size == (8, 8) for event in progress for preview in event.previews)
    last = events[-1]
    assert isinstance(last, Finished)
    assert [result.settings.steps for result in last.results] == [1, 3, 1, 3]
    assert len({result.image_id for result in last.results}) == 4
    assert all(studio.result(result.image_id) is result and result.image.size == (8, 8) for result in last.results)
    assert studio.job(job.id) is job


def test_a_request_is_cancelled_while_it_waits_and_while_it_is_drawn(studio: Studio, generator: Stepped) -> None:
    drawn, waiting, last = (studio.submit(request(prompt, steps=50), client="a") for prompt in ("1", "2", "3"))
    begun(drawn)
    waiting.cancel()
    assert (waiting.state, ended(waiting)) == ("cancelled", Failed("the request was cancelled"))
    drawn.cancel()
    generator.may_step.release(1)
    assert ended(drawn) == Failed("the request was cancelled")
    generator.may_step.release(50)
    assert isinstance(ended(last), Finished)
    assert generator.order == ["1", "3"]


def test_a_request_that_nobody_asks_about_is_abandoned(studio: Studio, generator: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    job = studio.submit(request("a", steps=50), client="a")
    begun(job)
    watched = studio.submit(request("b"), client="b")
    events = watched.events()
    next(events)
    monkeypatch.setattr(studio_module, "ABANDONED", -1.0)
    generator.may_step.release(2)
    last = [*events][-1]
    assert isinstance(last, Finished)
    assert job.state == "cancelled"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("/secret/model.safetensors: damaged"), "the images could not be drawn; the server's log has the reason"),
        (ValueError("/secret"), "the images could not be drawn; the server's log has the reason"),
        (MemoryError(), "not enough memory for this request: ask for a smaller size or fewer images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "not enough memory for this request"),
    ],
)
def test_a_failure_is_a_sentence_and_the_next_request_is_drawn(studio: Studio, generator: Stepped, error: Exception, sentence: str) -> None:
    failing = studio.submit(request("a"), client="a")
    begun(failing)
    generator.error = error
    generator.may_step.release(1)
    event = ended(failing)
    assert isinstance(event, Failed)
    assert event.sentence.startswith(sentence)
    generator.error = None
    generator.may_step.release(1)
    assert isinstance(ended(studio.submit(request("b"), client="a")), Finished)


def test_a_limit_of_all_pixels(studio: Studio) -> None:
    studio.submit(request("a", count=2), client="a", max_pixels=128)
    with pytest.raises(ValueError, match="embed: the images have 128 pixels, the limit is 127"):
        studio.submit(request("a", count=2), client="a", max_pixels=127)


def test_a_gpu_that_is_lost_is_no_silent_queue(studio: Studio, generator: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(studio, "_forget", lost)
    generator.may_step.release(100)
    jobs = [studio.submit(request(prompt), client="a") for prompt in "ab"]
    assert {type(ended(job)) for job in jobs} == {Finished, Failed}
    while studio.status().is_working:
        pass
    with pytest.raises(Busy, match="the server is stopping"):
        studio.submit(request("c"), client="a")


def test_old_images_make_room(studio: Studio, generator: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio_module, "KEPT_JOBS", 2)
    generator.may_step.release(100)
    jobs = [studio.submit(request(str(number)), client="a") for number in range(3)]
    results = [ended(job) for job in jobs]
    begun(studio.submit(request("last"), client="a"))  # after the others have been counted
    first, *others = (result.results[0].image_id for result in results if isinstance(result, Finished))
    assert studio.result(first) is None
    assert studio.job(jobs[0].id) is None
    assert studio.result(others[-1]) is not None


def test_closing_ends_all_requests(studio: Studio, generator: Stepped) -> None:
    jobs = [studio.submit(request("a", steps=50), client="a") for _ in range(2)]
    begun(jobs[0])
    threading.Timer(0.1, generator.may_step.release).start()
    assert studio.close(seconds=60)
    assert all(ended(job) == Failed("the server is stopping; ask again later") for job in jobs)
    assert not studio.status().is_working
    with pytest.raises(Busy, match="the server is stopping"):
        studio.submit(request("a"), client="a")
