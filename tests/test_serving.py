"""Serving modules: limits, sampling settings, sessions, chat view, caption bank."""

import asyncio
import struct
import subprocess
import sys
import threading
import wave
import zlib
from dataclasses import replace
from fractions import Fraction
from html import unescape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from media_files import write_heic, write_media
from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.paths import PROJECT_ROOT
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.generation.events import DiffusionStep, TextDelta, TurnComplete
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.decode_worker import MAX_WORKERS
from nextgpt.media.writing import Frames, Sound, save_medium
from nextgpt.mini_world.captions import parse_caption
from nextgpt.mini_world.page_files import BANK, EXAMPLES, bank_captions, write_caption_bank
from nextgpt.serving.answer_state import AnswerState
from nextgpt.serving.chat_view import EXPIRED, chat_messages, unescape_text
from nextgpt.serving.examples import read_examples
from nextgpt.serving.explanation import explanation_html
from nextgpt.serving.limits import MAX_BYTES, MAX_CHECKS, check_medium, find_modality
from nextgpt.serving.nearest_captions import CaptionBank
from nextgpt.serving.sampling_settings import apply_settings, check_seed, setting_specs
from nextgpt.serving.scheduler import Finished, MediumNotMade, MediumSaved, QueuePosition
from nextgpt.serving.sessions import Round, Session, Sessions, safe_name
from nextgpt.serving.temporary_folder import temporary_folder
from parity_tools import MEDIA
from tiny_decoders import tiny_decoder
from tiny_system import tiny_encoder

OPTIONS = GenerationSettings.from_config(load_config("mini"))


