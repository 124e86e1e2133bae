"""`videoadapt serve` in a browser and over plain HTTP: answers, refusals, many videos at once, nothing left behind.

One process serves the page for all tests of this file.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

import psutil
import pytest
import torch

import small_runs as runs
import videoadapt as va
from browser import Visit, visit
from video_files import numbered, write_video
from videoadapt.commands.serve.answer import answer_html
from videoadapt.commands.serve.server import _new_folder, serve
from videoadapt.config.load import Config, dump_config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.data.index.probe_pool import run_alone
from videoadapt.errors import UserError, VideoError
from videoadapt.evaluation.explain import explain, read_video
from videoadapt.evaluation.predict import load_predictor
from videoadapt.evaluation.reasons import reason
from videoadapt.model.checkpoint import load_model, train_checkpoints, weights_digest
from videoadapt.routing.assigner import Assigner, assigner_checkpoints
from videoadapt.routing.policy import Fixed, Mixture
from videoadapt.training.state import State

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Route

MAX_MB, MAX_S, QUEUE = 1, 5, 12
START_S = 300  # a busy machine
AXE = Path(__file__).parents[1] / "reporting" / "vendor" / "axe.min.js"

# The function for notebooks returns at once and cleans up at the end of its block; the command blocks.
PROGRAM = """
import sys, urllib.request
import videoadapt as va
from videoadapt.commands.cli import main
with va.serve(sys.argv[1], block=False, progress=False) as page:
    assert urllib.request.urlopen(page.url).status == 200
    assert page.folder.exists()
