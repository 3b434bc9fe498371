"""Instruments by additive synthesis: partials that swell, decay and bloom, a breath, a vibrato; and drums.

T samples. Plucked and struck strings are partials with decays of their own rather than a delay line, so that their
pitch is exact and can glide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Voice:
    """An instrument. Times in seconds.

    `slope`: partial n has the strength n^-slope, times `emphasis` where it is listed. `decay`: the first partial falls
    to 1/e in this time, partial n in decay / (1 + damping (n - 1)); 0 sustains. `bloom`: partial n comes in so much
    later than partial n - 1 (the jivari of a sitar). `stretch`: inharmonicity, f_n = n f sqrt(1 + stretch n^2).
    `tonic_hz`: what it is tuned to, which ragas and makams stand on, and the lowest tonic of a key.
    """

    name: str
    phrase: str
    tonic_hz: float
    partials: int
    slope: float
    emphasis: tuple[float, ...] = ()
    attack: float = 0.01
    release: float = 0.06
    decay: float = 0.0
    damping: float = 0.0
    bloom: float = 0.0
    breath: float = 0.0
    vibrato_hz: float = 5.5
    vibrato_cents: float = 0.0
    stretch: float = 0.0
    glides: bool = False

    def strengths(self, count: int) -> NDArray[np.float64]:
        number = np.arange(1, count + 1)
        strength = number**-self.slope
        strength[: len(self.emphasis)] *= self.emphasis[:count]
        return strength / strength.sum()

    def play(self, pitch_hz: Wave, rng: np.random.Generator, rate_hz: int) -> Wave:
        """A note that follows a pitch (T,), with its release beyond the end, at a peak of about one."""
        tail = round(self.release * rate_hz)
        pitch = np.concatenate([pitch_hz, np.full(tail, pitch_hz[-1])]).astype(np.float64)
        seconds = np.arange(len(pitch)) / rate_hz
        if self.vibrato_cents:
            depth = self.vibrato_cents * np.clip((seconds - 0.12) / 0.15, 0, 1)
            turn = 2 * np.pi * (self.vibrato_hz * rng.uniform(0.92, 1.08) * seconds + rng.random())
            pitch = pitch * 2 ** (depth * np.sin(turn) / 1200)
        phase = 2 * np.pi * np.cumsum(pitch) / rate_hz
        count = int(np.clip(0.45 * rate_hz / pitch.max(), 1, self.partials))
        wave = np.zeros(len(pitch), np.float32)
        for n, (strength, partial) in enumerate(zip(self.strengths(count), self._partials(phase, seconds, count))):
            if self.bloom:
                partial = partial * np.clip((seconds - self.bloom * n) / 0.02 + 0.25, 0, 1)
            wave += np.float32(strength) * partial
        if self.breath:
            wave += self.breath * _breath(rng, len(wave))
        return (wave * self._envelope(seconds, tail, rate_hz)).astype(np.float32)

    def _partials(self, phase: NDArray[np.float64], seconds: NDArray[np.float64], count: int) -> Iterator[Wave]:
        """Each partial with its decay, (T,). Harmonic ones are powers of one turning number, which spares the sines."""
        decay = 1 / self.decay if self.decay else 0.0
        first = np.exp(-decay * seconds).astype(np.float32)
        if self.stretch:
            for n in range(1, count + 1):
                turn = n * np.sqrt(1 + self.stretch * n * n) * phase
                yield first * np.exp(-decay * self.damping * (n - 1) * seconds) * np.sin(turn)
            return
        turning = np.exp(1j * phase).astype(np.complex64)
        further = turning * np.exp(-decay * self.damping * seconds).astype(np.float32)
        power = turning * first
        for _ in range(count):
            yield power.imag
            power = power * further

    def _envelope(self, seconds: NDArray[np.float64], tail: int, rate_hz: int) -> NDArray[np.float64]:
        rise = np.clip(seconds / self.attack, 0, 1)
        fall = np.ones(len(seconds))
        if tail:
            fall[-tail:] = np.linspace(1, 0, tail)
        return np.sin(rise * np.pi / 2) ** 2 * np.sin(fall * np.pi / 2) ** 2


def _breath(rng: np.random.Generator, length: int) -> NDArray[np.float64]:
    """Noise without much treble."""
    noise = rng.standard_normal(length + 3)
    return (noise[3:] + noise[2:-1] + noise[1:-2] + noise[:-3]) / 4


VOICES = {
    voice.name: voice
    for voice in (
        Voice("flute", "a flute", 262, 6, 1.9, (1, 1.2, 0.9), attack=0.06, breath=0.012, vibrato_cents=9, glides=True),
        Voice("violin", "a violin", 220, 18, 1.1, (0.8, 1, 1.1, 1), attack=0.08, vibrato_cents=16, glides=True),
        Voice("piano", "a piano", 220, 14, 1.35, attack=0.004, release=0.12, decay=1.1, damping=0.3, stretch=1e-4),
        Voice("bass", "a bass", 55, 14, 1.5, (1.2, 1), attack=0.008, release=0.08, decay=1.0, damping=0.5),
        Voice(
            "sitar",
            "a sitar",
            139,
            24,
            0.75,
            attack=0.003,
            release=0.1,
            decay=1.6,
            damping=0.12,
            bloom=0.006,
            glides=True,
        ),
        Voice("ney", "a ney", 196, 8, 1.4, (0.8, 1.3, 1.1), attack=0.09, breath=0.03, vibrato_cents=12, glides=True),
        Voice(
            "oud", "an oud", 110, 16, 1.15, (1, 1.2), attack=0.004, release=0.08, decay=0.7, damping=0.35, glides=True
        ),
    )
}
PLAYED = {
    "western": ("flute", "violin", "piano", "bass", "sitar"),
    "raga": ("sitar", "flute", "violin"),
    "makam": ("ney", "oud", "violin"),
}
TANPURA = Voice("tanpura", "a tanpura", 65, 24, 0.6, attack=0.01, release=0.3, decay=1.8, damping=0.05, bloom=0.02)

#: (pitch at the start and at the end in Hz, time of decay in seconds, share of noise)
_DRUM = {"low": (130.0, 82.0, 0.12, 0.05), "high": (420.0, 400.0, 0.06, 0.3), "rim": (800.0, 760.0, 0.025, 0.7)}
STROKE_SECONDS = 0.3


def drum_stroke(kind: str, rng: np.random.Generator, rate_hz: int) -> Wave:
    """One stroke of a hand drum, with a peak of about one."""
    first, last, decay, noise = _DRUM[kind]
    seconds = np.arange(round(STROKE_SECONDS * rate_hz)) / rate_hz
    pitch = last + (first - last) * np.exp(-seconds / 0.03)
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate_hz)
    wave = (1 - noise) * tone + noise * rng.standard_normal(len(seconds))
    return (wave * np.exp(-seconds / decay) * np.clip(seconds / 0.002, 0, 1)).astype(np.float32)
