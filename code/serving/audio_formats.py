"""Generated sounds in the formats of OpenAI's audio output."""

from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import av
from av.audio.resampler import AudioResampler

AudioFormat = Literal["wav", "mp3", "flac", "opus", "aac", "pcm16"]


class _Coding(NamedTuple):
    mime_type: str
    container: str  # FFmpeg's names
    codec: str
    rate: int | None = None  # samples a second; None: the sound's own


_CODINGS: dict[AudioFormat, _Coding] = {
    "wav": _Coding("audio/wav", "wav", "pcm_s16le"),
    "mp3": _Coding("audio/mpeg", "mp3", "libmp3lame"),
    "flac": _Coding("audio/flac", "flac", "flac"),
    "opus": _Coding("audio/ogg", "ogg", "libopus", 48_000),
    "aac": _Coding("audio/aac", "adts", "aac"),
    "pcm16": _Coding("audio/pcm", "s16le", "pcm_s16le", 24_000),
}


def audio_mime_type(audio_format: AudioFormat) -> str:
    """Return the MIME type of a format; pcm16 is mono, 24 kHz, little-endian."""
    return _CODINGS[audio_format].mime_type


def read_audio(path: Path, audio_format: AudioFormat) -> bytes:
    """Return the generated sound at `path`, a WAV file, in another format."""
    if audio_format == "wav":
        return path.read_bytes()
    coding = _CODINGS[audio_format]
    data = BytesIO()
    with (
        av.open(str(path)) as source,
        av.open(data, "w", format=coding.container, options={"fflags": "+bitexact"}) as target,
    ):
        sound = source.streams.audio[0]
        stream = target.add_stream(coding.codec, rate=coding.rate or sound.rate)
        stream.layout = "mono"
        codec = stream.codec_context
        codec.open()
        resampler = AudioResampler(
            codec.format, "mono", codec.sample_rate, codec.frame_size or None
        )
        for frame in (*source.decode(sound), None):
            for piece in resampler.resample(frame):
                target.mux(stream.encode(piece))
        target.mux(stream.encode(None))
    return data.getvalue()