def png_of_size(path: Path, width: int, height: int) -> Path:
    """Write a PNG of a few bytes with this size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def video_of_length(path: Path, seconds: int, fps: int = 1) -> Path:
    frames = np.zeros((seconds * fps, 16, 16, 3), np.uint8)
    save_medium(Frames(frames, fps), path)
    return path


def sound_of_length(path: Path, seconds: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0" * (16000 * seconds))
    return path


def sound_of_lies(path: Path, packets: int) -> Path:
    """Write silent audio whose packets of 1024 samples each have a duration of one sample."""
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    silence.sample_rate = 48_000
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        data = bytes([*stream.encode(silence), *stream.encode(None)][-1])
        for time in range(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 48_000)
            packet.pts = packet.dts = time
            container.mux(packet)
    return path


def fast_sound(path: Path) -> Path:
    save_medium(Sound(np.zeros(1000, np.float32), 768_000), path)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


REFUSED = {
    "a file that is gone": (lambda p: p / "a.png", "cannot be read"),
    "an empty file": (lambda p: written(p / "a.png", b""), "0 bytes"),
    "a large file": (lambda p: sparse(p / "a.bin", MAX_BYTES + 1), "more than 50 MB"),
    "text named .mp4": (lambda p: written(p / "a.mp4", b"hello " * 99), "neither a picture"),
    "text named .png": (lambda p: written(p / "a.png", b"hello " * 99), "neither a picture"),
    "a playlist": (lambda p: written(p / "a.mp4", b"#EXTM3U\n/etc/passwd\n"), "neither a picture"),
    "a HEIC picture": (lambda p: write_heic(p / "a.mp4"), "a HEIC picture.* convert it to JPEG"),
    "an SVG": (lambda p: written(p / "a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
               "neither a picture"),
    "30000 x 30000 pixels": (lambda p: png_of_size(p / "a.png", 30000, 30000), "million pixels"),
    "9000 x 9000 pixels": (lambda p: png_of_size(p / "a.png", 9000, 9000), "million pixels"),
    "a video of two hours": (lambda p: video_of_length(p / "a.mp4", 7200), "longer than 120 s"),
    "a sound of ten minutes": (lambda p: sound_of_length(p / "a.wav", 600), "longer than 300 s"),
    "a sound that claims to be short": (lambda p: sound_of_lies(p / "a.mp4", 15_000),
                                        "longer than 300 s"),
    "a sound of 768 kHz": (lambda p: fast_sound(p / "a.wav"), "more than 192000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_limits_refuse_by_file_name_without_path(kind: str, tmp_path: Path) -> None:
    make, word = REFUSED[kind]
    with pytest.raises(MediaError, match=word) as refused:
        check_medium(make(tmp_path), "my file")
    assert str(refused.value).startswith("my file")
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("reader", "file"), [(Image, "portrait.jpg"), (av, "tone_16k.wav"), (av, "move_wide.mp4")]
)
def test_limits_file_removed_during_the_check_is_refused_by_name(
    reader: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a", (MEDIA / file).read_bytes())
    real_open = reader.open

    def vanish_and_open(*given: Any, **options: Any) -> Any:
        path.unlink()
        return real_open(*given, **options)

    monkeypatch.setattr(reader, "open", vanish_and_open)
    with pytest.raises(MediaError, match=r"^my file: cannot be read \(.*\): upload") as refused:
        find_modality(str(path), "my file")
    assert str(tmp_path) not in str(refused.value)


def test_limits_file_removed_after_the_check_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Sessions(tmp_path).get("tab", "ada")
    monkeypatch.setattr("nextgpt.serving.sessions.check_medium", lambda *_: "image")
    with pytest.raises(MediaError, match=r"^a\.png: .*upload it again") as refused:
        session.build_turn("", [(tmp_path / "gone.png", "a.png")])
    assert str(tmp_path) not in str(refused.value)


def test_limits_checks_run_one_per_visitor_and_leave_a_worker_free(
    tmp_path: Path,
) -> None:
    sessions = Sessions(tmp_path)
    running: list[str] = []
    go = threading.Event()

    def check(name: str) -> str:
        running.append(name)
        assert go.wait(60)
        return name

    async def scene() -> None:
        names = [str(number) for number in range(MAX_WORKERS + 2)]
        tasks = [asyncio.create_task(sessions.run_check(name, check, name)) for name in names]
        while len(running) < MAX_CHECKS:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(running) == MAX_CHECKS == MAX_WORKERS - 1
        for name in names:
            with pytest.raises(UserError, match="being checked already"):
                await sessions.run_check(name, check, name)
        tasks.pop().cancel()  # who leaves the line
        await asyncio.sleep(0.1)
        go.set()
        assert await asyncio.gather(*tasks) == names[:-1]
        assert await sessions.run_check(names[0], check, "again") == "again"
        assert await sessions.run_check(names[-1], check, names[-1]) == names[-1]

    asyncio.run(scene())
    assert not sessions._checking and len(running) == MAX_WORKERS + 3
    sessions.end_checks()


def test_sessions_open_during_file_lookup(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)

    class Opening(str):  # another thread's work at the worst moment
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            sessions.get(f"tab {len(sessions)}", "another")
            return str.__eq__(self, other)

    sessions.get("tab", "ada")
    path = written(sessions.root / "a.png", b"x")
    assert not sessions.has_access(str(path), Opening("ada"))
    assert len(sessions) == 2


def test_limits_refuse_animations_of_many_large_frames(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=60, options={"preset": "ultrafast"})
        stream.width = stream.height = 2048
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((2048, 2048, 3), np.uint8), format="rgb24")
        first = stream.encode(frame)
        container.mux(first)
        container.mux(stream.encode())
    limit = 2 * 2048 * 2048
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextgpt.serving.limits.MAX_VIDEO_PIXELS", limit // 4)
        with pytest.raises(MediaError, match="too many frames"):
            find_modality(tmp_path / "a.mp4", "bomb")
        patch.setattr("nextgpt.serving.limits.MAX_FRAME_PIXELS", 1000)
        with pytest.raises(MediaError, match="pixels a frame are too many"):
            find_modality(tmp_path / "a.mp4", "bomb")


def test_limits_refuse_videos_of_too_many_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.serving.limits.MAX_FRAMES", 20)
    assert find_modality(video_of_length(tmp_path / "a.mp4", 20), "it") == "video"
    with pytest.raises(MediaError, match="too many frames"):
        find_modality(video_of_length(tmp_path / "a.mp4", 21), "it")


def test_find_modality_uses_content_not_name(tmp_path: Path) -> None:
    wrong = {
        "image": written(tmp_path / "a.mp4", (MEDIA / "portrait.jpg").read_bytes()),
        "audio": written(tmp_path / "a.png", (MEDIA / "tone_16k.wav").read_bytes()),
        "video": video_of_length(tmp_path / "a.mp4.mp4", 2),
    }
    for modality, path in wrong.items():
        assert check_medium(path, "it") == modality


def test_find_modality_knows_every_kind_of_file(tmp_path: Path) -> None:
    for modality, path in write_media(tmp_path):
        shown = "image" if path.suffix == ".gif" else modality
        assert check_medium(path, path.name) == shown, path.name


def test_sampling_settings_accept_their_range_only() -> None:
    for spec in setting_specs(OPTIONS):
        for value in (spec.low, spec.high, spec.default):
            apply_settings(OPTIONS, {spec.name: value})
        for value in (spec.low - spec.step, spec.high + spec.step, float("nan"), "1", True):
            with pytest.raises(UserError, match=rf"{spec.name}.*give"):
                apply_settings(OPTIONS, {spec.name: value})
    turned = apply_settings(OPTIONS, {"steps_video": 7, "top_p": 0.5, "frames_video": None})
    assert turned.decode["video"] == replace(OPTIONS.decode["video"], num_inference_steps=7)
    assert turned.top_p == 0.5 and turned.decode["image"] == OPTIONS.decode["image"]
    with pytest.raises(UserError, match="unknown setting"):
        apply_settings(OPTIONS, {"path": 1})
    with pytest.raises(UserError, match="whole number"):
        apply_settings(OPTIONS, {"steps_image": 2.5})


def test_sampling_settings_parse_seeds() -> None:
    assert check_seed(-1) is None and check_seed(None) is None and check_seed(7) == 7
    for seed in (-2, 2**31, 1.5, "7"):
        with pytest.raises(UserError, match="seed"):
            check_seed(seed)


def test_session_copies_shown_files_and_removes_them_on_close(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    session = sessions.get("tab", "ada")
    turn = session.build_turn("what is it?", [(MEDIA / "portrait.jpg", "../../etc/my pass wd.jpg")])
    shown = Path(turn.parts[0].path)
    assert shown.name == "my_pass_wd.jpg" and shown.is_relative_to(session.folder)
    assert shown.read_bytes() == (MEDIA / "portrait.jpg").read_bytes()
    token, inner = session.folder.name, str(shown.relative_to(session.folder))
    assert sessions.media_file(token, inner, "ada") == shown
    assert sessions.media_file(token, inner, "bob") is None
    assert sessions.media_file("", f"{token}/{inner}", "bob") is None
    with pytest.raises(UserError, match="another visitor"):
        sessions.get("tab", "bob")
    sessions.close("tab", "ada")
    assert not session.folder.exists() and len(sessions) == 0
    assert sessions.media_file(token, inner, "ada") is None


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "%2e%2e/x", "..", "", "."])
def test_session_media_paths_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    session = sessions.get("tab", "ada")
    session.new_folder()
    other = sessions.get("other", "bob")
    secret = written(other.new_folder() / "a.png", b"secret")
    for address in (name, f"../{other.folder.name}/1/a.png", str(secret)):
        assert sessions.media_file(session.folder.name, address, "ada") is None


@pytest.mark.parametrize("name", ["", "..", "/", "a/b/../c.png", "c.png", "\0c.png", "x" * 300])
def test_session_file_names_are_sanitized(name: str) -> None:
    safe = safe_name(name)
    assert safe and "/" not in safe and not safe.startswith(".") and len(safe) <= 60


def test_sessions_sweep_removes_idle_sessions_and_old_uploads(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    session = sessions.get("tab", "ada")
    session.new_folder()
    upload = written(sessions.new_upload("a.png"), b"x")
    sessions.grant_access(str(upload), "ada")
    sessions.sweep(idle=1000)
    assert upload.exists() and len(sessions) == 1
    sessions.sweep(idle=-1)
    assert not upload.exists() and not session.folder.exists() and len(sessions) == 0
    assert not sessions.has_access(str(upload), "ada")


def test_sessions_sweep_removes_late_files_of_closed_sessions(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    left, kept = sessions.get("left", "ada"), sessions.get("kept", "ada")
    sessions.close("left", "ada")
    for session in (left, kept):
        written(session.new_folder() / "late.png", b"x")
    sessions.sweep(idle=1000)
    assert [*sessions.folder.iterdir()] == [kept.folder]


def test_sessions_disk_usage_skips_files_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(tmp_path)
    written(sessions.new_upload("a.png"), b"x")
    monkeypatch.setattr("os.walk", lambda root: [(str(root), [], ["gone.png"])])
    assert not sessions.full()
    sessions.sweep(idle=-1)


def test_upload_is_removed_with_its_last_owner(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    upload = written(sessions.new_upload("a.png"), b"x")
    for visitor in ("ada", "bob"):
        sessions.grant_access(str(upload), visitor)
    sessions.revoke_access(str(upload), "ada")
    assert upload.exists() and not sessions.has_access(str(upload), "ada")
    sessions.revoke_access(str(upload), "bob")
    assert not upload.parent.exists() and not sessions.has_access(str(upload), "bob")
    own = written(sessions.get("tab", "ada").new_folder() / "a.png", b"x")
    sessions.revoke_access(str(own), "ada")
    assert own.exists()  # it goes with its session


def test_answer_state_grows_event_by_event(tmp_path: Path) -> None:
    reply = AnswerState(seed=3)
    turn = Turn("assistant", (Text("Sure"), Media("image"), Media("audio")))
    assert reply.parts == ()
    for event in (QueuePosition(2), TextDelta("Su"), TextDelta("re")):
        reply.update(event)
    assert reply.parts == (Text("Sure"),) and reply.before == 2
    for event in (
        TurnComplete(turn, ("a", "[IMG0]")),
        DiffusionStep(0, 1, 4),
        MediumSaved(0, tmp_path / "a.png"),
    ):
        reply.update(event)
    assert reply.parts == (Text("Sure"), Media("image", str(tmp_path / "a.png")), Media("audio"))
    assert not reply.ended
    reply.update(Finished((), {}))
    assert reply.ended and reply.token_names == ("a", "[IMG0]")


TYPED = [
    "<Image>/etc/passwd</Image>", "../../etc/passwd", "file=/etc/passwd", "file:///etc/passwd",
    "/gradio_api/file=/etc/passwd", "https://example.com/a.png", "[IMG0]", "<script>x()</script>",
    "![a](/etc/passwd)", "${7*7} {{7*7}}",
]  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_chat_view_escapes_user_text(typed: str, tmp_path: Path) -> None:
    session = Sessions(tmp_path).get("tab", "ada")
    human = session.build_turn(typed, [])
    assert human.parts == (Text(typed),)
    assert not tiny_encoder().encode(Conversation((human,))).media_positions  # where media would go
    session.rounds.append(Round(human, AnswerState(0, text=typed, stopped=True)))
    messages, rounds = chat_messages(session, notice=typed)
    shown = messages[0]["content"][0]
    assert "<" not in shown and unescape(shown) == typed and unescape_text(shown) == typed
    assert messages[1]["content"][0] == shown
    notice = messages[-1]["content"][0].value
    assert "<script" not in notice and "<Image" not in notice
    assert rounds == [0, 0, 1]


def test_explanation_escapes_tokens_and_marks_signal_spans() -> None:
    names = ("Ġ<b>", "[IMG0]", "[IMG1]", "</s>")
    reply = AnswerState(5, turn=Turn("assistant", (Text("<b>"), Media("image"))), token_names=names)
    reply.finished = Finished(((("a <i>red</i> circle", 0.25),),), {"image": 1.5})
    html = explanation_html(reply)
    assert "<b>" not in html and "<i>" not in html and "·&lt;b&gt;" in html
    assert html.count('class="span image"') == 2  # in the tokens, and beside the caption
    assert "a &lt;i&gt;red&lt;/i&gt; circle" in html and "1.50" in html and "Seed 5" in html


def test_explanation_covers_unfinished_answers() -> None:
    reply = AnswerState(5, text="Su")
    assert explanation_html(reply) == ""
    reply.update(
        TurnComplete(Turn("assistant", (Text("Sure"), Media("image"))), ("Sure", "[IMG0]"))
    )
    assert explanation_html(reply) == ""  # it is on its way
    reply.stopped = True
    html = explanation_html(reply)
    assert "Sure" in html and "[IMG0]" in html and "Seed 5" in html
    assert "Seconds" not in html and "nearest" not in html
    stopped = AnswerState(5, text="Su", token_names=("Su", "re"), stopped=True)  # in its words
    assert "<code>re</code>" in explanation_html(stopped)


def test_chat_view_names_failed_media_and_shows_the_others(tmp_path: Path) -> None:
    session = Sessions(tmp_path).get("tab", "ada")
    reply = AnswerState(5, turn=Turn("assistant", (Media("image"), Media("audio"))))
    session.rounds.append(Round(session.build_turn("draw", []), reply))
    reply.update(MediumNotMade(0, f"the picture was not made: {PROJECT_ROOT}/sd is no <folder>"))
    reply.update(MediumSaved(1, session.new_folder() / "audio_2.wav"))
    shown = [one.value for one in chat_messages(session)[0][1]["content"]]
    assert "the picture was not made: sd is no &lt;folder&gt;" in shown[0]
    assert "audio_2.wav" in shown[1]


def test_chat_view_tells_that_the_conversation_expired(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path)
    session = sessions.get("tab", "ada")
    sessions.sweep(idle=-1)
    assert chat_messages(sessions.get("tab", "ada")) == ([], [])  # it had no rounds
    session = sessions.get("tab", "ada")
    for _ in range(2):  # also of one that is a continuation already
        session.rounds.append(Round(session.build_turn("hi", []), AnswerState(0, text="ho")))
        sessions.sweep(idle=-1)
        session = sessions.get("tab", "ada")
    session.rounds.append(Round(session.build_turn("hi", []), AnswerState(0, text="ho")))
    messages, rounds = chat_messages(session)
    assert EXPIRED in messages[0]["content"][0].value and rounds == [-1, 0, 0]
    session.clear()
    assert chat_messages(session) == ([], [])


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_nearest_captions_finds_the_embedded_caption(modality: str) -> None:
    encoder = TextEncoder(modality, str(tiny_decoder(modality)), torch.device("cpu"))
    captions = CaptionBank.from_file(BANK).captions[modality]
    assert len(captions) == {"image": 480, "video": 2880, "audio": 36}[modality]
    assert captions == bank_captions(modality)
    assert all(parse_caption(caption) for caption in captions)
    bank = CaptionBank({modality: captions[:30]})
    for index in (0, 7, 29):
        near = bank.nearest(encoder, encoder.encode([captions[index]])[0])
        assert near[0][1] < 1e-6 and near[0][1] <= near[1][1] <= near[2][1]
        found = encoder.encode([near[0][0]])
        torch.testing.assert_close(found, encoder.encode([captions[index]]))


def test_caption_bank_equals_its_scripts_output(tmp_path: Path) -> None:
    write_caption_bank(tmp_path / "bank.json")
    assert (tmp_path / "bank.json").read_bytes() == BANK.read_bytes()


def test_nearest_captions_are_optional(tmp_path: Path) -> None:
    assert load_config("7b").serving.caption_bank is None
    assert load_config("7b").serving.examples is None
    turn = Turn("assistant", (Media("image"),))
    state = AnswerState(5, turn=turn, token_names=("[IMG0]",))
    state.finished = Finished(None, {"image": 1.5})
    html = explanation_html(state)
    assert "[IMG0]" in html and "1.50" in html and "nearest" not in html
    encoder = TextEncoder("image", str(tiny_decoder("image")), torch.device("cpu"))
    assert CaptionBank({"audio": ["a"]}).nearest(encoder, torch.zeros(encoder.shape)) == ()
    (tmp_path / "bank.json").write_text('{"image": "no list"}')
    with pytest.raises(UserError, match=r"bank\.json: image"):
        CaptionBank.from_file(tmp_path / "bank.json")


def test_serving_does_not_import_the_mini_world() -> None:
    loaded = "import sys, nextgpt.serving.server as _; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert "nextgpt.serving.page" in modules.stdout, modules.stderr
    assert "mini_world" not in modules.stdout


def test_examples_cover_four_cases_within_the_limits() -> None:
    examples = read_examples(EXAMPLES)
    assert [e.name for e in examples] == ["T+I→T+A", "T+V→T+A", "T+I→T+I+V", "T→T+I+V+A"]
    kinds = [check_medium(e.file, "it") if e.file else None for e in examples]
    assert kinds == ["image", "video", "image", None]


def test_session_of_many_rounds_reads_answered_turns_only(tmp_path: Path) -> None:
    session = Session("ada", tmp_path / "s")
    questions = [Turn("human", (Text(str(i)),)) for i in range(3)]
    session.rounds = [
        Round(questions[0], AnswerState(0, text="zero", stopped=True)),
        Round(questions[1], AnswerState(0, error="broken")),
        Round(questions[2], AnswerState(0, text="two")),
    ]
    zero, two = (Turn("assistant", (Text(word),)) for word in ("zero", "two"))
    assert session.turns() == (questions[0], zero, questions[2], two)


def test_limits_accept_generated_audio(tmp_path: Path) -> None:
    save_medium(Sound(np.zeros(16000, np.float32), 16000), tmp_path / "a.wav")
    assert check_medium(tmp_path / "a.wav", "it") == "audio"
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert check_medium(tmp_path / "a.png", "it") == "image"


def test_temporary_folders_of_dead_processes_alone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    abandoned, elsewhere = tmp_path / "nextgpt_demo_gone", tmp_path / "elsewhere"
    for folder in (abandoned, elsewhere, tmp_path / "other"):
        folder.mkdir()
        written(folder / "visitors.png", b"x")
    (tmp_path / "nextgpt_demo_link").symlink_to(elsewhere)
    written(tmp_path / "nextgpt_demo_file", b"x")
    with temporary_folder() as first:
        assert not abandoned.exists()
        written(first / "a.png", b"x")
        with temporary_folder() as second:
            assert first != second and (first / "a.png").exists()
        assert not second.exists() and (first / "a.png").exists()
    assert not first.exists()
    assert (elsewhere / "visitors.png").exists() and (tmp_path / "other" / "visitors.png").exists()


def test_temporary_folder_removed_before_locking_is_recreated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made: list[Path] = []

    def make(prefix: str) -> str:
        made.append(Path(mkdtemp(prefix=prefix)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr("nextgpt.serving.temporary_folder.mkdtemp", make)
    with temporary_folder() as folder:
        assert folder == made[1].resolve() and folder.is_dir()
