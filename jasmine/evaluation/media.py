"""Pictures of videos: arrays under jit for the training loop; for people, clips side by side with their actions drawn on,
as GIF, mp4 and plots of curves.

Nothing is drawn over a frame: captions stand above, the frame's number and action in a strip below. `actions[t]` is the
action taken at frame t, so the strip under frame t names what leads to frame t + 1. Frames are enlarged by a whole factor
without smoothing, so a pixel stays a pixel.
"""

import dataclasses
import fractions
import io
import os
from collections.abc import Mapping, Sequence

import av
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from jasmine.training.run_files import write_atomically

TILE_PIXELS = 160  # small frames are enlarged up to about this height
BACKGROUND, INK, FAINT = (250, 249, 247), (28, 28, 32), (138, 136, 132)
# Actions keep their colour over clips and pictures; beyond ten they share.
ACTION_COLOURS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (148, 103, 189),
    (230, 126, 20),
    (23, 150, 170),
    (214, 90, 170),
    (60, 70, 170),
    (176, 122, 0),
    (110, 110, 110),
)
DEFAULT_FPS = 10.0


def comparison(truth_BTHWC: jax.Array, guess_BTHWC: jax.Array, *, clips: int = 4, frames: int = 8) -> jax.Array:
    """True frames above guessed ones, clip below clip, small frames enlarged: (H', W', 3) float in [0, 1]. Runs under jit.

    Args:
        truth_BTHWC, guess_BTHWC: float in [0, 1].
        clips: how many of the batch at most.
        frames: how many of each clip at most, evenly spaced.
    """
    B, T = truth_BTHWC.shape[:2]
    chosen = jnp.linspace(0, T - 1, min(frames, T)).round().astype(jnp.int32)
    pairs = jnp.stack([truth_BTHWC, guess_BTHWC], axis=1)[: min(clips, B), :, chosen]
    pairs = jnp.pad(pairs, ((0, 0),) * 3 + ((1, 1), (1, 1), (0, 0)), constant_values=1.0)
    image = rearrange(jnp.clip(pairs, 0, 1), "b two t h w c -> (b two h) (t w) c")
    enlarge = max(1, 128 // truth_BTHWC.shape[2])  # game frames are small; a person looks at this
    image = image.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    return jnp.broadcast_to(image, (*image.shape[:2], 3)) if image.shape[-1] == 1 else image


def to_uint8(video: np.ndarray | jax.Array) -> np.ndarray:
    """Float in [0, 1], any shape, rounded to uint8; uint8 as it is."""
    video = np.asarray(video)
    return video if video.dtype == np.uint8 else (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Column:
    """One version of the clips: `videos` (B, T, H, W, C), uint8 or float in [0, 1], C 1 or 3; `caption` stands above it."""

    caption: str
    videos: np.ndarray


def side_by_side(
    columns: Sequence[Column],
    *,
    actions_BT: np.ndarray | None = None,
    action_names: Sequence[str] = (),
    prompt_frames: int = 0,
    wide: int = 2,
    tile: int = TILE_PIXELS,
) -> np.ndarray:
    """Several versions of several clips beside each other, `wide` clips in a row: (T, H', W', 3) uint8.

    Args:
        columns: versions of the same clips (truth, generated …), all (B, T, H, W, C).
        actions_BT: int, the action at each frame; below zero where there is none; None for clips without actions.
        action_names: by action number; numbers without a name are drawn as they are.
        prompt_frames: leading frames that were given rather than generated; the strip says so.
        wide: clips in a row.
        tile: small frames are enlarged by the largest whole factor that keeps them at or under this height in pixels.
    """
    B, T, H, W = columns[0].videos.shape[:4]
    scale = max(1, tile // H)
    font = ImageFont.load_default(13)
    gap, line = 14, 22
    cell_width = len(columns) * W * scale + 4 * (len(columns) - 1)
    cell_height = line + H * scale + line
    wide = min(wide, B)
    rows = -(-B // wide)
    size = (gap + wide * (cell_width + gap), gap // 2 + rows * (cell_height + gap // 2))
    videos = [_enlarged(column.videos, scale) for column in columns]
    pictures = np.empty((T, size[1], size[0], 3), np.uint8)
    for t in range(T):
        picture = Image.new("RGB", size, BACKGROUND)
        draw = ImageDraw.Draw(picture)
        for clip in range(B):
            left, top = gap + clip % wide * (cell_width + gap), gap // 2 + clip // wide * (cell_height + gap // 2)
            for index, (column, video) in enumerate(zip(columns, videos, strict=True)):
                x = left + index * (W * scale + 4)
                caption = _fitted(draw, column.caption, font, W * scale)
                draw.text((x, top + line // 2), caption, INK, font, anchor="lm")
                picture.paste(Image.fromarray(video[clip, t]), (x, top + line))
            middle = top + line + H * scale + line // 2 + 1
            place = f"frame {t} · given" if t < prompt_frames else f"frame {t}"
            draw.text((left, middle), place, FAINT, font, anchor="lm")
            action = -1 if actions_BT is None else int(actions_BT[clip, t])
            if action >= 0:
                name = action_names[action] if action < len(action_names) else f"action {action}"
                name = _fitted(draw, name, font, cell_width - draw.textlength(place, font) - 24)
                begin = left + cell_width - draw.textlength(name, font) - 12
                box = (begin, middle - 9, left + cell_width - 1, middle + 8)
                draw.rounded_rectangle(box, 8, ACTION_COLOURS[action % len(ACTION_COLOURS)])
                draw.text((begin + 6, middle), name, "white", font, anchor="lm")
        pictures[t] = np.asarray(picture)
    return pictures


def _enlarged(videos: np.ndarray, scale: int) -> np.ndarray:
    pixels = to_uint8(videos).repeat(scale, axis=2).repeat(scale, axis=3)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3)) if pixels.shape[-1] == 1 else pixels


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float
) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis."""
    fitted = text
    while len(text) > 1 and draw.textlength(fitted, font) > width:
        text = text[:-1]
        fitted = text.rstrip() + "…"
    return fitted


def gif(pictures_THWC: np.ndarray, fps: float | None = None) -> bytes:
    """An endless GIF of uint8 (T, H, W, 3) pictures, with one palette for all frames, so that nothing flickers.

    Args:
        fps: pictures a second; None for 10. GIFs hold times in hundredths of a second.
    """
    # The palette is made from about a million pixels spread over all pictures; more only takes longer.
    step = max(1, int(np.sqrt(pictures_THWC[..., 0].size / 1e6)))
    sample = np.concatenate(list(pictures_THWC[:, ::step, ::step]))
    drawn = (BACKGROUND, INK, FAINT, (255, 255, 255), *ACTION_COLOURS)  # too few pixels for the search to keep them
    found = Image.fromarray(sample).quantize(256 - len(drawn), Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*found, *(value for colour in drawn for value in colour)])
    frames = [Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures_THWC]
    buffer = io.BytesIO()
    duration = max(20, round(1000 / (fps or DEFAULT_FPS)))  # browsers slow down what is shorter
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=False)
    return buffer.getvalue()


def mp4(pictures_THWC: np.ndarray, fps: float | None = None) -> bytes:
    """A video of uint8 (T, H, W, 3) pictures that browsers play: H.264, 4:2:0, padded to even sides.

    Args:
        fps: pictures a second; None for 10.
    """
    H, W = pictures_THWC.shape[1:3]
    padded = np.pad(pictures_THWC, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    rate = fractions.Fraction(fps or DEFAULT_FPS).limit_denominator(1000)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = W + W % 2, H + H % 2, "yuv420p"
        for picture in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_gif(path: str | os.PathLike[str], pictures_THWC: np.ndarray, fps: float | None = None) -> None:
    """Writes `gif`. Raises UserError where the file cannot be written."""
    write_atomically(epath.Path(path), gif(pictures_THWC, fps))


def write_mp4(path: str | os.PathLike[str], pictures_THWC: np.ndarray, fps: float | None = None) -> None:
    """Writes `mp4`. Raises UserError where the file cannot be written."""
    write_atomically(epath.Path(path), mp4(pictures_THWC, fps))


def curve_plot(curves: Mapping[str, np.ndarray], ylabel: str, prompt_frames: int = 0) -> bytes:
    """A PNG of metrics over the frames of a clip.

    Args:
        curves: by name, (S,) each, entry t of frame t; NaN where there is none.
        ylabel: the metric and its unit.
        prompt_frames: leading frames that were given: shaded.
    """
    # Without a display, and without touching the state that pyplot keeps.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), layout="constrained", facecolor=np.array(BACKGROUND) / 255)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    if prompt_frames:
        axes.axvspan(-0.5, prompt_frames - 0.5, color="0.92", label="given")
    for number, (name, curve) in enumerate(curves.items()):
        colour = np.array(ACTION_COLOURS[number % len(ACTION_COLOURS)]) / 255
        order = 3 - 0.1 * number  # the first on top: it is what the plot is about
        axes.plot(
            np.arange(len(curve)), curve, "o-", label=name, color=colour, linewidth=1.8, markersize=3, zorder=order
        )
    axes.set(xlabel="frame", ylabel=ylabel)
    axes.set_xlim(-0.5, max(map(len, curves.values())) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1 or prompt_frames:
        figure.legend(frameon=False, loc="outside upper center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
