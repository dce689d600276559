"""Image files -> pixels of 8 bits; what these cannot say is refused, not rounded."""

import io
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Pillow's modes of at most 8 bits a channel
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def read_pixels(content: bytes, channels: int) -> NDArray[np.uint8]:
    """The pixels of an image file, upright if it says how it was held (EXIF).

    Palettes, CMYK and the like become RGB; grey becomes RGB of equal channels, and the reverse.

    Args:
        content: of the file, in any format that Pillow reads.
        channels: 1 for grey, 3 for RGB.

    Returns:
        (channels, H, W).

    Raises:
        ValueError: the file is damaged or holds several frames, it has more than 8 bits a channel,
            a transparent pixel, or colours where grey is wanted.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # checksums, and the end of the file; it has to be opened anew
        with Image.open(io.BytesIO(content)) as image:
            frames, wide = getattr(image, "n_frames", 1), _is_wide(image)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # what damaged bytes make Pillow raise has no common type
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"not a whole image file: {reason}") from error
    if frames > 1:
        raise ValueError(f"the file must hold one image, got {frames} frames")
    if wide:
        raise ValueError(f"pixels must have at most 8 bits a channel, got more (mode {image.mode})")
    if upright.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {image.mode}")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        least, _ = upright.getchannel("A").getextrema()
        if least != 255:
            raise ValueError(f"pixels must be opaque, got an alpha of {least}")
    pixels = np.asarray(upright.convert("RGB")).transpose(2, 0, 1)
    if channels == 1:
        if (pixels != pixels[0]).any():
            raise ValueError(f"pixels must be grey, got colours (mode {image.mode})")
        pixels = pixels[:1]
    return np.ascontiguousarray(pixels)


def _is_wide(image: Any) -> bool:
    """Whether the file has more than 8 bits a channel; Pillow cuts some of them off unasked."""
    for codec, _, _, arguments in image.tile:
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        raw_mode, *more = map(str, values or ("",))
        if codec.startswith("ppm") and int(more[0]) > 255:  # the largest value
            return True
        # A BMP of 16 bits has them for all channels together.
        if codec == "SGI16" or re.search(r"(?<!BGR);(12|16|32|64)", raw_mode):
            return True
    return False
