"""From a picture to a picture: reading and fitting files, image to image and inpainting against diffusers."""

import io
import json
import shutil

import numpy as np
import oracle
import pytest
from diffusers.image_processor import VaeImageProcessor
from helpers import MASK, PICTURE, compare_from_picture, error, smooth, to_torch_layout
from oracle import SCHEDULERS
from PIL import EpsImagePlugin, Image
from tiny import write_controlnet

from mlx_deepcache import Control, StableDiffusion
from mlx_deepcache.errors import Failure, UsageError
from mlx_deepcache.media.pictures import fit, read_mask, read_picture, size_for, source

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_image_to_image(checkpoint, pipeline, scheduler):
    """Every scheduler's shortened schedule, cached; strengths that leave one and some of the steps."""
    for steps, strength in ((6, 0.7), (8, 0.13)):
        options = {"steps": steps, "guidance_scale": 2.0, "scheduler": scheduler, "strength": strength}
        compare_from_picture(checkpoint, pipeline, "sd15", interval=2, branch=1, **options)


def test_image_to_image_with_pndms_runge_kutta_start(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("sd15"), tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"skip_prk_steps": False}))
    options = {"steps": 8, "guidance_scale": 2.0, "strength": 0.7}
    compare_from_picture(
        lambda kind: folder, lambda kind: StableDiffusion.from_pretrained(str(folder), "float32"), "sd15", **options
    )


@pytest.mark.parametrize(
    ("kind", "scheduler", "strength"),
    [("sd21", None, 0.6), ("sd15", "euler", 1.0), ("sdxl", None, 0.6), ("sdxl", "heun", 1.0), ("sdxl", "unipc", 0.6)],
)
def test_image_to_image_of_other_kinds(checkpoint, pipeline, kind, scheduler, strength):
    options = {"steps": 5, "guidance_scale": 3.0, "scheduler": scheduler, "strength": strength}
    compare_from_picture(checkpoint, pipeline, kind, interval=2, branch=1, **options)


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_inpainting_by_blending(checkpoint, pipeline, scheduler):
    options = {"steps": 6, "guidance_scale": 2.0, "scheduler": scheduler, "strength": 0.7}
    compare_from_picture(checkpoint, pipeline, "sd15", MASK, interval=2, branch=1, **options)


@pytest.mark.parametrize("kind", ["inpaint", "inpaint-xl"])
@pytest.mark.parametrize(("scheduler", "strength"), [(None, 1.0), ("heun", 0.7), ("euler-a", 0.5)])
def test_inpainting_with_a_net_made_for_it(checkpoint, pipeline, kind, scheduler, strength):
    options = {"steps": 4, "guidance_scale": 2.0, "scheduler": scheduler, "strength": strength}
    compare_from_picture(checkpoint, pipeline, kind, MASK, interval=2, branch=1, **options)


