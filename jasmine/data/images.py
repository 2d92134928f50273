"""Opens images that come from elsewhere, in the few formats that pictures of worlds have.

Pillow tells a file's format by its contents, whatever it is called, and of its decoders one runs Ghostscript.
"""

import io
import os
import struct

from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# What Pillow raises for images that it cannot, or for their size will not, decode.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def open_image(source: bytes | str | os.PathLike[str]) -> Image.Image:
    """An encoded image, or the one in a file, whose size is known and whose pixels are not decoded yet.

    Raises:
        one of `IMAGE_ERRORS`, as the image's methods do.
    """
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
