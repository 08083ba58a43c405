from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config.schema import DataConfig
from conv2former.data import batches, eval_loader, images
from conv2former.data.images import UnreadableImage, open_rgb, to_rgb
from conv2former.data.sources import open_split

from .test_tars import write as write_tar

GREYS = np.array([[0, 256, 0x1234, 65535]], dtype=np.uint16)
COLOURS = np.array([[[0, 256, 0x1280], [65535, 0x8000, 0x80FF]]], dtype=np.uint16)


def png(width: int, depth: int, colour_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """Returns a PNG of one row: Pillow writes no 16-bit colour and no transparent value of few bits."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)), (b"tRNS", transparent)]
    chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
        if data or kind == b"IEND"
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(values: np.ndarray, photometric: int, sample_format: int = 1, bits: int | None = None) -> bytes:
    """Returns a little-endian TIFF of one row, (1, width[, samples]), that holds the values as they are."""
    width, samples = values.shape[1], values[0, 0].size
    entries = {256: width, 257: 1, 258: bits or 8 * values.itemsize, 259: 1, 262: photometric, 273: 0, 277: samples}
    entries |= {278: 1, 279: values.nbytes, 339: sample_format}
    start = 8 + 2 + 12 * len(entries) + 4
    packed, lists = b"", b""
    entries[273] = start + 4 * samples  # behind two lists of one short each for every sample
    for tag, value in entries.items():
        if tag in (258, 339) and samples > 1:
            packed += struct.pack("<HHII", tag, 3, samples, start + len(lists))
            lists += struct.pack("<H", value) * samples
        else:
            packed += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + packed + bytes(4) + lists.ljust(4 * samples, b"\0") + values.tobytes()


def row(content: bytes, value_range=None) -> list[list[int]]:
    image = open_rgb(content, "it", value_range)
    assert image.mode == "RGB"
    return np.asarray(image)[0].tolist()


def greys(content: bytes, value_range=None) -> list[int]:
    pixels = row(content, value_range)
    assert all(len(set(pixel)) == 1 for pixel in pixels)
    return [pixel[0] for pixel in pixels]


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def refused(content, match: str, value_range=None) -> None:
    with pytest.raises(UnreadableImage, match=match) as caught:
        open_rgb(content, "the name", value_range)
    assert str(caught.value).startswith("the name: ")
    assert "\n" not in str(caught.value)
    assert caught.value.name == "the name"


SCALED = [0, 1, 18, 255]  # GREYS, rounded


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_16_bits_are_scaled_and_not_clipped(mode, tmp_path):
    values = GREYS.astype(">u2") if mode == "I;16B" else GREYS.astype("<u2")
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == SCALED
    for kind in ("PNG", "TIFF"):
        if mode in ("I;16", "I;16B"):
            path = tmp_path / f"grey.{kind}"
            path.write_bytes(encoded(image, kind))
            assert greys(path.read_bytes()) == SCALED
            assert np.asarray(open_rgb(path, "it"))[0, :, 2].tolist() == SCALED


def test_16_bits_in_other_files():
    values = Image.fromarray(GREYS)
    assert greys(encoded(values, "TIFF", compression="tiff_lzw")) == SCALED
    assert greys(encoded(values, "JPEG2000", irreversible=False)) == SCALED
    assert greys(b"P5 4 1 65535\n" + GREYS.astype(">u2").tobytes()) == SCALED  # opens as mode I
    assert greys(tiff(GREYS, photometric=0)) == [255 - grey for grey in SCALED]  # white is zero
    twelve = tiff(np.frombuffer(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), np.uint8)[None], 1)
    twelve = twelve.replace(struct.pack("<HHII", 258, 3, 1, 8), struct.pack("<HHII", 258, 3, 1, 12))
    twelve = twelve.replace(struct.pack("<HHII", 256, 3, 1, 6), struct.pack("<HHII", 256, 3, 1, 4))
    assert greys(twelve) == [0, 128, 255, 0]  # 0, 2048, 4095, 0: the white of 12 bits
    # Old versions of Pillow open the 16 bits of a PNG as mode I.
    old = Image.fromarray(GREYS.astype(np.int32))
    old.format = "PNG"
    assert np.asarray(to_rgb(old))[0, :, 0].tolist() == SCALED


def test_the_transparent_value_of_16_bits():
    content = png(4, 16, 0, GREYS.astype(">u2").tobytes(), struct.pack(">H", 0x1234))
    assert greys(content) == [0, 1, 255, 255]


def test_value_range():
    assert greys(encoded(Image.fromarray(GREYS), "PNG"), (0, 1000)) == [0, 65, 255, 255]
    assert greys(encoded(Image.fromarray(GREYS), "PNG"), (256, 0x1234)) == [0, 0, 255, 255]
    integers = np.array([[-1000, 0, 500, 10**9]], dtype=np.int32)
    assert greys(encoded(Image.fromarray(integers), "TIFF"), (-1000, 1000)) == [0, 128, 191, 255]
    assert greys(tiff(integers.astype(np.int16), 1, sample_format=2), (-1000, 1000))[:3] == [0, 128, 191]
    unsigned = np.array([[0, 2**31, 2**32 - 1]], dtype=np.uint32)
    assert greys(tiff(unsigned, 1), (0, 2**32 - 1)) == [0, 128, 255]
    floats = np.array([[-0.5, 0.25, 0.5, 1e30]], dtype=np.float32)
    assert greys(encoded(Image.fromarray(floats), "TIFF"), (0, 1)) == [0, 64, 128, 255]
    assert greys(encoded(Image.new("L", (2, 1), 7), "PNG"), (0, 1000)) == [7, 7]  # not for 8 bits
    for values in (integers, floats):
        refused(encoded(Image.fromarray(values), "TIFF"), "mode [IF] says not which .* data.value_range")
    nan = Image.fromarray(np.array([[0, np.nan]], dtype=np.float32))
    refused(encoded(nan, "TIFF"), "data.value_range")
    refused(encoded(nan, "TIFF"), "NaN", (0, 1))


def test_16_bit_colour():
    expected = [[0, 1, 0x12], [255, 0x80, 0x80]]
    content = png(2, 16, 2, COLOURS.astype(">u2").tobytes())
    for file in (content, tiff(COLOURS, photometric=2), b"P6 2 1 65535\n" + COLOURS.astype(">u2").tobytes()):
        assert row(file) == expected
    for file in (content, tiff(COLOURS, photometric=2)):
        refused(file, "16-bit colour.*data.value_range", (0, 1000))
    refused(png(2, 16, 2, COLOURS.astype(">u2").tobytes(), bytes(6)), "16-bit colour.*transparent")
    with_alpha = np.array([[0, 256, 0x1280, 65535, 65535, 0x8000, 0x80FF, 0]], dtype=">u2")
    assert row(png(2, 16, 6, with_alpha.tobytes())) == [[0, 1, 0x12], [255] * 3]
    assert row(png(2, 16, 4, np.array([0x1280, 65535, 0, 0], dtype=">u2").tobytes())) == [[0x12] * 3, [255] * 3]


def test_transparency_lies_over_white():
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], dtype=np.uint8))
    expected = [[200, 0, 0], [255, 255, 255], [227, 127, 127]]
    for kind in ("PNG", "TIFF", "WEBP"):
        kwargs = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert row(encoded(rgba, kind, **kwargs)) == expected
    assert np.allclose(np.asarray(to_rgb(rgba.convert("RGBa")))[0], expected, atol=1)
    la = Image.fromarray(np.array([[[9, 255], [9, 0], [9, 128]]], dtype=np.uint8), "LA")
    assert greys(encoded(la, "PNG")) == [9, 255, 132]
    assert np.allclose(np.asarray(to_rgb(la.convert("La")))[0, :, 0], [9, 255, 132], atol=1)
    pa = Image.frombytes("PA", (3, 1), bytes([0, 255, 1, 0, 2, 128]))
    pa.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert np.asarray(to_rgb(pa))[0].tolist() == [[10, 20, 30], [255, 255, 255], [162, 167, 172]]


def test_palettes():
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert row(encoded(image, "PNG")) == row(encoded(image, "GIF")) == row(encoded(image, "BMP")) == colours
    white = [255, 255, 255]
    assert row(encoded(image, "PNG", transparency=1)) == row(encoded(image, "GIF", transparency=1))
    assert row(encoded(image, "PNG", transparency=1)) == [colours[0], white, colours[2]]
    assert row(encoded(image, "PNG", transparency=bytes([255, 255, 0]))) == [colours[0], colours[1], white]


def test_transparent_values():
    assert row(encoded(Image.frombytes("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6])), "PNG", transparency=(1, 2, 3))) == [
        [255, 255, 255],
        [4, 5, 6],
    ]
    assert greys(encoded(Image.frombytes("L", (2, 1), bytes([1, 2])), "PNG", transparency=1)) == [255, 2]
    assert greys(png(4, 4, 0, bytes([0x0F, 0x5A]), struct.pack(">H", 5))) == [0, 255, 255, 170]
    assert greys(png(4, 2, 0, bytes([0b00011011]), struct.pack(">H", 1))) == [0, 255, 170, 255]
    assert greys(png(2, 1, 0, bytes([0]), struct.pack(">H", 0))) == [255, 255]


def test_other_modes():
    assert greys(encoded(Image.frombytes("1", (3, 1), bytes([0b10100000])), "PNG")) == [255, 0, 255]
    assert greys(encoded(Image.frombytes("L", (2, 1), bytes([3, 200])), "PNG")) == [3, 200]
    red = Image.new("RGB", (16, 16), (250, 10, 20))
    for mode in ("YCbCr", "HSV", "RGBX", "CMYK"):
        image = to_rgb(red.convert(mode))
        assert image.mode == "RGB"
        assert np.allclose(np.asarray(image), (250, 10, 20), atol=4), mode
    for mode, kind in (("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("CMYK", "TIFF")):
        assert np.allclose(row(encoded(red.convert(mode), kind)), (250, 10, 20), atol=6), (mode, kind)
    lab = np.array([[[5, 0, 3], [1, 2, 3]]], dtype=np.uint8)
    refused(tiff(lab, photometric=8), "mode LAB has no known way to RGB")
    refused(tiff(np.array([[-5, 7]], dtype=np.int8), 1, sample_format=2), "signed values")
    assert greys(tiff(np.array([[5, 7]], dtype=np.uint8), 0)) == [250, 248]


def test_cmyk_of_adobe_is_inverted():
    """Adobe's programs write the inks of a JPEG inverted and put their name in."""
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in content
    assert np.allclose(row(content), (255, 0, 0), atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        path = tmp_path / f"turned.{kind}"
        kwargs = {"lossless": True} if kind == "WEBP" else {}
        Image.fromarray(np.ascontiguousarray(stored)).save(path, kind, exif=exif, **kwargs)
        assert np.array_equal(np.asarray(open_rgb(path, "it"))[:, :, 0], upright), kind
    deep = encoded(Image.fromarray(np.ascontiguousarray(stored).astype(np.uint16) * 257), "PNG", exif=exif)
    assert np.array_equal(np.asarray(open_rgb(deep, "it"))[:, :, 0], upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_is_no_damaged_image():
    for kind in ("JPEG", "PNG"):
        for exif in (b"Exif\0\0II*\0garbage", b"no TIFF header", b"MM\0*"):
            assert greys(encoded(Image.new("L", (8, 8), 7), kind, exif=exif))[0] == 7


def test_the_first_of_several_frames():
    frames = [Image.new("L", (2, 1), shade) for shade in (5, 6)]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        kwargs = {"lossless": True} if kind == "WEBP" else {}
        assert greys(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **kwargs)) == [5, 5], kind


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF"):
        content = encoded(noise, kind)
        refused(content[: len(content) // 2], "not a readable image .*; remove or replace it")
    refused(b"", "empty, or of a format that is not read")
    refused(b"some text", "empty, or of a format")
    refused(png(0, 8, 0, b""), "not a readable image")
    refused(tmp_path / "none.png", "No such file")
    refused(tmp_path, "not a file; remove it")
    (tmp_path / "link.png").symlink_to(tmp_path / "none.png")
    refused(tmp_path / "link.png", "No such file")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        refused(encoded(noise, "PNG"), "an image of more than 200 pixels; make it smaller")
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        to_rgb(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize(
    "error",
    [
        *(OSError("x"), ValueError("x"), SyntaxError("x"), struct.error("x"), EOFError(), zlib.error("x")),
        *(MemoryError(), IndexError("x"), KeyError("x"), TypeError("x\ny"), RecursionError("x")),
        PermissionError(13, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_pillow_raises(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(images, "to_rgb", fail)
    refused(encoded(Image.new("L", (1, 1)), "PNG"), r"not a readable image \(\S.*\); remove or replace it")


@pytest.mark.filterwarnings("ignore")
def test_random_damage_is_an_error_of_ours_or_none():
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (16, 16, 4), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        whole = encoded(noise.convert("RGB") if kind == "JPEG" else noise, kind)
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, min(len(whole), 200), 4):
                damaged[place] = random.integers(256)
            try:
                assert open_rgb(bytes(damaged), "it").mode == "RGB"
            except UnreadableImage as e:
                assert str(e).startswith("it: ")  # noqa: PT017


def test_the_error_goes_through_processes():
    with pytest.raises(DataError) as caught:
        open_rgb(b"", "it")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.name) == (UnreadableImage, str(caught.value), "it")
    assert str(UnreadableImage("as a DataLoader raises it")) == "as a DataLoader raises it"


@pytest.mark.slow
def test_what_would_fill_the_memory(tmp_path, recwarn):
    """A long thin image, which is resized by its short side; more pixels than Pillow allows; a pipe."""
    refused(encoded(Image.new("L", (1, 1000)), "PNG"), "an image of 1 x 1000 pixels is too long and thin; cut it")
    assert open_rgb(encoded(Image.new("L", (1, 200)), "PNG"), "strip").size == (1, 200)
    refused(
        encoded(Image.new("1", (20_000, 20_000)), "PNG"), "an image of more than 178,956,970 pixels; make it smaller"
    )
    assert open_rgb(encoded(Image.new("1", (10_000, 9_000)), "PNG"), "large").size == (10_000, 9_000)
    assert not recwarn
    os.mkfifo(tmp_path / "pipe.jpg")
    refused(tmp_path / "pipe.jpg", "not a file; remove it")


def test_rgb_outlives_its_file(tmp_path):
    """What is RGB already is not copied, so it must not hang on the file."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for kind in ("PNG", "BMP", "JPEG", "TIFF", "WEBP"):
        path = tmp_path / f"it.{kind}"
        Image.fromarray(noise).save(path, kind)
        expected = np.asarray(Image.open(path).convert("RGB"))
        image = open_rgb(path, "it")
        path.unlink()
        assert np.array_equal(np.asarray(image), expected), kind
        assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(image))), expected), kind
        assert np.array_equal(np.asarray(image.crop((1, 2, 20, 30))), expected[2:30, 1:20]), kind


@pytest.mark.slow
def test_the_largest_image_can_be_set(tmp_path, monkeypatch):
    """By a key that the message names; nothing else in the process changes."""
    content = encoded(Image.new("L", (40, 30)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"than 200 pixels; make it smaller, or raise data.max_image_pixels$"):
        open_rgb(content, "it")
    assert open_rgb(content, "it", None, 1200).size == (40, 30)
    with pytest.raises(UnreadableImage, match=r"an image of more than 1,199 pixels; make it smaller"):
        open_rgb(content, "it", None, 1199)
    assert Image.MAX_IMAGE_PIXELS == 100
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(content)
    (tmp_path / "list.txt").write_text("cat/0.png cat\n")
    write_tar(tmp_path / "tars" / "train.tar", {"0.png": content, "0.cls": b"cat"})
    (tmp_path / "hf").mkdir()
    datasets.Dataset.from_dict({"image": [content], "label": [0]}).to_parquet(tmp_path / "hf" / "train.parquet")
    for root, kwargs in (
        ("photos", {}),
        ("photos", {"source": "csv", "csv": str(tmp_path / "list.txt")}),
        ("tars", {"source": "wds"}),
        ("hf", {"source": "hf"}),
    ):
        split = "." if root == "photos" else "train"
        for limit in (None, 1200):
            data = DataConfig(
                root=str(tmp_path / root), max_image_pixels=limit, img_size=32, workers=root == "tars", **kwargs
            )
            loader = eval_loader(open_split(data, split), data, 1, 0, 1, False)
            if limit:
                assert next(iter(loader)).images.shape == (1, 3, 32, 32)  # of tars in a worker process
            else:
                with pytest.raises(DataError, match=r"raise data.max_image_pixels"):
                    next(batches(loader))


def test_what_to_do_about_the_files_of_a_phone(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"ftypheic")
    refused(tmp_path / "IMG_1.HEIC", "not a readable image")
    with pytest.raises(UnreadableImage, match=r".heic are images that Pillow does not read: convert them"):
        open_rgb(tmp_path / "IMG_1.HEIC", "IMG_1.HEIC")


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "SGI", "ICNS", "DDS"])
def test_formats_that_are_not_listed_are_not_opened(kind):
    """Whatever the file is called: for EPS, Pillow starts another program."""
    refused(encoded(Image.new("RGB", (32, 32)), kind), "empty, or of a format that is not read")


def test_the_endings_are_of_the_formats_that_are_read():
    Image.init()
    assert {Image.EXTENSION[ending] for ending in images.IMAGE_ENDINGS if ending in Image.EXTENSION} <= {
        *images.FORMATS
    }
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA"):
        assert open_rgb(encoded(Image.new("RGB", (3, 2)), kind), "it").size == (3, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    """In training, evaluation and prediction alike; data.on_error may skip them."""
    grey = np.full((40, 40), 0.5, dtype=np.float32)
    for name in ("good", "bad"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{name}.tif").write_bytes(encoded(Image.fromarray(grey), "TIFF"))
        grey[3, 4] = value
    refused(tmp_path / "cat" / "bad.tif", "has values that are not finite numbers", (0, 1))
    data = DataConfig(root=str(tmp_path), value_range=(0, 1), img_size=32, workers=0)
    with pytest.raises(DataError, match=r"cat/bad.tif: has values .* data.on_error=skip"):
        next(batches(eval_loader(open_split(data, "."), data, 2, 0, 1, False)))
    skipping = data.model_copy(update={"on_error": "skip"})
    (batch,) = batches(eval_loader(open_split(skipping, "."), skipping, 2, 0, 1, False))
    assert (len(batch.images), [name for name, _ in batch.skipped]) == (1, [str(tmp_path / "cat" / "bad.tif")])


def test_large_images_are_converted_in_strips(monkeypatch):
    """To the same pixels, without tens of bytes of memory for each."""
    random = np.random.default_rng(0)
    deep = encoded(Image.fromarray(random.integers(0, 65536, (23, 7), dtype=np.uint16)), "PNG")
    clear = encoded(Image.fromarray(random.integers(0, 256, (23, 7, 4), dtype=np.uint8)), "PNG")
    palette = encoded(
        Image.fromarray(random.integers(0, 9, (23, 7), dtype=np.uint8)).convert("P"), "GIF", transparency=3
    )
    for content in (deep, clear, palette):
        expected = open_rgb(content, "it").tobytes()
        for pixels in (1, 15, 160):
            with monkeypatch.context() as patch:
                patch.setattr(images, "STRIP_PIXELS", pixels)
                assert open_rgb(content, "it").tobytes() == expected


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "it.png")
    monkeypatch.setattr(os.path, "isfile", lambda _: True)
    refused(tmp_path / "it.png", "not a readable image")


def test_sockets_and_devices_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("it.png")
        refused("it.png", "not a file; remove it")
    refused("/dev/zero", "not a file; remove it")
    (tmp_path / "round.png").symlink_to("round.png")
    refused(tmp_path / "round.png", "not a readable image")
