"""Synthetic ultrasound-like images in three classes: no lesion, smooth ellipse, spiculated mass.

An image depends only on (seed, patient, image). A patient has one diagnosis, one tissue and one lesion; images differ
in position, tilt, contrast, gain and speckle. Brightness and lesion position are drawn independently of the class, so
single pixels carry almost no information: only shape and edges separate the classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_shards.config import PhantomConfig
from data_shards.source.row import ImageSet, Row

Echo = npt.NDArray[np.float64]

CLASSES = ("no lesion", "smooth ellipse", "spiculated mass")


def diagnosis(patient: int) -> int:
    """Index of the patient's class: classes alternate from patient to patient."""
    return patient % len(CLASSES)


def phantom(config: PhantomConfig, seed: int, patient: int, image: int) -> npt.NDArray[np.uint8]:
    """One image, uint8 (side, side)."""
    of_patient = np.random.default_rng([seed, patient])
    of_image = np.random.default_rng([seed, patient, image + 1])
    side = config.side
    y, x = np.meshgrid(*(np.linspace(-1, 1, side),) * 2, indexing="ij")
    echo = _tissue(of_patient, of_image, x, y)
    echo *= _lesion(diagnosis(patient), of_patient, of_image, x, y, contrast=config.contrast)
    # Tissue absorbs sound; the scanner's depth gain never compensates it exactly.
    echo *= np.exp(-of_image.uniform(-0.6, 0.6) * y)
    grain = _speckle(of_image, side)
    echo *= (1 - config.speckle) + config.speckle * grain
    return _displayed(echo, of_image)


def _tissue(of_patient: np.random.Generator, of_image: np.random.Generator, x: Echo, y: Echo) -> Echo:
    """Echo of healthy tissue, around 1: clouds of fat and gland, crossed by bright layers of fascia."""
    shift_x, shift_y = of_image.uniform(-0.3, 0.3, 2)
    clouds = np.zeros_like(x)
    for _ in range(6):
        angle, phase = of_patient.uniform(0, 2 * np.pi, 2)
        wave = of_patient.uniform(1.0, 4.0)
        clouds += np.sin(wave * (np.cos(angle) * (x + shift_x) + np.sin(angle) * (y + shift_y)) + phase)
    layers = np.zeros_like(x)
    for _ in range(of_patient.integers(2, 4)):
        depth, tilt, bend = of_patient.uniform(-1, 1), of_patient.uniform(-0.25, 0.25), of_patient.uniform(-0.2, 0.2)
        distance = y + shift_y - depth - tilt * x - bend * x**2
        layers += of_patient.uniform(0.15, 0.4) * np.exp(-((distance / 0.05) ** 2))
    return 1 + 0.12 * clouds + layers


def _lesion(
    label: int,
    of_patient: np.random.Generator,
    of_image: np.random.Generator,
    x: Echo,
    y: Echo,
    *,
    contrast: tuple[float, float],
) -> Echo:
    """Factor for the echo: below 1 inside the lesion and in the shadow of a mass, above 1 behind an ellipse."""
    size, stretch, tilt = of_patient.uniform(0.27, 0.45), of_patient.uniform(1.2, 1.7), of_patient.uniform(-0.4, 0.4)
    num_spikes, spikes = of_patient.integers(7, 12), of_patient.uniform(0.6, 1.0, 12)
    spike_phase = of_patient.uniform(0, 2 * np.pi)
    center_x, center_y = of_image.uniform(-0.75, 0.75, 2)
    tilt += of_image.uniform(-0.3, 0.3)
    size *= of_image.uniform(0.9, 1.1)
    depth = of_image.uniform(*contrast)
    if label == 0:
        return np.ones_like(x)
    u = np.cos(tilt) * (x - center_x) + np.sin(tilt) * (y - center_y)
    v = -np.sin(tilt) * (x - center_x) + np.cos(tilt) * (y - center_y)
    below = y - center_y
    if label == 1:
        # Wider than tall, with the area of a circle of radius `size` and a sharp rim.
        radius = np.hypot(u / np.sqrt(stretch), v * np.sqrt(stretch))
        inside = _step((size - radius) / 0.03)
        behind = 0.25 * _step((size * 0.8 - np.abs(x - center_x)) / 0.08) * _step((below - size * 0.5) / 0.08)
        return (1 + behind * (1 - inside)) * (1 - depth * inside)
    angle = np.arctan2(v, u) + spike_phase
    spike = np.abs(np.cos(angle * num_spikes / 2)) ** 6
    which = np.floor((angle / (2 * np.pi) % 1) * num_spikes + 0.5).astype(int) % num_spikes
    rim = size * 0.72 * (1 + 1.5 * spike * spikes[which])
    inside = _step((rim - np.hypot(u, v)) / 0.03)
    behind = 0.3 * _step((size * 0.7 - np.abs(x - center_x)) / 0.08) * _step((below - size * 0.4) / 0.08)
    return (1 - behind * (1 - inside)) * (1 - depth * inside)


def _step(value: Echo) -> Echo:
    """A smooth step from 0 to 1 around zero; tanh because exp would overflow."""
    return 0.5 * (1 + np.tanh(value))


def _speckle(rng: np.random.Generator, side: int) -> Echo:
    """Summed amplitude of many scatterers, mean 1: grains one or two pixels high, and wider than high."""
    scatterers = rng.standard_normal((side, side)) + 1j * rng.standard_normal((side, side))
    frequency = np.fft.fftfreq(side)
    blur = np.exp(-2 * np.pi**2 * ((0.7 * frequency[:, None]) ** 2 + (1.1 * frequency[None, :]) ** 2))
    amplitude: Echo = np.abs(np.fft.ifft2(np.fft.fft2(scatterers) * blur))
    mean: float = amplitude.mean()
    return amplitude / mean


def _displayed(echo: Echo, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The echo as displayed: compressed, then set to a mean and spread that do not depend on the class."""
    shown: Echo = np.log1p(3 * np.maximum(echo, 0))
    shown = (shown - shown.mean()) / max(float(shown.std()), 1e-6)
    gray = rng.uniform(85, 140) + rng.uniform(26, 40) * shown
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class PhantomReader:
    """Draws the synthetic images."""

    config: PhantomConfig
    seed: int

    def read(self, row: Row) -> npt.NDArray[np.uint8]:
        """uint8 (side, side)."""
        return phantom(self.config, self.seed, int(row.where.removeprefix("patient")), row.frame)

    def inside(self, row: Row) -> str:
        """See Reader: the row's name, because phantoms have no file."""
        return row.where

    def stamp(self, row: Row) -> str:
        """See Reader: a phantom depends only on its settings."""
        return f"{self.config.model_dump_json()}|{self.seed}|{row.where}"


def draw_phantoms(config: PhantomConfig, seed: int) -> ImageSet:
    """The synthetic images, grouped by patient."""
    rows = [
        Row(f"patient{patient:05d}", image, (diagnosis(patient),), None, f"patient{patient:05d}")
        for patient in range(config.num_patients)
        for image in range(config.images_per_patient)
    ]
    return ImageSet(rows, CLASSES, "multiclass", (), PhantomReader(config, seed))
