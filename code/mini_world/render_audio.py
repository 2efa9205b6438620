"""Audio synthesis: 2 s of mono at 16 kHz, one to three notes of one of six timbres; 3 ms a sound.

| timbre | synthesis |
| --- | --- |
| bell | inharmonic partials with exponential decay |
| buzzer | many strong harmonics, amplitude-modulated by a square wave |
| flute | nearly one harmonic, soft attack, vibrato, breath noise |
| chime | three staggered tones with exponential decay |
| drum | a tone falling in pitch and a noise burst |
| whistle | one high tone with a trill |

Nuisance variables: loudness, phase, leading silence, 1 % in pitch, and light noise.
"""

from collections.abc import Callable

import numpy as np

from nextgpt.mini_world.objects import WorldObject

SAMPLE_RATE = 16_000  # Hz
SECONDS = 2.0
NOTE_SECONDS = 0.40
NOTE_PERIOD = 0.60  # seconds from onset to onset: a gap of 0.2 s
LEADING_SILENCE = (0.02, 0.20)  # range in seconds
FREQUENCY = {  # Hz
    "bell": {"low": 480.0, "high": 1080.0},
    "buzzer": {"low": 130.0, "high": 320.0},
    "flute": {"low": 330.0, "high": 760.0},
    "chime": {"low": 900.0, "high": 2000.0},
    "drum": {"low": 85.0, "high": 200.0},
    "whistle": {"low": 1350.0, "high": 2900.0},
}


def render_audio(obj: WorldObject, rng: np.random.Generator) -> np.ndarray:
    """Synthesise the sound of `obj`: (32000,) float32 in -1..1 at 16 kHz."""
    frequency = FREQUENCY[obj.timbre][obj.pitch] * rng.uniform(0.99, 1.01)
    loudness, silence = rng.uniform(0.35, 0.9), rng.uniform(*LEADING_SILENCE)
    time = np.arange(int(NOTE_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    samples = np.zeros(int(SECONDS * SAMPLE_RATE))
    for index in range(obj.count):
        note = _SYNTHESIZERS[obj.timbre](time, frequency, rng) * _envelope(time, 0.004, 0.02)
        start = int((silence + index * NOTE_PERIOD) * SAMPLE_RATE)
        samples[start : start + len(time)] = loudness * note / np.abs(note).max()
    samples += rng.uniform(0.0003, 0.002) * rng.standard_normal(len(samples))
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


def _envelope(time: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Linear attack and release, in seconds."""
    return np.clip(np.minimum(time / attack, (NOTE_SECONDS - time) / release), 0.0, 1.0)


def _tone(cycles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sine of random phase; `cycles` is frequency times time."""
    return np.sin(2 * np.pi * (cycles + rng.uniform()))


def _bell(time: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    partials = ((1.0, 1.0), (2.0, 0.55), (2.76, 0.45), (4.07, 0.3), (5.4, 0.25))
    return sum(
        strength * np.exp(-5.0 * np.sqrt(ratio) * time) * _tone(ratio * frequency * time, rng)
        for ratio, strength in partials
    )


def _buzzer(time: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    harmonics = range(1, int(5000 / frequency) + 1)
    wave = sum(_tone(k * frequency * time, rng) / k**0.5 for k in harmonics)
    return wave * (0.75 + 0.25 * np.sign(np.sin(2 * np.pi * 25 * time)))


def _flute(time: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    cycles = frequency * (time + 0.0006 * np.sin(2 * np.pi * 5.5 * time))
    tone = sum(a * _tone(k * cycles, rng) for k, a in ((1, 1.0), (2, 0.2), (3, 0.06)))
    breath = 0.03 * rng.standard_normal(len(time))
    return (tone + breath) * _envelope(time, 0.09, 0.09)


def _chime(time: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    sound = np.zeros(len(time))
    for delay, ratio, strength in ((0.0, 1.0, 1.0), (0.08, 1.26, 0.8), (0.16, 1.587, 0.7)):
        late = np.maximum(time - delay, 0.0)
        struck = np.minimum(late / 0.003, 1.0) * np.exp(-7.0 * late)
        note = _tone(ratio * frequency * late, rng) + 0.25 * _tone(
            3 * ratio * frequency * late, rng
        )
        sound += strength * struck * note
    return sound


def _drum(time: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    fall = 1.2 * (1 - np.exp(-25.0 * time)) / 25.0  # integral of the decaying pitch offset
    tone = np.exp(-8.0 * time) * _tone(frequency * (time + fall), rng)
    return tone + 0.5 * np.exp(-50.0 * time) * rng.standard_normal(len(time))


def _whistle(time: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    trill = 0.07 / (2 * np.pi * 15) * np.sin(2 * np.pi * (15 * time + rng.uniform()))
    tone = _tone(frequency * (time + trill), rng) + 0.02 * rng.standard_normal(len(time))
    return tone * _envelope(time, 0.03, 0.04)


_SYNTHESIZERS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "bell": _bell,
    "buzzer": _buzzer,
    "flute": _flute,
    "chime": _chime,
    "drum": _drum,
    "whistle": _whistle,
}