assert not page.folder.exists()
main(["serve", *sys.argv[1:]])
"""


class Served(NamedTuple):
    """The running page."""

    url: str
    temporary: Path  # its folder for temporary files
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    @property
    def key(self) -> str:
        return parse_qs(urlsplit(self.url).query)["key"][0]

    def stored(self) -> list[str]:
        """Uploads on the disk; the page's lock file is none."""
        return [path.name for path in self.temporary.glob("videoadapt-serve-*/*") if path.name != "lock"]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)

    def post(self, name: str, body: object, **options: object) -> tuple[int, dict[str, str]]:
        """Sends a video; returns the status, and the last line of the response."""
        connection = self.connect()
        path = f"/videos?key={self.key}&name={quote(name)}"
        connection.request("POST", path, body, **options)  # type: ignore[arg-type]
        response = connection.getresponse()
        return response.status, json.loads(response.read().splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with an untrained model and an untrained assigner; its names of classes are HTML."""
    folder = tmp_path_factory.mktemp("serve")
    data = runs.make_data(folder / "data")
    classes = data / "classes.txt"
    classes.write_text("".join(f"<i>{name}</i>\n" for name in classes.read_text().splitlines()))
    config = runs.config(data, folder / "run", data={"holdout": 0.0}, label={"source": "train"})
    state = State.start(config, load_or_index(config))
    train_checkpoints(config.run.dir).save(0, *state.saved())
    points = config.model.points
    torch.manual_seed(0)
    assigner = Assigner(config.assign, len(points)).eval()
    meta = {
        "assign": config.assign.model_dump(mode="json"),
        "points": list(points),
        "threshold": 0.5,  # the middle point: each of three has a probability near a third
        "model": weights_digest(load_model(config.run.dir)),
    }
    tensors = {f"model/{name}": tensor for name, tensor in assigner.state_dict().items()}
    assigner_checkpoints(config.run.dir).save(1, tensors, meta)
    (config.run.dir / "config.yaml").write_text(dump_config(config))
    return config


@pytest.fixture(scope="module")
def page(run: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    temporary = tmp_path_factory.mktemp("temporary")
    limits = [f"serve.max_mb={MAX_MB}", f"serve.max_seconds={MAX_S}", f"serve.queue={QUEUE}", "serve.port=0"]
    line = [sys.executable, "-c", PROGRAM, str(run.run.dir), *limits]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            said: list[str] = []
            while not (found := re.search(r"http://\S+", said[-1] if said else "")):
                assert (line_said := process.stderr.readline()), "".join(said)
                said.append(line_said)
            served = Served(found[0], temporary, process)
            assert len(list(temporary.glob("videoadapt-serve-*"))) == 1
            yield served
            process.send_signal(signal.SIGTERM)
            assert process.wait(START_S) == 0
            assert not list(temporary.glob("videoadapt-serve-*"))
        finally:
            process.kill()


def videos(run: Config, count: int) -> list[Path]:
    return sorted((run.run.dir.parent / "data" / "train").glob("*.mp4"))[:count]


def card(seen: Visit, name: str) -> Locator:
    """The finished card of a file."""
    shown = seen.page.locator("article", has=seen.page.get_by_role("heading", name=name, exact=True))
    shown.locator(".best, .refused").wait_for()
    return shown


# ---- in a browser


def test_a_video_shows_its_frames_the_chosen_point_and_every_points_answer(
    page: Served, run: Config, browser: Browser
) -> None:
    [video] = videos(run, 1)
    [expected] = va.predict(run, video)
    with visit(browser) as seen:
        seen.open(page.url)
        assert "key" not in seen.page.url  # a screenshot of the window does not show it
        seen.page.set_input_files("#files", video)
        shown = card(seen, video.name)
        assert shown.locator(".best b").inner_text() == expected.classes[0]  # with its <i>
        assert shown.locator(".best span").inner_text() == f"{100 * expected.probabilities[0]:.1f}\xa0%"
        assert shown.locator(".point").inner_text() == expected.points[0] == "6"
        frames = shown.locator(".frames img")
        assert frames.count() == run.model.num_frames
        assert all(image.evaluate("image => image.naturalWidth") == run.model.size for image in frames.all())
        why, answers = (table.locator("tbody tr") for table in shown.locator("table").all())
        assert [row.locator("th").inner_text() for row in why.all()] == ["4", "6", "8"]
        assert [row.locator("th").inner_text() for row in answers.all()] == ["8", "6", "4", "policy"]
        assert "6 is the cheapest point that suffices" in shown.inner_text()
        for row, policy in zip(answers.all(), ("fixed:8", "fixed:6", "fixed:4", "assigned"), strict=True):
            [alone] = va.predict(run, video, policy)
            assert alone.classes[0] in row.inner_text()
            assert f"{100 * alone.probabilities[0]:.1f}\xa0%" in row.inner_text()
            assert f"{alone.macs / 1e6:.3g} M" in row.inner_text()
            assert re.search(r"[\d.]+ m?s", row.inner_text())
        assert seen.errors == [] and seen.left == []
        assert {urlsplit(url).hostname for url in seen.requests if not url.startswith("data:")} == {"127.0.0.1"}
    assert page.stored() == []


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_axe_finds_nothing(page: Served, run: Config, browser: Browser, width: int, dark: bool) -> None:
    [video] = videos(run, 1)
    # The page's policy forbids scripts of others, such as axe: it is off here.
    with visit(browser, width=width, dark=dark, bypass_csp=True) as seen:
        seen.open(page.url)
        seen.page.set_input_files("#files", video)
        card(seen, video.name)
        seen.page.evaluate(AXE.read_text(encoding="utf-8"))
        found = seen.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [rule["id"] for rule in found["violations"]] == []


def test_no_video_and_too_large_a_file_are_refused_in_a_sentence(
    page: Served, browser: Browser, tmp_path: Path
) -> None:
    text, large, long = tmp_path / "text.mp4", tmp_path / "<b>large.mp4", tmp_path / "long.mp4"
    text.write_text("no video\n" * 100)
    large.write_bytes(bytes(MAX_MB * 1_000_000 + 1))
    write_video(long, numbered(MAX_S + 2), fps=1)
    with visit(browser, width=390, dark=True) as seen:
        seen.open(page.url)
        seen.page.set_input_files("#files", [text, large, long])
        assert "Refused: cannot be read as a video" in card(seen, text.name).inner_text()
        assert "expected a complete video file, such as mp4" in card(seen, text.name).inner_text()
        assert f"Refused: it is larger than {MAX_MB} MB (serve.max_mb)" in card(seen, large.name).inner_text()
        assert f"lasts {MAX_S + 2}.0 s, more than serve.max_seconds {MAX_S}" in card(seen, long.name).inner_text()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert seen.errors == [] and seen.left == []
    assert page.stored() == []


def test_a_video_without_an_answer_is_refused_in_a_sentence(page: Served, run: Config, browser: Browser) -> None:
    [video] = videos(run, 1)
    progress = json.dumps({"state": "progress", "text": "reading the video"}) + "\n"
    responses = iter([(500, "Internal Server Error"), (200, progress)])  # the second breaks off

    def respond(route: Route) -> None:
        status, body = next(responses)
        route.fulfill(status=status, body=body)

    with visit(browser) as seen:
        seen.open(page.url)
        seen.page.route("**/videos?*", respond)
        for _ in range(2):
            seen.page.set_input_files("#files", video)
            shown = seen.page.locator("article").first
            shown.locator(".refused").wait_for()
            assert "Refused: the page's server gave no answer" in shown.inner_text()


def test_ten_videos_at_once_all_get_their_answers(page: Served, run: Config, browser: Browser) -> None:
    ten = videos(run, 10)
    with visit(browser) as seen:
        seen.open(page.url)
        seen.page.set_input_files("#files", ten)
        for video, expected in zip(ten, va.predict(run, ten, progress=False), strict=True):
            assert card(seen, video.name).locator(".best b").inner_text() == expected.classes[0]
        assert seen.errors == []
    assert page.stored() == []


# ---- over plain HTTP


def test_only_this_machine_and_only_with_the_key(page: Served) -> None:
    tree = [psutil.Process(page.process.pid), *psutil.Process(page.process.pid).children(recursive=True)]
    open_to = {c.laddr.ip for process in tree for c in process.net_connections("tcp") if c.status == "LISTEN"}
    assert open_to == {"127.0.0.1"}
    for path, headers, status in (
        ("/", {}, 403),
        ("/?key=wrong", {}, 403),
        (f"/?key={page.key}", {}, 200),
        (f"/?key={page.key}", {"Host": f"localhost:{page.port}"}, 200),  # through a tunnel of ssh
        (f"/?key={page.key}", {"Host": "example.org"}, 400),  # a name of somebody else for this machine
        ("/../server.py", {}, 404),
    ):
        connection = page.connect()
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        assert response.status == status, (path, headers)
        assert "default-src 'none'" in response.headers["Content-Security-Policy"] or status == 400
        cookie = response.headers["Set-Cookie"] or ""
        assert ("HttpOnly" in cookie and "SameSite=strict" in cookie) == (status == 200)
    connection = page.connect()
    connection.request("POST", "/videos?name=a.mp4", b"x")
    assert connection.getresponse().status == 403


def test_a_file_that_is_too_large_is_refused_before_and_while_it_is_received(page: Served) -> None:
    chunk = bytes(100_000)
    endless = (chunk for _ in range(10 * MAX_MB + 1))
    for body, options in ((b"", {"headers": {"Content-Length": str(10**12)}}), (endless, {"encode_chunked": True})):
        status, line = page.post("a.mp4", body, **options)
        assert (status, line["state"]) == (413, "refused")
        assert "larger than 1 MB" in line["text"]
    assert page.post("empty.mp4", b"")[1]["text"].startswith("the file is empty")
    assert page.stored() == []


def test_a_full_queue_refuses_and_an_upload_that_breaks_off_leaves_nothing(page: Served, run: Config) -> None:
    begun = [page.connect() for _ in range(QUEUE)]
    for connection in begun:
        connection.putrequest("POST", f"/videos?key={page.key}&name=a.mp4")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"the first bytes")
    wait_for(lambda: len(page.stored()) == QUEUE)
    body = videos(run, 1)[0].read_bytes()
    status, line = page.post("a.mp4", body)
    assert (status, line["state"]) == (503, "refused")
    assert "12 videos wait already (serve.queue)" in line["text"]
    for connection in begun:
        connection.close()
    wait_for(lambda: not page.stored())
    assert page.post("a.mp4", body)[1]["state"] == "done"


def test_an_upload_that_cannot_be_stored_is_refused(page: Served, run: Config) -> None:
    [folder] = page.temporary.glob("videoadapt-serve-*")
    away = folder.rename(folder.with_name("away"))
    try:
        status, line = page.post("a.mp4", videos(run, 1)[0].read_bytes())
    finally:
        away.rename(folder)
    assert (status, line["state"]) == (507, "refused")
    assert line["text"] == "it cannot be stored here: No such file or directory"


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + START_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- without the page


def test_a_used_port_is_refused_before_the_model_is_loaded(page: Served, run: Config) -> None:
    used = run.model_copy(update={"serve": run.serve.model_copy(update={"port": page.port})})
    with pytest.raises(UserError, match=rf"serve\.port: {page.port} cannot be used .*serve\.port=0"):
        serve(used)


def test_the_folder_of_a_killed_page_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running, lock = _new_folder()
    killed = tmp_path / "videoadapt-serve-killed"
    shutil.copytree(running, killed)  # its lock is not held
    (killed / "upload.mp4").write_bytes(b"x")
    other, other_lock = _new_folder()
    assert not killed.exists()
    assert running.exists() and other.exists()
    for handle in (lock, other_lock):
        os.close(handle)


def test_a_cascade_is_explained_by_its_confidences(run: Config) -> None:
    """The numbers are those by which the policy decided: the clip ends where they say."""
    [video] = videos(run, 1)
    read = read_video(str(video), run, thumbnails=False)
    sure = explain(load_predictor(run, "fixed:4", top=1), "a", read).answers[2].probabilities[0]
    for thresholds, ends, words in (
        ((sure - 0.01, 0.9), "4", f"4: confidence {sure:.3f}, at least {sure - 0.01:.3g}, so the clip ends there."),
        ((sure + 0.01, 0.9), "8", f"4: confidence {sure:.3f}, less than {sure + 0.01:.3g}; 6: "),
    ):
        policy = "cascade:4,6,8:{:.9f},{}".format(*thresholds)
        explained = explain(load_predictor(run, policy, top=1), "a", read)
        [clip] = explained.units
        assert clip.point == ends == explained.prediction.points[0]
        assert clip.reason.startswith(words)
        assert [seen.point for seen in clip.looks] == ["4", "6", "8"][: 1 if ends == "4" else 3]
        assert explained.prediction.macs == sum(
            answer.macs for answer in explained.answers if ends == "8" or answer.point == "4"
        )


def test_a_cascade_over_views_is_explained_view_by_view(run: Config) -> None:
    evaluate = run.evaluate.model_copy(update={"temporal_views": 2, "spatial_crops": 3})
    config = run.model_copy(update={"evaluate": evaluate})
    read = read_video(str(videos(run, 1)[0]), config, thumbnails=False)
    explained = explain(load_predictor(config, "cascade:4,8:views:1,1", top=1), "a", read)
    [video] = explained.units
    assert len(video.starts_s) == 2
    assert [(look.point, look.views) for look in video.looks] == [("4", 1), *(("8", views) for views in range(1, 7))]
    assert video.reason.startswith("4, 1 view: confidence 0.")
    assert video.reason.endswith("8, 6 views: the last step of the cascade.")
    html = answer_html(explained, read, load_predictor(config, "cascade:4,8:views:1,1", top=1))
    assert html.count("<img ") == 2 * config.model.num_frames
    assert "8, 6 views" in html


def test_answers_that_are_nan_name_no_class(run: Config) -> None:
    read = read_video(str(videos(run, 1)[0]), run, thumbnails=False)
    predictor = load_predictor(run, "fixed:8", top=1)
    predictor.model.norm.weight["4"].data.fill_(torch.nan)
    explained = explain(predictor, "a", read)
    assert explained.answers[0].classes and explained.answers[2].classes == ()
    html = answer_html(explained, read, predictor)
    assert "none, its probabilities are NaN" in html and "nan" not in html
    predictor.model.head.bias.data.fill_(torch.nan)
    with pytest.raises(VideoError, match="a: the model's probabilities are NaN"):
        explain(predictor, "a", read)


def test_policies_that_read_no_model_say_so() -> None:
    assert reason(Fixed("8"), "8", ()) == "The policy runs every clip at 8."
    drawn = reason(Mixture(("8", "4"), 0.3), "8", ())
    assert drawn == "The point is drawn from the pixels of the clip: 8, as for 70% of all clips."


def test_reading_ends_when_the_page_ends() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.close()
    assert run_alone("60", sleep, START_S, stop=receiver) == "reading it was stopped"


def sleep(path: str) -> None:
    time.sleep(float(path))