@pytest.mark.parametrize(
    ("kind", "mask", "strength"), [("sd15", None, 0.6), ("sd15", MASK, 0.6), ("inpaint", MASK, 1.0)]
)
def test_taesd_draws_no_noise(checkpoint, taesd, tmp_path, kind, mask, strength):
    """Its encoder gives latents, and not their distribution; what is drawn later comes that much earlier."""
    folder = shutil.copytree(checkpoint(kind), tmp_path / "model")
    shutil.rmtree(folder / "vae")
    shutil.copytree(taesd, folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    ours = StableDiffusion.from_pretrained(str(checkpoint(kind)), "float32", vae=str(taesd))
    options = {"steps": 4, "guidance_scale": 2.0, "scheduler": "euler-a", "strength": strength}
    compare_from_picture(lambda kind: folder, lambda kind: ours, kind, mask, **options)


def test_a_soft_mask(checkpoint, pipeline):
    """diffusers' blur before, and its overlay after; its latents know black and white only, and so do ours."""
    options = {"steps": 4, "guidance_scale": 2.0, "scheduler": "ddim", "strength": 0.7}
    soft = VaeImageProcessor.blur(MASK, 5)
    expected = oracle.from_picture(
        checkpoint("sd15"), "a small red cat", PICTURE, soft, seed=[3], height=72, width=104, **options
    )
    pipe = pipeline("sd15")
    result = pipe(
        "a small red cat",
        image=PICTURE,
        mask=MASK,
        mask_blur=5,
        seeds=3,
        height=72,
        width=104,
        cache_interval=1,
        **options,
    )
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    drawn = Image.fromarray(pipe.decode(result.latents)[0])
    overlaid = np.asarray(VaeImageProcessor().apply_overlay(soft, PICTURE, drawn).convert("RGB")).astype(int)
    ours, alpha = np.asarray(result.images[0]).astype(int), np.asarray(soft)
    assert np.abs(ours - overlaid).max() <= 2
    assert len(np.unique(alpha)) > 50
    assert np.array_equal(ours[alpha == 0], np.asarray(PICTURE)[alpha == 0])


def beside(sides, mask=None):
    """The picture with its edges repeated, and what is white where something new is drawn."""
    left, top, right, bottom = sides
    edges = ((top, bottom), (left, right))
    inside = np.zeros((72, 104), np.uint8) if mask is None else np.asarray(mask)
    picture = np.pad(np.asarray(PICTURE), (*edges, (0, 0)), mode="edge")
    return Image.fromarray(picture), Image.fromarray(np.pad(inside, edges, constant_values=255))


@pytest.mark.parametrize(
    ("kind", "sides", "mask", "strength"),
    [
        ("sd15", (16, 0, 24, 8), None, None),
        ("sd15", (0, 16, 0, 0), MASK, 0.7),
        ("inpaint", (8, 8, 8, 8), None, None),
        ("sdxl", (0, 0, 40, 0), None, 0.7),
    ],
)
def test_outpainting(checkpoint, pipeline, kind, sides, mask, strength):
    """It is inpainting a larger picture, and all of the given one's pixels stay; cached as everywhere."""
    picture, white = beside(sides, mask)
    options = {"steps": 4, "guidance_scale": 2.0, "scheduler": "ddim", "strength": strength}
    size = {"height": picture.height, "width": picture.width}
    expected = oracle.from_picture(
        checkpoint(kind), "a cat", picture, white, seed=[3], interval=2, branch=1, **size,
        **options | {"strength": strength or 1.0},
    )  # fmt: skip
    asked = sides if len(set(sides)) > 1 else sides[0]
    given = {"image": PICTURE, "mask": mask, "outpaint": asked, "cache_interval": 2, "cache_branch": 1}
    result = pipeline(kind)("a cat", seeds=[3], **given, **options)
    assert error(to_torch_layout(result.latents), expected["latents"]) < 1e-4
    ours, kept = np.asarray(result.images[0]), np.asarray(white) < 128
    assert ours.shape == (picture.height, picture.width, 3)
    assert np.array_equal(ours[kept], np.asarray(picture)[kept]) and kept.mean() > 0.3
    assert (ours != np.asarray(picture))[~kept].mean() > 0.5


def test_outpainting_in_other_sizes(pipeline):
    """A size that cannot be drawn becomes the nearest one; sides can be given; only what is new can be drawn."""
    pipe, odd = pipeline("sd15"), PICTURE.crop((0, 0, 99, 70))
    assert (pipe.settings("a cat", image=odd, outpaint=10).start.picture.image.shape) == (88, 120, 3)
    settings = pipe.settings("a cat", image=odd, outpaint=(0, 0, 20, 0), width=64, height=64)
    assert settings.start.picture.mask[:, :52].sum() == 0 and settings.start.picture.mask[:, 54:].all()
    part = pipe.settings(
        "a cat", image=odd, outpaint=(0, 0, 20, 0), mask_padding=8, mask_blur=2, width=64, height=64
    ).start.picture
    assert part.image.shape == (64, 64, 3) and part.whole.image.shape == (70, 119, 3)
    assert part.box[2] == 119 and part.box[0] < 91
    with pytest.raises(UsageError, match="are more than the"):
        pipe.settings("a cat", image=odd, outpaint=10**6)
    assert pipe.settings("a cat", image=odd, outpaint=8).strength == 1


LARGE = smooth(150, 230, seed=1)


def at(left, top, right, bottom, size=LARGE.size):
    """A mask that is white in a box."""
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


@pytest.mark.parametrize(
    ("mask", "padding", "blur", "size"),
    [
        (at(90, 50, 140, 80), 10, 0, (64, 64)),  # wider than what is drawn
        (at(90, 50, 100, 110), 7, 3, (64, 96)),  # taller
        (at(0, 40, 30, 60), 0, 4, (64, 64)),  # at an edge
        (at(5, 0, 225, 30), 32, 0, (96, 64)),  # which the picture is too small for: padded
        (at(10, 10, 50, 60, size=(115, 75)), 6, 0, (64, 64)),  # of another size
    ],
)
@pytest.mark.parametrize("kind", ["sd15", "inpaint", "sdxl"])
def test_only_masked(checkpoint, pipeline, kind, mask, padding, blur, size):
    """diffusers' `padding_mask_crop`, uncached and with DeepCache, and the whole picture that comes of it."""
    height, width = size
    whole = mask.resize(LARGE.size, Image.Resampling.LANCZOS)
    whole = VaeImageProcessor.blur(whole, blur) if blur else whole
    pipe, last = oracle.variant(oracle.shared(str(checkpoint(kind))), "Inpaint"), {}
    pipe.scheduler = oracle.make_scheduler(pipe.own_scheduler, "ddim")

    def keep(pipe, i, t, now):
        last.update(now)
        return {}

    options = {"height": height, "width": width, "guidance_scale": 2.0, "strength": 0.7}
    with oracle.helper(pipe, 2, 1):
        expected = pipe(
            "a small red cat",
            image=LARGE,
            mask_image=whole,
            padding_mask_crop=padding,
            num_inference_steps=4,
            generator=oracle.generators(3),
            callback_on_step_end=keep,
            **options,
        ).images[0]
    result = pipeline(kind)(
        "a small red cat",
        image=LARGE,
        mask=mask,
        mask_padding=padding,
        mask_blur=blur,
        steps=4,
        seeds=3,
        scheduler="ddim",
        cache_interval=2,
        cache_branch=1,
        **options,
    )
    padded = mask.getbbox()[0] == 5  # where diffusers' edges are not quite the picture's own
    assert error(to_torch_layout(result.latents), last["latents"]) < (0.05 if padded else 1e-4)
    ours, theirs = (np.asarray(image).astype(int) for image in (result.images[0], expected))
    hard = np.asarray(whole) if blur else np.where(np.asarray(whole) < 128, 0, 255)
    alike = hard == np.asarray(whole)  # we take a mask's greys for black and white unless they are asked for
    assert np.abs(ours - theirs)[alike].max() <= (16 if padded else 2)
    assert np.abs(ours - theirs)[alike].mean() < (2 if padded else 0.1)
    outside = hard == 0
    assert np.array_equal(ours[outside], np.asarray(LARGE)[outside]) and outside.mean() > 0.3
    assert (ours != np.asarray(LARGE))[~outside].mean() > 0.5


def test_only_masked_beside_a_controlnet(pipeline, checkpoint, tmp_path):
    """What is followed is cut out as the picture is."""
    net = write_controlnet("sd15", tmp_path / "net")
    mask, followed = at(90, 50, 140, 80), smooth(75, 115, seed=2)
    settings = pipeline("sd15").settings(
        "a cat", image=LARGE, mask=mask, mask_padding=10, controls=[Control(net, followed)], height=64, width=64
    )
    left, top, right, bottom = settings.start.picture.box
    assert (left, right) == (80, 150) and bottom - top == 70
    expected = followed.resize(LARGE.size).crop((left, top, right, bottom)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(settings.legs[0].controls[0].image[0], np.asarray(expected))


def test_a_black_mask_has_no_surroundings(pipeline):
    with pytest.raises(UsageError, match="black everywhere"):
        pipeline("sd15").settings("a cat", image=LARGE, mask=Image.new("L", LARGE.size), mask_padding=4)
    with pytest.raises(UsageError, match="fit does not go with mask_padding"):
        pipeline("sd15").settings("a cat", image=LARGE, mask=at(9, 9, 20, 20), mask_padding=4, fit="crop")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_default_strength(checkpoint, pipeline, kind, mask):
    result, expected = compare_from_picture(
        checkpoint, pipeline, kind, mask, steps=5, scheduler="ddim", guidance_scale=1.0
    )
    if mask is not None:  # outside, the very pixels of the picture; inside, diffusers' picture
        inside = np.asarray(MASK) > 127
        for image, reference in zip(result.images, expected["image"], strict=True):
            assert np.array_equal(np.asarray(image)[~inside], np.asarray(PICTURE)[~inside])
            assert np.abs(np.asarray(image).astype(int) - reference)[inside].mean() < 0.1
            assert np.abs(np.asarray(image).astype(int) - np.asarray(PICTURE))[inside].mean() > 5


def test_a_picture_does_not_depend_on_those_beside_it(pipeline):
    options = {"image": PICTURE, "mask": MASK, "steps": 4, "strength": 0.6, "scheduler": "euler-a"}
    both = pipeline("sd15")("a cat", seeds=[3, 4], **options)
    alone = pipeline("sd15")("a cat", seeds=[4], **options)
    assert error(both.latents[1:], alone.latents) < 1e-5


# ------------------------------------------------------------------------------------------------- reading and fitting


def saved(image, format="PNG", **options):
    """What reading gives back of a picture in a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return read_picture(file)


def test_turned_as_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    sideways = PICTURE.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(saved(sideways, exif=exif), PICTURE)
    sideways.getexif()[0x0112] = 6  # as it has where it was opened by someone else
    assert np.array_equal(read_picture(sideways), PICTURE)


def test_transparency_is_over_white_and_in_a_mask_over_black():
    alpha = np.zeros((72, 104), np.uint8)
    alpha[:, 50:], alpha[:, 80:] = 128, 255
    picture = PICTURE.copy()
    picture.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = np.asarray(PICTURE) * share + 255 * (1 - share)
    assert np.abs(np.asarray(saved(picture)).astype(float) - expected).max() <= 1
    grey = Image.merge("LA", [Image.new("L", (104, 72), 200), Image.fromarray(alpha)])
    assert np.asarray(saved(grey))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(read_mask(grey).convert("L"))[0, [0, 90]].tolist() == [0, 200]


def test_a_palette_with_a_transparent_colour():
    palette = PICTURE.quantize(16)
    assert np.array_equal(saved(palette), palette.convert("RGB"))
    read = np.asarray(saved(palette, transparency=3))
    hidden = np.asarray(palette) == 3
    assert (read[hidden] == 255).all()
    assert np.array_equal(read[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


def test_sixteen_bits():
    grey = RNG.integers(0, 65536, (8, 9), dtype=np.uint16)
    read = np.asarray(saved(Image.fromarray(grey)))
    assert np.abs(read[..., 0] - grey / 257).max() <= 0.5001


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "LAB", "HSV", "RGBA", "RGBa", "PA"])
def test_other_modes(mode):
    picture = PICTURE.convert("RGBA").convert(mode) if mode in ("RGBa",) else _as_mode(mode)
    read = read_picture(picture)
    assert (read.mode, read.size) == ("RGB", PICTURE.size)
    assert np.asarray(read).std() > 10


def _as_mode(mode):
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(PICTURE, *profiles, outputMode="LAB")
    if mode == "PA":
        return PICTURE.convert("L").convert("LA").convert(mode)
    return PICTURE.convert(mode)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 200), (72, 104), (136, 48)])
def test_fitted_as_diffusers_does(height, width):
    processor = VaeImageProcessor()
    for how, mode in (("stretch", "default"), ("crop", "crop")):
        expected = processor.resize(PICTURE, height, width, resize_mode=mode)
        assert np.array_equal(fit(PICTURE, height, width, how), expected)
    ours = np.asarray(fit(PICTURE, height, width, "pad"))
    theirs = np.asarray(processor.resize(PICTURE, height, width, resize_mode="fill"))
    high, wide = min(height, 72 * width // 104), min(width, 104 * height // 72)
    top, left = height // 2 - high // 2, width // 2 - wide // 2
    assert np.array_equal(ours[top : top + high, left : left + wide], theirs[top : top + high, left : left + wide])
    assert (ours[: top + 1] == ours[top]).all() and (ours[top + high - 1 :] == ours[top + high - 1]).all()
    assert (ours[:, : left + 1] == ours[:, left : left + 1]).all() and (ours[:, left + wide :] == ours[:, -1:]).all()


def test_a_mask_is_resized_and_binarized_as_diffusers_does():
    mask = smooth(100, 90, seed=3)
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected = processor.preprocess(mask, height=64, width=48)[0, 0].numpy()
    ours = source(PICTURE, read_mask(mask), 64, 48, "stretch").mask
    assert np.array_equal(ours, expected > 0.5)
    assert 0.1 < ours.mean() < 0.9


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_a_mask_goes_where_its_picture_goes(how):
    """A picture that is its own mask, at half the size."""
    small = MASK.resize((52, 36), Image.Resampling.BOX)
    fitted = source(MASK.convert("RGB"), read_mask(small), 64, 64, how)
    differ = fitted.mask != (fitted.image[..., 0] > 127)
    assert differ.mean() < 0.06


def test_sizes():
    """A model's own number of pixels, in the picture's proportions."""
    native = (512, 512)
    assert size_for(Image.new("L", (512, 512)), native, None, None, 8) == native
    assert size_for(Image.new("L", (64, 64)), native, None, None, 8) == native
    assert size_for(Image.new("L", (4032, 3024)), native, None, None, 8) == (440, 592)
    assert size_for(Image.new("L", (3024, 4032)), (1024, 1024), None, None, 8) == (1184, 888)
    assert size_for(PICTURE, native, 48, None, 8) == (48, 72)
    assert size_for(PICTURE, native, None, 208, 8) == (144, 208)
    assert size_for(PICTURE, native, 64, 64, 8) == (64, 64)


@pytest.mark.parametrize(
    ("size", "height", "width", "drawn"),
    [
        ((3000, 10), None, None, (256, 1024)),
        ((10, 3000), None, None, (1024, 256)),
        ((3000, 10), None, 512, (128, 512)),
        ((10, 3000), None, 512, (2048, 512)),
    ],
)
def test_a_slender_picture_is_drawn_less_so(size, height, width, drawn):
    with pytest.warns(UserWarning, match=f"a picture of {size[0]} x {size[1]} is drawn as 4 : 1"):
        assert size_for(Image.new("L", size), (512, 512), height, width, 8) == drawn


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no picture"),
        (b"", "no picture of a kind that can be read"),
        (b"GIF89a", "cannot be read|no picture of a kind"),
        ("truncated", "cannot be read"),
        ("bomb", "more than 89,478,485 pixels"),
    ],
)
def test_unreadable(tmp_path, content, message):
    file = tmp_path / "a.png"
    if content == "bomb":
        Image.new("1", (20000, 5000)).save(file)
    elif content == "truncated":
        PICTURE.save(file)
        file.write_bytes(file.read_bytes()[:5000])
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(Failure, match=message):
        read_picture(file)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(Failure, match="cannot be read: Is a directory"):
        read_picture(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": MASK}, "mask has no meaning without an image"),
        ({"strength": 0.5}, "strength has no meaning without an image"),
        ({"fit": "crop"}, "fit has no meaning without an image"),
        ({"image": PICTURE, "strength": 0}, "strength should be above 0 and at most 1, got 0"),
        ({"image": PICTURE, "strength": 1.01}, "at most 1, got 1.01"),
        ({"image": PICTURE, "strength": float("nan")}, "at most 1, got nan"),
        ({"image": PICTURE, "fit": "tile"}, "fit should be one of stretch, crop, pad, got 'tile'"),
        ({"image": PICTURE, "steps": 7, "strength": 0.1}, r"none of 7 steps to run.* is 0\.1429, or 10 steps"),
    ],
)
def test_settings_that_cannot_be(pipeline, options, message):
    with pytest.raises(UsageError, match=message):
        pipeline("sd15").settings("a cat", **options)


def test_the_smallest_strength_works(pipeline):
    import math

    for steps in range(1, 200):
        assert int(steps * (math.ceil(1e4 / steps) / 1e4)) >= 1
    settings = pipeline("sd15").settings("a cat", image=PICTURE, steps=7, strength=0.1429, scheduler="ddim")
    assert len(settings.legs[0].plan.steps) == 1


@pytest.mark.parametrize("options", [{}, {"image": PICTURE}])
def test_a_net_for_inpainting_needs_picture_and_mask(pipeline, options):
    with pytest.raises(UsageError, match="this model fills in parts of a picture: it needs"):
        pipeline("inpaint").settings("a cat", **options)


def tiff(values, *, samples, bits=32):
    """A TIFF file of grey numbers; samples: what its SampleFormat is set to."""
    held = io.BytesIO()
    Image.fromarray(values).save(held, "TIFF", tiffinfo={339: samples})
    return held.getvalue()


def test_grey_of_many_bits():
    """White is what the file's kind of number says, to a step of 255."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    expected = np.asarray(Image.fromarray((ramp * 255).round().astype(np.uint8)).convert("RGB")).astype(int)

    def near(picture):
        return np.abs(np.asarray(read_picture(picture)).astype(int) - expected).max() <= 1

    sixteen = (ramp * 65535).round().astype(np.uint16)
    assert near(Image.fromarray(sixteen)) and near(Image.fromarray(sixteen.astype(np.int32)))
    held = io.BytesIO()
    Image.fromarray(sixteen).save(held, "PNG")
    assert near(held.getvalue())
    assert near(tiff(sixteen, samples=1))
    signed = (ramp * (2**31 - 1)).round().astype(np.int32)
    assert near(tiff(signed, samples=2)) and near(Image.fromarray(signed))
    unsigned = (ramp * (2**32 - 1)).round().astype(np.uint32).view(np.int32)
    assert near(tiff(unsigned, samples=2).replace(b"\x53\x01\x03\0\x01\0\0\0\x02", b"\x53\x01\x03\0\x01\0\0\0\x01"))
    assert near(tiff(ramp.astype(np.float32), samples=3)) and near(Image.fromarray(ramp.astype(np.float32)))
    with pytest.raises(Failure, match="no known white outside"):
        read_picture(Image.fromarray((ramp * 2).astype(np.float32)))


def test_grey_of_many_bits_is_turned_upright():
    held, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 8), np.uint16)).save(held, "PNG", exif=exif)
    assert read_picture(held.getvalue()).size == (4, 8)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "kind EPS, which is not read; save it as PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "kind HEIC"),
        (b"%PDF-1.4", "kind PDF"),
        (b"<?xml version='1.0'?><svg/>", "kind SVG"),
        (b"8BPS\0\x01", "kind Photoshop"),
        (b"SIMPLE  =                    T", "no picture of a kind"),
    ],
)
def test_kinds_that_are_not_opened(tmp_path, monkeypatch, start, words):
    """EPS above all, for which Pillow starts Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *rest: pytest.fail("another program would be started"))
    (tmp_path / "a.png").write_bytes(start)
    for picture in (tmp_path / "a.png", start):
        with pytest.raises(Failure, match=words):
            read_picture(picture)
        with pytest.raises(Failure, match=words):
            read_mask(picture)


def test_formats_that_are_read(tmp_path):
    for name in ("png", "jpg", "webp", "tiff", "bmp", "gif", "avif", "ppm", "tga", "jp2"):
        PICTURE.save(tmp_path / f"a.{name}")
        assert read_picture(tmp_path / f"a.{name}").size == PICTURE.size
